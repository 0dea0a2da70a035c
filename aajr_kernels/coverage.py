"""Record of operations: backend, number of calls, share of the arithmetic, and what was left out of it.

Operations and rules report here; :func:`coverage` blocks listen. So do the streamed head, which leaves out tokens that
do not count, and a shared context, which leaves out positions that were computed before. Code that torch.compile traces
reports once, while it is traced: the compiled code has no time for it, and its arithmetic, which may have symbols for
lengths, is not counted.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from .torch_private import mark_constant as constant

__all__ = [
    "Coverage",
    "coverage",
    "function_name",
    "record",
    "record_computed",
    "record_unsupported",
    "recorded_in",
    "recording",
]

#: a number, or a tensor of one where only a device knows it; read when it is asked for
Number = float | torch.Tensor


@dataclass(eq=False)
class Coverage:
    """Operations recorded inside a :func:`coverage` block.

    Attributes:
        entries: ``(op, backend) -> [count, flops]``. Backends are ``reference``, ``native``, ``triton`` for our own
            ops, ``torch`` for rules made of torch functions, ``view`` for those that move no arithmetic, and
            ``fallback`` for the generic one. Flops count forward multiplications and additions.
        unsupported: names of the functions that raised :class:`UnsupportedOperation`.
        computed: ``[those that were computed, all]`` of the ``tokens`` of the streamed head, over its calls, and of the
            ``positions`` of forwards with a shared context, which is computed once. A part that did not occur is
            missing.
        skipped: forward multiplications and additions that these tokens and positions would have taken, modelled by
            count.
    """

    entries: dict[tuple[str, str], list[Any]] = field(default_factory=dict)
    unsupported: list[str] = field(default_factory=list)
    computed: dict[str, list[Any]] = field(default_factory=dict)
    skipped: Number = 0.0

    def add(self, op: str, backend: str, flops: Number) -> None:
        entry = self.entries.setdefault((op, backend), [0, 0.0])
        entry[0] += 1
        entry[1] += flops

    def add_computed(self, part: str, computed: Number, whole: float, skipped: Number) -> None:
        entry = self.computed.setdefault(part, [0, 0])
        entry[0] += computed
        entry[1] += whole
        self.skipped += skipped

    def flops(self, op: str | None = None) -> float:
        """Forward multiplications and additions of an op; None: of all."""
        return float(sum(flops for (name, _), (_, flops) in self.entries.items() if op in (None, name)))

    def count(self, op: str) -> int:
        """Calls of an op."""
        return int(sum(n for (name, _), (n, _) in self.entries.items() if name == op))

    def shares(self) -> dict[str, float]:
        """Share of every part that was computed, in [0, 1].

        ``tokens`` and ``positions`` as in :attr:`computed`, and with either ``arithmetic``: flops over flops and
        :attr:`skipped`.
        """
        shares = {part: float(n) / whole for part, (n, whole) in self.computed.items() if whole}
        if shares and (flops := self.flops()):
            shares["arithmetic"] = flops / (flops + float(self.skipped))
        return shares

    @property
    def fallbacks(self) -> list[str]:
        """Names of the operations that went to the generic fallback."""
        return sorted(op for op, backend in self.entries if backend == "fallback")

    def rows(self) -> list[tuple[str, str, int, float]]:
        """(op, backend, count, share of the arithmetic in [0, 1]), largest share first."""
        total = self.flops() or 1.0
        rows = [
            (op, backend, int(n), float(flops) / total) for (op, backend), (n, flops) in self.entries.items()
        ]
        return sorted(rows, key=lambda row: (-row[3], row[0]))

    def share(self, *names: str) -> float:
        """Share of the arithmetic that ran on the named backends."""
        return sum(share for _, backend, _, share in self.rows() if backend in names)

    def __str__(self) -> str:
        lines = [f"{'op':32} {'backend':10} {'count':>6} {'share':>7}"]
        lines += [f"{op:32} {backend:10} {n:6d} {share:7.1%}" for op, backend, n, share in self.rows()]
        lines += [f"{name:32} unsupported" for name in self.unsupported]
        if any(share < 1 for share in self.shares().values()):
            names = {
                "tokens": "of the tokens in the head",
                "positions": "of the positions around a shared context",
                "arithmetic": "of the forward arithmetic of all of them",
            }
            lines.append(
                "computed: " + ", ".join(f"{n:.1%} {names[part]}" for part, n in self.shares().items())
            )
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
    with recorded_in(recorder):
        yield recorder


@contextlib.contextmanager
def recorded_in(recorder: Coverage) -> Iterator[None]:
    """A :func:`coverage` block that goes on with a record."""
    _coverage.append(recorder)
    try:
        yield
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


def record(op: str, backend: str, flops: Number = 0.0) -> None:
    """Tell the open :func:`coverage` blocks that `op` ran on `backend`."""
    if torch.compiler.is_compiling():
        _record_traced(op, backend)
        return
    for recorder in _coverage:
        recorder.add(op, backend, flops)


def record_computed(part: str, computed: Number, whole: float, skipped: Number) -> None:
    """Tell them how many of the tokens or positions a call computes, and the forward flops that it leaves out."""
    for recorder in _coverage:
        recorder.add_computed(part, computed, whole, skipped)


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
