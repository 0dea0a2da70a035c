"""Faults put into copies of the sources, and the tests that see them (`scripts/mutate.py`)."""
