"""How does Orbax reach us? `lazy.LazyCheckpointHandler` speaks its protocol.

`stock_shaped` puts that inside Orbax's own handlers; `prewarm` rehearses a save.
"""
