"""What can be made of several checkpoints, or of parts of one, without a training run?

Merged steps, searched combinations, parameters alone. Begin with `merge.py`.
"""
