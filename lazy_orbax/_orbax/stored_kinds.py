"""What Orbax writes of the kinds of keys and leaves: known without Orbax."""

SEQUENCE, DICT = 1, 2
"""How Orbax numbers the kinds of keys."""
EMPTY = frozenset({"None", "Dict", "List", "Tuple", "NamedTuple"})
"""What Orbax writes as the type of what has no content."""
IN_ZARR = frozenset({"jax.Array", "np.ndarray", "scalar", "jax.random.key"})
"""The types of leaves that Orbax's own type handlers write as arrays of Zarr."""
