"""Drop-in use with other libraries. Nothing is imported from them until a function here is called."""

from . import distributed, transformers

__all__ = ["distributed", "transformers"]
