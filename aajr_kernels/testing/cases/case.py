"""A case: one computation by our op, by a formula, and as a model would compute it; and what is compared.

Inputs that carry tangents are stacks ``[1 + K, *shape]``, those without are ``[1, *shape]`` and enter the operation as
plain tensors. The cotangent is random on primal and tangents alike, so that both paths are seen.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...dual import Dual
from .. import budgets

Stacks = Sequence[Tensor]
Run = Callable[[Stacks, Stacks], Tensor]


# -- tensors --------------------------------------------------------------------------------------------------------
def stacks(*shape: int, k: int = 1, scale: float = 1.0) -> Tensor:
    """A random float64 primal with k tangents."""
    return scale * torch.randn(1 + k, *shape, dtype=torch.float64)


def entered(stack: Tensor) -> Any:
    """A stack as the operation takes it: a Dual, or a plain tensor where it has no tangents."""
    return Dual(stack) if stack.shape[0] > 1 else stack[0]


def dense(x: Tensor) -> Tensor:
    return x.contiguous()


def gap(x: Tensor) -> Tensor:
    """The same numbers with unused memory after every row of the last axis, at an odd distance from the start."""
    shape = (x.numel() // max(x.shape[-1], 1), x.shape[-1] + 3)
    room = torch.full(shape, float("nan"), dtype=x.dtype, device=x.device)
    view = room.view(*x.shape[:-1], x.shape[-1] + 3)[..., 1 : 1 + x.shape[-1]]
    return view.copy_(x)


def swapped(x: Tensor) -> Tensor:
    """The same numbers with the last two axes before the last exchanged in memory, as heads cut out of rows are."""
    return x.transpose(-2, -3).contiguous().transpose(-2, -3) if x.dim() > 3 else x.contiguous()


def flipped(x: Tensor) -> Tensor:
    """The same numbers with the last two axes exchanged in memory: the last one is not dense."""
    return x.mT.contiguous().mT if x.dim() > 2 else x.contiguous()


def forward_mode(formula: Callable[..., Tensor], inputs: Stacks, params: Stacks) -> Tensor:
    """Stacked value and tangents of ``formula(*primals, *params)`` by one ``torch.func.jvp`` a tangent."""
    k = max(s.shape[0] for s in inputs) - 1
    moving = [i for i, s in enumerate(inputs) if s.shape[0] > 1]

    def of_moving(*values: Tensor) -> Tensor:
        primals = [s[0] for s in inputs]
        for i, value in zip(moving, values):
            primals[i] = value
        return formula(*primals, *params)

    point = tuple(inputs[i][0] for i in moving)
    directions = (tuple(inputs[i][1 + j] for i in moving) for j in range(k))
    results = [torch.func.jvp(of_moving, point, direction)[:2] for direction in directions]
    return torch.stack([results[0][0]] + [tangent for _, tangent in results])


# -- a case ---------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Case:
    """One computation.

    Attributes:
        op: package under aajr_kernels/ops; empty for a whole policy.
        name: unique within the op.
        public: the name under which users call it.
        leaves: names of the inputs and parameters.
        build: from K, float64 stacked inputs ``[1 | 1 + K, *shape]`` and parameters; all are leaves.
        ours: the op on stacks and parameters; its leading axis holds the primal and the tangents.
        exact: the same written out with elementary operations, differentiable.
        eager: as a model would compute it in a low dtype, where that differs from `exact`.
        layout: strides of the inputs.
        wide: parameters (by index) that stay float32 beside low inputs.
        rows: rows of the output compared apart: "primal" and tangents, "each" row, or the "first" and the rest.
        ulps: of the budget.
        large: takes long in Triton's interpreter.
    """

    op: str
    name: str
    public: str
    leaves: tuple[str, ...]
    build: Callable[[int], tuple[list[Tensor], list[Tensor]]]
    ours: Run
    exact: Run
    eager: Run | None = None
    layout: Callable[[Tensor], Tensor] = dense
    wide: tuple[int, ...] = ()
    rows: str = "primal"
    ulps: float = budgets.ULPS
    large: bool = False

    def __str__(self) -> str:
        return f"{self.op}:{self.name}"


def stacked(
    op: str,
    name: str,
    public: str,
    leaves: str,
    function: Callable[..., Any],
    formula: Callable[..., Tensor],
    build: Callable[[int], tuple[list[Tensor], list[Tensor]]],
    eager: Callable[..., Tensor] | None = None,
    **options: Any,
) -> Case:
    """A case of a function of Duals, checked against forward mode of a formula of plain tensors."""
    return Case(
        op,
        name,
        public,
        tuple(leaves.split()),
        build,
        lambda s, p: function(*(entered(t) for t in s), *p).stacked,
        lambda s, p: forward_mode(formula, s, p),
        None if eager is None else (lambda s, p: forward_mode(eager, s, p)),
        **options,
    )


# -- results --------------------------------------------------------------------------------------------------------
@dataclass
class Result:
    """Output and gradients of all leaves, inputs first; None for a leaf that needs none."""

    y: Tensor
    gradients: list[Tensor | None] = field(default_factory=list)


def outcome(
    run: Run,
    inputs: Stacks,
    params: Stacks,
    cotangent: Tensor | None,
    layout: Any = dense,
    needed: Sequence[bool] | None = None,
) -> Result:
    """Result of `run` and the gradient of every leaf (that is `needed`), zero where it does not depend on one."""
    leaves = [layout(t.detach()) for t in inputs]
    weights = [t.detach().clone() for t in params]
    every = [*leaves, *weights]
    wanted = [t for i, t in enumerate(every) if needed is None or needed[i]]
    for t in wanted:
        t.requires_grad_()
    y = run(leaves, weights)
    if cotangent is None:
        return Result(y.detach())
    gradients = iter(torch.autograd.grad(y, wanted, cotangent.to(y.dtype), allow_unused=True))
    received = [next(gradients) if t.requires_grad else None for t in every]
    zeros = lambda t, g: torch.zeros_like(t) if g is None and t.requires_grad else g
    return Result(y.detach(), [zeros(t, g) for t, g in zip(every, received)])


@dataclass
class Problem:
    """A case at one dtype and K, with what is expected of it."""

    inputs: list[Tensor]
    params: list[Tensor]
    cotangent: Tensor
    exact: Result
    eager: Result


@functools.lru_cache(maxsize=4)  # the targets of one problem follow each other
def problem(case: Case, k: int, dtype: torch.dtype, seed: int = 0) -> Problem:
    """The tensors of a case, the same for a seed whatever else is drawn, its float64 result and the eager one."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(zlib.crc32(f"{case} {k}".encode()) + seed)
        inputs, params = case.build(k)
        inputs = [t.to(dtype) for t in inputs]
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        params = [t.to(wide if i in case.wide else dtype) for i, t in enumerate(params)]
        wide_inputs, wide_params = [t.double() for t in inputs], [t.double() for t in params]
        cotangent = torch.randn(case.exact(wide_inputs, wide_params).shape, dtype=torch.float64).to(dtype)
    exact = outcome(case.exact, wide_inputs, wide_params, cotangent.double())
    eager = exact if dtype == torch.float64 else outcome(case.eager or case.exact, inputs, params, cotangent)
    return Problem(inputs, params, cotangent, exact, eager)


def on_device(case: Case, p: Problem, device: str, needed: Sequence[bool] | None = None) -> Result:
    """Ours, on the chosen backend, with gradients of all leaves or of those that are `needed`."""
    inputs, params = ([t.to(device) for t in ts] for ts in (p.inputs, p.params))
    layout = lambda x: case.layout(x.to(device))
    return outcome(case.ours, inputs, params, p.cotangent.to(device), layout, needed)


def errors(case: Case, p: Problem, got: Result) -> Iterator[tuple[str, budgets.Error]]:
    """Of outputs and gradients, by name, cut where a large part would hide the error of a small one."""
    is_exact = p.eager is p.exact  # in float64

    def error(floor: float, ours: Tensor, eager: Tensor, exact: Tensor) -> budgets.Error:
        return budgets.error_of(ours, exact, None if is_exact else eager, ulps=case.ulps, floor=floor)

    for label, of in _parts(case.rows, got.y.shape[0]):
        yield f"output{label}", error(0.0, of(got.y), of(p.eager.y), of(p.exact.y))
    floors = budgets.gradient_floors(dict(zip(case.leaves, p.exact.gradients)))
    gradients = zip(case.leaves, got.gradients, p.eager.gradients, p.exact.gradients)
    for i, (name, ours, *others) in enumerate(gradients):
        if ours is None:
            continue
        gs = [ours, *(g for g in others if g is not None)]
        is_stack = i < len(p.inputs) and case.rows != "each"
        for label, of in _parts("primal", ours.shape[0]) if is_stack else [("", torch.detach)]:
            yield f"gradient of {name}{label}", error(floors[name], *map(of, gs))


def _parts(rows: str, count: int) -> Iterator[tuple[str, Callable[[Tensor], Tensor]]]:
    if rows == "each":
        yield from ((f", row {i}", functools.partial(Tensor.select, dim=0, index=i)) for i in range(count))
        return
    names = (", primal", ", tangents") if rows == "primal" else (", penalty", ", task")
    yield names[0], lambda x: x[0]
    if count > 1:
        yield names[1], lambda x: x[1:]
