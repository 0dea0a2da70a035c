"""Record of operations: backend, number of calls, share of the arithmetic.

Operations and rules report here; :func:`coverage` blocks listen. Code that torch.compile traces reports once, while it
is traced: the compiled code has no time for it, and its arithmetic, which may have symbols for lengths, is not counted.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from .torch_private import mark_constant as constant

__all__ = ["Coverage", "coverage", "function_name", "record", "record_unsupported", "recording"]


@dataclass(eq=False)
class Coverage:
    """Operations recorded inside a :func:`coverage` block.

    Attributes:
        entries: ``(op, backend) -> [count, flops]``. Backends are ``reference``, ``native``, ``triton`` for our own
            ops, ``torch`` for rules made of torch functions, ``view`` for those that move no arithmetic, and
            ``fallback`` for the generic one. Flops count forward multiplications and additions.
        unsupported: names of the functions that raised :class:`UnsupportedOperation`.
    """

    entries: dict[tuple[str, str], list[float]] = field(default_factory=dict)
    unsupported: list[str] = field(default_factory=list)

    def add(self, op: str, backend: str, flops: float) -> None:
        entry = self.entries.setdefault((op, backend), [0, 0.0])
        entry[0] += 1
        entry[1] += flops

    @property
    def fallbacks(self) -> list[str]:
        """Names of the operations that went to the generic fallback."""
        return sorted(op for op, backend in self.entries if backend == "fallback")

    def rows(self) -> list[tuple[str, str, int, float]]:
        """(op, backend, count, share of the arithmetic in [0, 1]), largest share first."""
        total = sum(flops for _, flops in self.entries.values()) or 1.0
        rows = [(op, backend, int(n), flops / total) for (op, backend), (n, flops) in self.entries.items()]
        return sorted(rows, key=lambda row: (-row[3], row[0]))

    def share(self, *names: str) -> float:
        """Share of the arithmetic that ran on the named backends."""
        return sum(share for _, backend, _, share in self.rows() if backend in names)

    def __str__(self) -> str:
        lines = [f"{'op':32} {'backend':10} {'count':>6} {'share':>7}"]
        lines += [f"{op:32} {backend:10} {n:6d} {share:7.1%}" for op, backend, n, share in self.rows()]
        lines += [f"{name:32} unsupported" for name in self.unsupported]
        return "\n".join(lines)


_coverage: list[Coverage] = []


@contextlib.contextmanager
def coverage() -> Iterator[Coverage]:
    """Record which operation ran on which backend, how often, and its share of the forward arithmetic.

    Of compiled code it sees what is compiled inside the block, once and without its arithmetic: open it around the
    first call, or call ``torch.compiler.reset()`` before.

    Yields:
        Coverage: filled while the block runs; readable during and after it.
    """
    recorder = Coverage()
    _coverage.append(recorder)
    try:
        yield recorder
    finally:
        _coverage.remove(recorder)


@contextlib.contextmanager
def paused() -> Iterator[None]:
    """Inside, the open :func:`coverage` blocks hear nothing."""
    held, _coverage[:] = list(_coverage), []
    try:
        yield
    finally:
        _coverage[:] = held


def recording() -> bool:
    """Whether a :func:`coverage` block is open; lets callers skip the cost of counting."""
    return _is_open() if torch.compiler.is_compiling() else bool(_coverage)


@constant  # no guard: opening a block later compiles nothing again
def _is_open() -> bool:
    return bool(_coverage)


def record(op: str, backend: str, flops: float = 0.0) -> None:
    """Tell the open :func:`coverage` blocks that `op` ran on `backend`."""
    if torch.compiler.is_compiling():
        _record_traced(op, backend)
        return
    for recorder in _coverage:
        recorder.add(op, backend, flops)


@constant
def _record_traced(op: str, backend: str) -> None:
    for recorder in _coverage:
        recorder.add(op, backend, 0.0)


@constant
def record_unsupported(name: str) -> None:
    """Tell them that a function without a rule was called."""
    for recorder in _coverage:
        recorder.unsupported.append(name)


@constant
def function_name(func: Callable[..., Any]) -> str:
    """A readable name of a torch function: ``Tensor.add``, ``torch.cat``, ``F.layer_norm``."""
    name = getattr(func, "__name__", str(func))
    owner = getattr(func, "__objclass__", None)
    if owner is not None or getattr(torch.Tensor, name, None) is func:
        return f"Tensor.{name}"
    if getattr(torch.nn.functional, name, None) is func:
        return f"F.{name}"
    return f"torch.{name}"
