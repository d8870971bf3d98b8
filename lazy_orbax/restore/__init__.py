"""The story of `restore()`. It starts in `verified.restore`.

Orbax reads; `compare_arrays` compares what it restored. `latest_good` and `replacing` help when a
step is not whole.
"""
