"""What is in a checkpoint, what does it cost, and where did the time go?

Needs neither JAX nor a model. A checkpoint is data: what `trust/` refuses is refused here as well.
"""
