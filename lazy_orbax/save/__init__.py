"""The story of `save()`. It starts in `begin.begin` and ends in `finish.finish`.

In between, `plan_cache` plans, `pipeline` moves bytes through three threads, `writer` hands them to
TensorStore, and `commit` is what Orbax waits for.
"""
