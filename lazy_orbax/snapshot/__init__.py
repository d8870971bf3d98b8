"""How do the bytes get out of reach of donation, and to the host?

`device_to_host.take` does it slab by slab, in the mode that `choose_mode` gives, under the
`host_budget`; `snapshot_step` and `split_step` are training steps that help.
"""
