"""What does Orbax do inside? Only this package touches what is not public in it.

`symbols` finds Orbax and says what is missing of it; where something is, saves are stock.
"""
