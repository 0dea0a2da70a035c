"""Drop-in use with other libraries. Nothing is imported from them until a function here is called."""

from . import distributed, trainer, transformers

__all__ = ["distributed", "trainer", "transformers"]
