"""What does Orbax do inside, and how does it look from there? `symbols` says what was found of it.

Only this package touches what is not public in Orbax. Where something is missing, saves are stock.
"""
