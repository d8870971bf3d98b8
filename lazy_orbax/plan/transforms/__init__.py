"""Which boxes of which stored leaves make a box of a wanted leaf? Pure: no arrays, no I/O.

`rules` has what users declare; `transform_map` applies it to names, shapes and dtypes, and
`transform_plan` answers for each shard. `virtual_array` has the geometry.
"""
