"""Warnings at places of torch where a Dual passes unseen: the full backward hooks of modules.

They are attached to tensors, and a Dual is not one: the hooks of a module that takes or returns Duals do not run.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch.utils._pytree as pytree
from torch.utils.hooks import BackwardHook

from .common import is_dual

__all__ = ["install"]


def _warning(original: Callable[..., Any], what: str) -> Callable[..., Any]:
    @functools.wraps(original)
    def setup(self: BackwardHook, values: Any) -> Any:
        leaves = pytree.tree_leaves(values, is_leaf=is_dual)
        if not any(is_dual(leaf) for leaf in leaves):
            return original(self, values)
        warnings.warn(
            f"the backward hooks of {type(self.module).__name__} do not see its {what}, which is a Dual: put a hook on "
            "y.stacked, whose gradient is [1 + K, *shape].",
            stacklevel=4,
        )
        return values

    setup._warns_of_duals = True  # type: ignore[attr-defined]
    return setup


def install() -> None:
    """Make full backward hooks warn when a module takes or returns a Dual. Idempotent."""
    for name, what in (("setup_input_hook", "input"), ("setup_output_hook", "output")):
        original = getattr(BackwardHook, name)
        if not hasattr(original, "_warns_of_duals"):
            setattr(BackwardHook, name, _warning(original, what))
