"""Which commands are there? `main` has the table of them.

Each is a module of its name with a `command`, which returns the exit status. What it does is a
function of the same name, in `lazy_orbax.inspect`.
"""
