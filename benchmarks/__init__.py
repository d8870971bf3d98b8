"""What a checkpoint costs, lazy_orbax against stock Orbax. Start with `python -m benchmarks`."""
