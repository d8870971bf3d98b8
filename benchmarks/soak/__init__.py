"""Trains, saves, kills and restarts for as long as one likes, and counts what was lost or wrong.

python -m benchmarks.soak --minutes 30 --directory /disk/soak --out benchmarks/results/soak.jsonl

A supervisor starts a training process with random options, ends it at a random moment (SIGKILL,
SIGTERM, or not at all) and starts the next in the same directory. Before it trains, each process
restores every step that is there, by stock Orbax and by lazy_orbax in turns, and compares its
bits with those that were noted in a ledger when it was saved. Now and then the disk is full while
a save is in flight, and a byte of an older step is changed before a restart and put back after it.

Fails where a committed step is lost, a restored one is wrong, a changed byte goes unnoticed, a
save fails for no reason or has no outcome, a torn line hides what a process noted, or a process
hangs or fails.
"""
