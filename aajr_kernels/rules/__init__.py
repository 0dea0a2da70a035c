"""How torch functions act on a Dual: ``registry`` has the tables, ``install`` fills them."""

from .registry import rule

__all__ = ["rule"]
