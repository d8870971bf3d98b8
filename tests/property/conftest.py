"""The folder takes under a minute. Nothing is written beside the tests."""

from hypothesis import settings

settings.register_profile("lazy_orbax", deadline=None, max_examples=300, database=None)
settings.load_profile("lazy_orbax")
