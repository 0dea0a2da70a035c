"""Running the cases: every output and every gradient of an op against the oracle, per dtype and backend."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from ..backends import choice
from ..backends.errors import BackendUnavailable
from ..coverage import coverage
from .cases import OPS
from .cases.case import Case, Problem, errors, on_device, problem
from .targets import DTYPES, Target


@dataclass
class Row:
    """Results of one op in one dtype on one backend.

    Attributes:
        cases: how many ran.
        worst_error: largest relative error of an output or gradient.
        budget_share: largest error over what was allowed; above 1 is a failure.
        worst: where that share was used.
        failures: one sentence per output or gradient that failed, or per case that raised.
        skipped: cases that the backend refused, with its reasons.
    """

    op: str
    dtype: str
    backend: str
    device: str
    cases: int = 0
    worst_error: float = 0.0
    budget_share: float = 0.0
    worst: str = ""
    failures: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)

    @property
    def result(self) -> str:
        """``"fail"``, ``"pass"``, or ``"skipped"`` where the backend refused every case."""
        return "fail" if self.failures else "pass" if self.cases else "skipped"


def validate_all(
    ops: Sequence[str],
    plan: Mapping[str, Sequence[Target]],
    seed: int,
    advance: Callable[[str, str], None] = lambda op, dtype: None,
) -> list[Row]:
    """A row per op, dtype and target, in that order.

    Args:
        ops: names in :data:`OPS`.
        plan: targets by dtype, names in :data:`DTYPES`.
        seed: of all random numbers.
        advance: called with op and dtype before each of them is checked.
    """
    rows = []
    for op in ops:
        for dtype, targets in plan.items():
            advance(op, dtype)
            rows += _validate(op, dtype, targets, seed)
    return rows


def _validate(op: str, dtype: str, targets: Sequence[Target], seed: int) -> list[Row]:
    rows = [Row(op, dtype, target.backend, target.device) for target in targets]
    for number, case in enumerate(OPS[op]):
        k = 3 if number % 2 else 1
        with _one_thread():
            expected = problem(case, k, DTYPES[dtype], seed)
        for row in rows:
            _check(case, f"{case.name}, K={k}", expected, row)
    return rows


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """PyTorch gains nothing from threads on problems this small, and loses much on a busy machine.

    Kernels of our own keep theirs: how they share their work is part of what is tested.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _check(case: Case, label: str, expected: Problem, row: Row) -> None:
    """Run one case on one backend and add its result to the row."""
    try:
        threads = _one_thread() if row.backend == "reference" else contextlib.nullcontext()
        with threads, choice.use_backend(row.backend), coverage() as seen:
            result = on_device(case, expected, row.device)
    except BackendUnavailable as refusal:
        if row.backend == "reference":  # which computes everything
            row.failures.append(f"{label}: {refusal}")
        else:
            row.skipped.append(f"{label}: {refusal}")
        return
    except Exception as raised:  # this op has failed, the others are still to be checked
        row.cases += 1
        row.budget_share = row.worst_error = math.inf
        row.failures.append(f"{label}: {type(raised).__name__}: {str(raised).strip() or 'no message'}")
        return
    ran = {backend for _, backend in seen.entries if backend in choice.BACKENDS}
    if row.backend == "cuda" and "cuda" not in ran:  # it leaves such operations to others
        row.skipped.append(f"{label}: cuda has no kernels for it")
        return
    row.cases += 1
    if ran != {row.backend}:
        row.failures.append(f"{label}: ran on {' and '.join(sorted(ran)) or 'nothing'}, not {row.backend}.")
    for name, error in errors(case, expected, result):
        row.worst_error = max(row.worst_error, error.relative)
        if error.share >= row.budget_share:
            row.budget_share, row.worst = error.share, f"{label}: {name}"
        if error.reason:
            row.failures.append(f"{label}: {name}: {error.reason}.")
