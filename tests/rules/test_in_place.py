"""Writes in place: to the argument of a function whose result torch saves, to views, and by every in-place method."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree
from rules import cases, cases_attention, cases_layers  # noqa: F401  the last two fill the table
from rules.cases import P, U, X, Y
from rules.check import check

from aajr_kernels import dual, is_dual
from aajr_kernels.rules.registry import RULES


def _gradients(case: cases.Case, k: int, written: bool) -> list[torch.Tensor]:
    """Of a random functional of the results; k = 0 for plain tensors. The arguments are `written` after the call."""
    generator = torch.Generator().manual_seed(3)
    noise = lambda *shape: torch.randn(shape, dtype=torch.float64, generator=generator)
    leaves, values, targets = [], [], []
    for place, x in enumerate(case.inputs):
        if not isinstance(x, torch.Tensor) or x.dtype != torch.float64:
            values.append(x)
            continue
        leaves.append(x.clone().requires_grad_())
        value = leaves[-1] * 1
        if place in case.duals:
            if k:
                leaves.append(noise(k, *x.shape).requires_grad_())
                value = dual(value, leaves[-1] * 1)
            targets.append(value)
        values.append(value)
    results = [
        y.stacked if is_dual(y) else y
        for y in pytree.tree_leaves(case.fn(*values), is_leaf=is_dual)
        if getattr(y, "is_floating_point", bool)()
    ]
    for target in targets if written else ():
        target.mul_(3.0)
    total = sum(((y * noise(*y.shape)).sum() + y.square().sum() for y in results), torch.zeros(()))
    grads = torch.autograd.grad(total, leaves, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g.nan_to_num() for g, x in zip(grads, leaves)]


def _same(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


@pytest.mark.filterwarnings("ignore")
def test_arguments_may_be_written_wherever_torch_allows_it() -> None:
    """Plain torch decides which: of those functions whose gradient is the same with and without the write."""
    allowed = []
    for index, case in enumerate(cases.CASES):
        if case.name.startswith("sdpa"):
            continue  # attention keeps its operands, as torch's fused attention does: both raise
        try:
            may = _same(_gradients(case, 0, False), _gradients(case, 0, True))
        except RuntimeError:  # torch saves the argument, or has no second derivative
            continue
        if not may:  # the result is a view of the argument
            continue
        k = 1 + index % 2
        assert _same(_gradients(case, k, False), _gradients(case, k, True)), case.name
        allowed.append(case.name)
    assert len(allowed) > 140


SAVED = {
    "exp": torch.exp,
    "exp2": torch.exp2,
    "expm1": torch.expm1,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "relu": torch.relu,
    "tan": torch.tan,
    "sqrt": torch.sqrt,
    "rsqrt": torch.rsqrt,
    "reciprocal": torch.reciprocal,
    "number / x": lambda x: 2.0 / x,
    "softmax": lambda x: x.softmax(-1),
    "log_softmax": lambda x: x.log_softmax(-1),
    "softmin": lambda x: torch.nn.functional.softmin(x, 0),
    "max": lambda x: x.max(0).values,
    "sort": lambda x: x.sort(-1).values,
    "dropout": lambda x: torch.nn.functional.dropout(x, 0.5, training=False) * 2,
}


def _row(x: Any) -> None:
    x[1] -= 0.5


def _column(x: Any) -> None:
    x[:, 0] += x[:, 1] * 2


def _every_other(x: Any) -> None:
    x[:, ::2] *= 1.7


def _by_mask(x: Any) -> None:
    x[Y > 0] = 0.3


def _from_itself(x: Any) -> None:
    x[:2].copy_(x[1:].tanh())


WRITES: dict[str, Callable[[Any], Any]] = {
    "x += 1": lambda x: x.add_(1.0),
    "x *= x": lambda x: x.mul_(x),
    "x[1] -= 0.5": _row,
    "x[:, 0] += x[:, 1] * 2": _column,
    "x[:, ::2] *= 1.7": _every_other,
    "x[mask] = 0.3": _by_mask,
    "x[:2] = tanh(x[1:])": _from_itself,
    "view": lambda x: x.view(4, 3).t().narrow(0, 1, 2).exp_(),
    "zero_": lambda x: x.zero_(),
    "addcmul_": lambda x: x.addcmul_(Y, Y, value=0.3),
}


@pytest.mark.parametrize("name", SAVED)
def test_a_write_after_a_function_whose_result_torch_saves(name: str) -> None:
    for k, write in zip((1, 2) * len(WRITES), WRITES.values()):

        def both(x: Any, write: Callable[[Any], Any] = write) -> Any:
            x = x * 1.0
            y = SAVED[name](x)
            write(x)
            return [y, x]

        check(both, ({"tan": X * 0.5, "sqrt": P, "rsqrt": P}.get(name, X),), k, upstream=False)


def _swish(x: Any) -> Any:
    x = x * 1.0
    return x.mul_(x.sigmoid())


@pytest.mark.parametrize("k", [1, 2])
def test_the_memory_saving_swish(k: int) -> None:
    check(_swish, (X,), k, upstream=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_fused_kernels_keep_their_argument_too(dtype: torch.dtype) -> None:
    for function in (torch.sigmoid, torch.tanh, torch.relu, lambda x: x.softmax(-1)):
        grads = []
        for written in (False, True):
            x, v = (t.to(dtype).requires_grad_() for t in (X, torch.stack([Y, P])))
            d = dual(x * 1, v * 1)
            y = function(d[:, 1:]), function(d)
            if written:
                d.add_(1.0)
            total = sum((z.stacked * z.stacked.detach()).sum() for z in y)
            grads.append(torch.autograd.grad(total, (x, v)))
        assert _same(*grads)


def test_the_copy_costs_nothing_without_a_write() -> None:
    x = torch.randn(5, 7, requires_grad=True)
    d = dual(x * 1, torch.randn(5, 7))
    torch.exp(d)
    assert torch._C._is_cow_tensor(d.stacked)  # shares its memory with what exp keeps


#: in-place methods of torch that take no other argument, or those given here -> arguments
ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "add_": (Y,), "sub_": (Y,), "subtract_": (Y,), "mul_": (Y,), "multiply_": (Y,), "div_": (P,), "divide_": (P,),
    "true_divide_": (P,), "pow_": (3,), "float_power_": (3,), "lerp_": (Y, 0.3), "addcmul_": (Y, P), "addcdiv_": (Y, P),
    "clamp_": (-0.4, 0.9), "clip_": (-0.4, 0.9), "clamp_min_": (0.4,), "clamp_max_": (0.4,), "remainder_": (P,),
    "fmod_": (P,), "floor_divide_": (P,), "atan2_": (P,), "arctan2_": (P,), "hypot_": (Y,), "xlogy_": (P,),
    "copysign_": (Y,), "nan_to_num_": (), "masked_fill_": (Y > 0, 0.3), "masked_scatter_": (Y > 0, P),
    "index_fill_": (0, torch.tensor([2, 0]), 0.3), "index_add_": (0, torch.tensor([2, 0]), Y[:2]),
    "index_copy_": (0, torch.tensor([2, 0]), Y[:2]), "index_put_": ((torch.tensor([2, 0]),), Y[:2]),
    "scatter_": (0, torch.tensor([[2, 0, 1, 1]]), Y), "scatter_add_": (0, torch.tensor([[2, 0, 1, 1]]), Y),
    "cumsum_": (-1,), "cumprod_": (-1,), "tril_": (), "triu_": (), "copy_": (Y,), "fill_": (0.3,), "logit_": (0.1,),
    "renorm_": (2, 0, 0.5), "ldexp_": (torch.tensor([1, 2, 0, 1]),), "__iadd__": (Y,), "__isub__": (Y,),
    "__imul__": (Y,), "__itruediv__": (P,), "__ifloordiv__": (P,), "__imod__": (P,), "__ipow__": (3,),
}  # fmt: skip
UNARY = """abs absolute arccosh acosh arctan atan arcsinh asinh cos cosh deg2rad digamma erf erfc erfinv exp exp2 expm1
frac i0 lgamma log log10 log1p log2 neg negative rad2deg reciprocal relu rsqrt sigmoid sign sgn sin sinc sinh sqrt
square tan tanh trunc fix floor ceil round""".split()
#: constant: the tangent is zero
STEPS = {f"{name}_" for name in "sign sgn trunc fix floor ceil round floor_divide fill zero".split()}
STEPS |= {"__ifloordiv__"}


@pytest.mark.parametrize("name", [*ARGUMENTS, *(f"{name}_" for name in UNARY)])
def test_every_in_place_form_writes_through_a_view(name: str) -> None:
    assert getattr(torch.Tensor, name) in RULES
    base = X if name in ARGUMENTS else U + (name == "acosh_" or name == "arccosh_")

    def through(x: Any) -> Any:
        x = x * 1.0
        kept = x.exp()
        getattr(x.view(-1).view(3, 4), name)(*ARGUMENTS.get(name, ()))
        return [kept, x]

    check(through, (base,), 2 if name < "i" else 1, upstream=False)
