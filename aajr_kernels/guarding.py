"""What has to be in place before a Dual exists: patches of torch that make a lost derivative loud, and checks of torch.

The modules that own them (``rules/guards.py``, ``torch_check.py``) register them at import; the first ``dual()`` runs
them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from .operators import constant
from .runtime import UnsupportedOperation, unsupported
from .torch_private import separate_outputs

__all__ = ["COMPILED_GUARDS", "GUARDS", "guard_compiled", "install_guards"]

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
