"""Is it what was saved?

`digest_file` and `proof` are written with a save, `stored_item` compares the storage with them, and
`verify.verify` reports.
"""
