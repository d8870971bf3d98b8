"""What can be made of checkpoints that are there?

`export` makes files of tensors that other libraries read.
"""
