"""Where do bytes go, and what if that place does nothing?

`place_of` in `places` says what a directory is, local or in a bucket; `fsync` makes files durable,
`deadline` gives up, and `threads` has whatever may hang.
"""
