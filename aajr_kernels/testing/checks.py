"""Running the cases: every output and every gradient of an op against the oracle, per dtype and backend."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..backends import choice
from ..backends.errors import BackendUnavailable
from ..coverage import coverage
from ..dual import Dual
from . import budgets
from .cases import OPS
from .cases.case import Case, Draw, Outputs
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


@dataclass
class Leaves:
    """The arguments of a case in one dtype on one device."""

    tensors: dict[str, Tensor]
    tangents: dict[str, Tensor]
    constants: dict[str, Tensor]

    @classmethod
    def of(cls, case: Case, dtype: torch.dtype, device: str, wide: torch.dtype | None = None) -> Leaves:
        """Fresh leaves rounded to `dtype`, then held in `wide` (default: `dtype`)."""

        def place(t: Tensor) -> Tensor:
            t = t.to(dtype).to(wide or dtype) if t.is_floating_point() else t
            return t.to(device)

        def leaves(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {name: place(t).detach().clone().requires_grad_() for name, t in tensors.items()}

        constants = {name: place(t) for name, t in case.constants.items()}
        return cls(leaves(case.tensors), leaves(case.tangents), constants)

    def duals(self, strided: bool) -> dict[str, Any]:
        """Arguments of our op: Duals where there are tangents."""
        arguments: dict[str, Any] = {**self.tensors, **self.constants}
        for name, tangents in self.tangents.items():
            stacked = torch.cat([self.tensors[name].unsqueeze(0), tangents])
            if strided:
                stacked = stacked.transpose(-1, -2).contiguous().transpose(-1, -2)
            arguments[name] = Dual(stacked)
        return arguments

    def gradients(self, outputs: Outputs, cotangents: Mapping[str, Tensor]) -> dict[str, Tensor | None]:
        """Gradients of Σ ⟨cotangent, output⟩ for every leaf."""
        leaves = {f"gradient of {name}": t for name, t in self.tensors.items()}
        leaves |= {f"gradient of {name}'s tangents": t for name, t in self.tangents.items()}
        pairs = [(outputs[name], c) for name, c in cotangents.items() if outputs[name].requires_grad]
        if not pairs:
            return dict.fromkeys(leaves)
        grads = torch.autograd.grad(
            [y for y, _ in pairs],
            list(leaves.values()),
            [c.to(y.device, y.dtype) for y, c in pairs],
            allow_unused=True,
        )
        return dict(zip(leaves, grads))


@dataclass
class Truth:
    """The oracle's results for a case at its inputs rounded to a dtype, and the eager error that sets the budget."""

    outputs: Outputs
    gradients: dict[str, Tensor | None]
    cotangents: dict[str, Tensor]
    eager_outputs: Outputs
    eager_gradients: dict[str, Tensor | None]

    @classmethod
    def of(cls, case: Case, dtype: torch.dtype, device: str, draw: Draw) -> Truth:
        exact = Leaves.of(case, dtype, "cpu", torch.float64)
        outputs = case.oracle({**exact.tensors, **exact.constants}, exact.tangents)
        # rounded, so that all dtypes of an output receive the very same cotangent
        cotangents = {name: draw(*y.shape).to(dtype).double() for name, y in outputs.items()}
        gradients = exact.gradients(outputs, cotangents)
        if dtype == torch.float64:
            return cls(outputs, gradients, cotangents, {}, {})
        eager = Leaves.of(case, dtype, device)
        eager_outputs = case.oracle({**eager.tensors, **eager.constants}, eager.tangents)
        return cls(outputs, gradients, cotangents, eager_outputs, eager.gradients(eager_outputs, cotangents))


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
        problems = list(OPS[op](Draw(op, seed)))
        for dtype, targets in plan.items():
            advance(op, dtype)
            rows += _validate(op, problems, dtype, targets, seed)
    return rows


def _validate(
    op: str, problems: Sequence[Case], dtype: str, targets: Sequence[Target], seed: int
) -> list[Row]:
    rows = [Row(op, dtype, target.backend, target.device) for target in targets]
    for number, case in enumerate(problems):
        truths: dict[str, Truth] = {}
        for row in rows:
            if row.device not in truths:
                draw = Draw(f"{op} cotangents {number}", seed)
                with _one_thread():
                    truths[row.device] = Truth.of(case, DTYPES[dtype], row.device, draw)
            _check(case, truths[row.device], row)
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


def _check(case: Case, truth: Truth, row: Row) -> None:
    """Run one case on one backend and add what came of it to the row."""
    dtype = DTYPES[row.dtype]
    leaves = Leaves.of(case, dtype, row.device)
    try:
        threads = _one_thread() if row.backend == "reference" else contextlib.nullcontext()
        with threads, choice.use_backend(row.backend), coverage() as recorded:
            outputs = _named(case.ours(**leaves.duals(case.strided)))
            gradients = leaves.gradients(outputs, truth.cotangents)
    except BackendUnavailable as refusal:
        if row.backend == "reference":  # which computes everything
            row.failures.append(f"{case.label}: {refusal}")
        else:
            row.skipped.append(f"{case.label}: {refusal}")
        return
    except Exception as raised:  # this op has failed, the others are still to be checked
        row.cases += 1
        row.budget_share = row.worst_error = math.inf
        row.failures.append(f"{case.label}: {type(raised).__name__}: {str(raised).strip() or 'no message'}")
        return
    ran = {backend for _, backend in recorded.entries if backend in choice.BACKENDS}
    if row.backend == "cuda" and "cuda" not in ran:  # it leaves such operations to others
        row.skipped.append(f"{case.label}: cuda has no kernels for it")
        return
    row.cases += 1
    if ran != {row.backend}:
        row.failures.append(
            f"{case.label}: ran on {' and '.join(sorted(ran)) or 'nothing'}, not {row.backend}."
        )
    for name, exact in truth.outputs.items():
        error = budgets.error_of(outputs.get(name), truth.eager_outputs.get(name), exact, dtype)
        _compare(row, case, name, error)
    typical = budgets.typical_size(truth.gradients)
    for name, gradient in truth.gradients.items():
        leaf = name.removeprefix("gradient of ").removesuffix("'s tangents")
        share = budgets.VANISHING_FLOOR if leaf in case.vanishing else budgets.GRADIENT_FLOOR
        eager = truth.eager_gradients.get(name)
        _compare(row, case, name, budgets.error_of(gradients[name], eager, gradient, dtype, share * typical))


def _compare(row: Row, case: Case, name: str, error: budgets.Error) -> None:
    """Add the error of one tensor to the row."""
    row.worst_error = max(row.worst_error, error.relative)
    if error.share >= row.budget_share:
        row.budget_share, row.worst = error.share, f"{case.label}: {name}"
    if not error.share <= 1:
        what = (
            error.reason or f"relative error {error.relative:.1e} is {error.share:.3g} times what is allowed"
        )
        row.failures.append(f"{case.label}: {name}: {what}.")


def _named(result: Any) -> Outputs:
    if isinstance(result, Dual):
        return {"output": result.primal, "output's tangents": result.tangents}
    return dict(result)
