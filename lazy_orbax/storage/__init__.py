"""Where do bytes go, and what if that place does nothing?

`places` is a local directory or a bucket; `fsync` makes files durable, `deadline` gives up, and
`threads` has whatever may hang.
"""
