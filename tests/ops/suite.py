"""One suite for every backend: the form of a case, where it runs, and what is checked.

A case is written once (tests/ops/cases_*.py) and runs on every target: each backend, each CPU capability that runs
here, each dtype, one and three tangents. Outputs and all gradients are compared with float64, under the budgets of
aajr_kernels/testing/budgets.py. A new backend joins by its line in DEVICES.
"""

from __future__ import annotations

import contextlib
import functools
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from backends import cuda_host
from ops.op_checks import entered, forward_mode
from torch import Tensor

import aajr_kernels
from aajr_kernels.backends import choice
from aajr_kernels.backends import cpu as native
from aajr_kernels.coverage import coverage
from aajr_kernels.testing import budgets

PACKAGE = Path(aajr_kernels.__file__).parent
CSRC = PACKAGE.parent / "csrc"
#: backend -> the device its tensors live on; without a GPU, Triton's kernels run in its interpreter, and those in CUDA
#: C++ are compiled for the CPU
_GPU = "cuda" if torch.cuda.is_available() else "cpu"
DEVICES = {"reference": "cpu", "native": "cpu", "triton": _GPU, "cuda": _GPU}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

Stacks = Sequence[Tensor]
Run = Callable[[Stacks, Stacks], Tensor]


# ------------------------------------------------------------------------------------------------------- where
@dataclass(frozen=True)
class Target:
    """A backend and, for the native one, the CPU capability."""

    backend: str
    capability: str = ""

    def __str__(self) -> str:
        return f"{self.backend}-{self.capability}" if self.capability else self.backend

    @property
    def device(self) -> str:
        return DEVICES[self.backend]

    def why_not(self, op: str) -> str | None:
        """Why the op cannot run there, or None."""
        on_host = self.backend == "cuda" and self.device == "cpu"
        reason = cuda_host.why_not() if on_host else choice.backends()[self.backend]
        if reason is None and not choice._has_module(op, self.backend):
            reason = f"op {op!r} has no kernels there"
        return None if reason is None else f"{self.backend}: {reason}"

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Every operation inside the block runs there."""
        with contextlib.ExitStack() as stack:
            if self.backend == "cuda" and self.device == "cpu":
                stack.enter_context(cuda_host.loaded())
            stack.enter_context(choice.use_backend(self.backend))
            if not self.capability:
                yield
                return
            module = native.module()
            before = module.capability()
            module.set_capability(self.capability)
            try:
                yield
            finally:
                module.set_capability(before)


@functools.cache
def capabilities() -> tuple[str, ...]:
    """CPU capabilities that are built in and run here, emulated ones included; none without the native module."""
    if choice.backends()["native"] is not None:
        return ()
    return tuple(name for name, runs in native.module().capabilities() if runs)


def distinct(op: str = "") -> list[str]:
    """Capabilities under which the op (some op) may compute differently: AMX counts where there are files for it."""
    has_amx = any(CSRC.glob(f"cpu/{op}*_amx.cpp"))
    return [name for name in capabilities() if has_amx or not name.startswith("amx")]


def targets(op: str) -> list[Target]:
    """Every place where the op is tested."""
    native_ones = [Target("native", name) for name in distinct(op)] or [Target("native")]
    every = [Target(backend) for backend in DEVICES if backend != "native"] + native_ones
    # the one backend that is not for every op
    return [t for t in every if t.backend != "cuda" or (PACKAGE / "ops" / op / "cuda.py").exists()]


# -------------------------------------------------------------------------------------------------------- what
def dense(x: Tensor) -> Tensor:
    return x.contiguous()


def gap(x: Tensor) -> Tensor:
    """The same numbers with unused memory after every row of the last axis, at an odd distance from the start."""
    room = torch.full((x.numel() // max(x.shape[-1], 1), x.shape[-1] + 3), float("nan"), dtype=x.dtype)
    view = room.view(*x.shape[:-1], x.shape[-1] + 3)[..., 1 : 1 + x.shape[-1]]
    return view.copy_(x)


def swapped(x: Tensor) -> Tensor:
    """The same numbers with the last two axes before the last exchanged in memory, as heads cut out of rows are."""
    return x.transpose(-2, -3).contiguous().transpose(-2, -3) if x.dim() > 3 else x.contiguous()


def flipped(x: Tensor) -> Tensor:
    """The same numbers with the last two axes exchanged in memory: the last one is not dense."""
    return x.mT.contiguous().mT if x.dim() > 2 else x.contiguous()


@dataclass(frozen=True)
class Case:
    """One computation.

    Attributes:
        op: package under aajr_kernels/ops.
        name: unique within the op.
        build: from K, float64 stacked inputs ``[1 | 1 + K, *shape]`` and parameters; all are leaves.
        ours: the op on stacks and parameters; its leading axis holds the primal and the tangents.
        exact: the same written out with elementary operations, differentiable.
        eager: as a model would compute it in a low dtype, where that differs from `exact`.
        layout: strides of the inputs.
        wide: parameters (by index) that stay float32 beside low inputs.
        rows: what the rows of the output are: "primal" and tangents are compared apart, or every row "each".
    """

    op: str
    name: str
    build: Callable[[int], tuple[list[Tensor], list[Tensor]]]
    ours: Run
    exact: Run
    eager: Run | None = None
    layout: Callable[[Tensor], Tensor] = dense
    wide: tuple[int, ...] = ()
    rows: str = "primal"
    ulps: float = budgets.ULPS

    def __str__(self) -> str:
        return f"{self.op}:{self.name}"


def stacked(
    op: str,
    name: str,
    function: Callable[..., Any],
    formula: Callable[..., Tensor],
    build: Any,
    **options: Any,
) -> Case:
    """A case of a function of Duals, checked against forward mode of a formula of plain tensors."""
    eager = options.pop("eager", None)
    return Case(
        op,
        name,
        build,
        lambda s, p: function(*(entered(t) for t in s), *p).stacked,
        lambda s, p: forward_mode(formula, s, p),
        None if eager is None else (lambda s, p: forward_mode(eager, s, p)),
        **options,
    )


@dataclass
class Result:
    """Output and gradients of all leaves, inputs first."""

    y: Tensor
    gradients: list[Tensor] = field(default_factory=list)


def outcome(
    run: Run, inputs: Stacks, params: Stacks, cotangent: Tensor | None, layout: Any = dense
) -> Result:
    """Result of `run` and the gradient of every leaf, zero where it does not depend on one."""
    leaves = [layout(t.detach()).requires_grad_() for t in inputs]
    weights = [t.detach().clone().requires_grad_() for t in params]
    y = run(leaves, weights)
    if cotangent is None:
        return Result(y.detach())
    every = [*leaves, *weights]
    gradients = torch.autograd.grad(y, every, cotangent.to(y.dtype), allow_unused=True)
    return Result(y.detach(), [torch.zeros_like(t) if g is None else g for t, g in zip(every, gradients)])


@dataclass
class Problem:
    """A case at one dtype and K, with what is expected of it."""

    inputs: list[Tensor]
    params: list[Tensor]
    cotangent: Tensor
    exact: Result
    eager: Result


@functools.lru_cache(maxsize=4)  # the targets of one problem follow each other
def problem(case: Case, k: int, dtype: torch.dtype) -> Problem:
    torch.manual_seed(zlib.crc32(f"{case} {k}".encode()))
    inputs, params = case.build(k)
    inputs = [t.to(dtype) for t in inputs]
    params = [t.to(torch.float32 if i in case.wide else dtype) for i, t in enumerate(params)]
    wide_inputs, wide_params = [t.double() for t in inputs], [t.double() for t in params]
    cotangent = torch.randn(case.exact(wide_inputs, wide_params).shape, dtype=torch.float64).to(dtype)
    exact = outcome(case.exact, wide_inputs, wide_params, cotangent.double())
    eager = outcome(case.eager or case.exact, inputs, params, cotangent)
    return Problem(inputs, params, cotangent, exact, eager)


def parts(case: Case, name: str, x: Tensor, stack: bool) -> Iterator[tuple[str, Tensor]]:
    """What is compared by itself: a large primal must not hide its tangents."""
    if not stack:
        yield name, x
    elif case.rows == "each":
        yield from ((f"{name}, row {i}", row) for i, row in enumerate(x))
    else:
        yield f"{name}, primal", x[0]
        if x.shape[0] > 1:
            yield f"{name}, tangents", x[1:]


def check(case: Case, target: Target, k: int, dtype: torch.dtype) -> None:
    """Output and all gradients of the case on the target, within the budget."""
    p = problem(case, k, dtype)
    layout = lambda x: case.layout(x.to(target.device))
    with target.active(), coverage() as seen:
        inputs, params = ([t.to(target.device) for t in ts] for ts in (p.inputs, p.params))
        got = outcome(case.ours, inputs, params, p.cotangent.to(target.device), layout)
    assert {backend for _, backend in seen.entries} <= {target.backend, "view"}, str(seen)
    names = [f"gradient of input {i}" for i in range(len(inputs))]
    names += [f"gradient of parameter {i}" for i in range(len(params))]
    failures = []

    def compare(name: str, mine: Tensor, eager: Tensor, exact: Tensor, stack: bool, floor: float) -> None:
        parted = zip(*(parts(case, name, x, stack) for x in (mine.cpu(), eager, exact)))
        for (label, a), (_, b), (_, c) in parted:
            try:
                budgets.assert_within_budget(a, b, c, label, ulps=case.ulps, floor=floor)
            except AssertionError as failure:
                failures.append(str(failure))

    compare("output", got.y, p.eager.y, p.exact.y, True, 0.0)
    gradients = dict(zip(names, p.exact.gradients))
    for i, name in enumerate(names):
        leaf = (p.inputs + p.params)[i]
        assert got.gradients[i].dtype == leaf.dtype, f"{name} is {got.gradients[i].dtype}"
        floor = budgets.gradient_floor(gradients, gradients[name])
        is_stack = i < len(inputs) and case.rows == "primal"
        compare(name, got.gradients[i], p.eager.gradients[i], p.exact.gradients[i], is_stack, floor)
    assert not failures, "\n".join(failures)
