"""Who writes what, from where? Pure: no arrays, no files, no I/O.

`slabs.make_plan` divides the leaves of a tree into pieces and slabs; `shards` says which process
writes which part of a leaf, `boxes` are rectangles of one.
"""
