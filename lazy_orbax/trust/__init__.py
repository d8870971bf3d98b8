"""Is a checkpoint safe to read?

`malformed.refuse_malformed` looks at it before Orbax and TensorStore do; the other modules each
check one kind of its files.
"""
