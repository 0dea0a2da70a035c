"""Before a Dual exists: patches of torch that make a lost derivative loud, checks of torch, and checks of its parts.

The modules that own them (``rules/guards.py``, ``torch_check.py``) register them at import; the first ``dual()`` runs
them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from .backends.operator import constant
from .runtime import UnsupportedOperation, unsupported
from .torch_private import separate_outputs

__all__ = ["COMPILED_GUARDS", "GUARDS", "directions", "guard_compiled", "install_guards"]

#: patches of torch that make a lost derivative loud; installed at the first dual(), never at import
GUARDS: list[Callable[[], None]] = [separate_outputs]


#: the same of compiled code: functions that return a message where they found a fault
COMPILED_GUARDS: list[Callable[[], str | None]] = []
_compiled_fault: str | None = None


def install_guards() -> None:
    """Install the registered guards, each once; one that refuses does so again."""
    if (
        torch.compiler.is_compiling()
    ):  # before a look at the list, which would become a guard of compiled code
        return
    while GUARDS:
        guard = GUARDS.pop()
        try:
            guard()
        except UnsupportedOperation:
            GUARDS.append(guard)
            raise


def guard_compiled() -> None:
    """While torch.compile traces a Dual: run the guards of compiled code, once, and raise what they found."""
    fault = _traced_fault()
    if fault is not None:
        unsupported(fault)


@constant
def _traced_fault() -> str | None:
    global _compiled_fault
    while COMPILED_GUARDS and _compiled_fault is None:
        _compiled_fault = COMPILED_GUARDS.pop()()
    return _compiled_fault


def directions(x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """`v` as ``[K, *x.shape]``, after the checks that :func:`aajr_kernels.dual` promises for both."""
    for name, value in (("x", x), ("v", v)):
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}.")
        if not value.is_floating_point():
            raise TypeError(
                f"{name} must be floating point, got {value.dtype}: a Dual is real; for token ids seed "
                "the embedding with aajr_kernels.seed."
            )
    if v.dtype != x.dtype:
        raise TypeError(f"v must have the dtype of x ({x.dtype}), got {v.dtype}: cast it with v.to(x.dtype).")
    if v.device != x.device:
        raise ValueError(
            f"v must be on the device of x ({x.device}), got {v.device}: move it with v.to(x.device)."
        )
    if v.shape == x.shape:
        v = v.unsqueeze(0)
    elif v.shape[1:] != x.shape or v.dim() != x.dim() + 1:
        raise ValueError(
            f"v must have the shape of x {tuple(x.shape)} or [K, *x.shape] for K directions, got {tuple(v.shape)}."
        )
    if v.shape[0] == 0:
        raise ValueError("v must hold at least one direction, got K = 0.")
    return v
