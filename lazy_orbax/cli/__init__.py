"""Which commands are there? `main` has the table of them.

Each is a module with `add_arguments`, which says what the command takes, and `run`, which returns
the exit status.
"""
