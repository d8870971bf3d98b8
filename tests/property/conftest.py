"""The folder takes under a minute. Nothing is written beside the tests."""
