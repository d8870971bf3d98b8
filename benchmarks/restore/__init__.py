"""What a restore costs: against stock Orbax, and against a plain read of the same files."""
