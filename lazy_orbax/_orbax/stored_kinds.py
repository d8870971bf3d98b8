"""What Orbax writes of the kinds of keys and leaves: known without Orbax."""

SEQUENCE, DICT = 1, 2
"""How Orbax numbers the kinds of keys."""
EMPTY = frozenset({"None", "Dict", "List", "Tuple", "NamedTuple"})
"""What Orbax writes as the type of what has no content."""
