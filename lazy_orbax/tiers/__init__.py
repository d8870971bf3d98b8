"""What outlives the process that trains, who looks after it, and how often is it saved there?

A tier is a place for snapshots: memory, a local disk, a shared storage. The cheap ones survive few
failures, the dear ones all. A keeper looks after those in memory. `advise` says how often to save
to which.
"""
