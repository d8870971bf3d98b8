"""What can be made of several checkpoints, or of parts of one, without a training run?

Merged steps, searched combinations, parameters alone, files of tensors that other libraries read.
Begin with `merge.py`, or with `export.py`.
"""
