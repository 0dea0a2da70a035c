"""Rules of products: bilinear in their two arguments, one product over the stacked rows where one factor is plain."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from ..autocast import autocasting
from ..backends.errors import UnsupportedOperation
from ..coverage import record, recording
from ..ops.linear import linear
from .common import (
    Dual,
    align,
    any_low,
    is_dual,
    join,
    num_tangents,
    once_rounded,
    once_rounded_sum,
    primal_of,
    raised,
    summed,
)
from .registry import rule


def _count(name: str, out: torch.Tensor, inner: int, products: int) -> None:
    if recording():
        record(name, "torch", 2.0 * out.numel() * inner * products)


@rule("matmul", kind="op")
def _matmul(a: Any, b: Any) -> Any:
    """ȧ b + a ḃ, with torch's meaning of one-dimensional factors."""
    if b.dim() == 1 and (is_dual(b) or a.dim() == 1):
        return _matmul(a, b.unsqueeze(-1)).squeeze(-1)
    if a.dim() == 1 and (is_dual(a) or b.dim() > 2):
        return _matmul(a.unsqueeze(0), b).squeeze(-2)
    num_tangents(a, b)
    if not is_dual(a) and not is_dual(b):
        return torch.matmul(a, b)
    if not is_dual(b):
        return _product(a, b, torch.matmul)
    if not is_dual(a):
        return _product(b, a, lambda stacked, plain: torch.matmul(plain, stacked))
    n = max(a.dim(), b.dim())
    p, p_tan = align(a.stacked, n).split([1, a.num_tangents])
    q, q_tan = align(b.stacked, n).split([1, b.num_tangents])
    primal = torch.matmul(p, q)
    _count("torch.matmul", primal, a.shape[-1], 1 + 2 * p_tan.shape[0])
    return join(primal, torch.matmul(p_tan, q) + torch.matmul(p, q_tan))


def _product(x: Dual, plain: torch.Tensor, function: Callable[..., torch.Tensor]) -> Dual:
    result = function(align(x.stacked, plain.dim()), plain)
    _count("torch.matmul", result, x.shape[-1], 1)
    return Dual(result)


def _of_axes(name: str, left: int, right: int) -> Callable[..., Any]:
    """The product of factors with these numbers of axes; torch broadcasts them in matmul only."""

    def product(a: Any, b: Any, **kwargs: Any) -> Any:
        if (a.dim(), b.dim()) != (left, right):
            raise ValueError(
                f"{name} takes factors of {left} and {right} axes, got shapes {tuple(a.shape)} and {tuple(b.shape)}: "
                "use torch.matmul."
            )
        return _matmul(a, b, **kwargs)

    return product


for _name, _left, _right in (("mm", 2, 2), ("bmm", 3, 3), ("mv", 2, 1)):
    rule(_name, kind="op")(_of_axes(_name, _left, _right))
rule(torch.Tensor.__rmatmul__, kind="op")(lambda b, a: _matmul(a, b))


@rule(torch.Tensor.__matmul__, torch.Tensor.matmul, kind="op")
def _matmul_operator(a: Any, b: Any) -> Any:
    # Dynamo takes a first operand that is no Tensor for a number, swaps the two and calls Tensor.matmul(b, a)
    if not is_dual(a) and torch.compiler.is_compiling():
        raise UnsupportedOperation(
            "torch.compile swaps the operands of `@` between a Dual and a tensor: write torch.matmul(a, b)."
        )
    return _matmul(a, b)


@rule("dot", "vdot", kind="op")
def _dot(a: Any, b: Any) -> Any:
    if a.dim() != 1 or b.dim() != 1:
        raise ValueError(f"dot takes two vectors, got shapes {tuple(a.shape)} and {tuple(b.shape)}.")
    return _inner(a, b)


@rule("inner", kind="op")
def _inner(a: Any, b: Any) -> Any:
    if a.dim() == 0 or b.dim() == 0:
        return a * b
    result = torch.matmul(a, b.unsqueeze(0).mT if b.dim() == 1 else b.reshape(-1, b.shape[-1]).mT)
    return result.reshape((*a.shape[:-1], *b.shape[:-1]))


@rule("outer", "ger", kind="op")
def _outer(a: Any, b: Any) -> Any:
    if a.dim() != 1 or b.dim() != 1:
        raise ValueError(f"outer takes two vectors, got shapes {tuple(a.shape)} and {tuple(b.shape)}.")
    return a.unsqueeze(-1) * b.unsqueeze(0)


def _is_linear(bias: Any, a: Any, weight: Any) -> bool:
    """Whether ``addmm(bias, a, weight)`` is the linear layer of a Dual with plain parameters."""
    return (
        is_dual(a)
        and not a.is_complex()
        and not (is_dual(bias) or is_dual(weight))
        and (a.dim(), weight.dim(), bias.dim()) == (2, 2, 1)
        and a.shape[1] == weight.shape[0]
        and bias.shape[0] == weight.shape[1]
        and (a.dtype == weight.dtype == bias.dtype or autocasting(a.device.type))
    )


def _affine(name: str) -> Callable[..., Any]:
    """β x + α a b: torch's own fused sum of the primals; of tangents the products, slice by slice, added in float32."""
    function = getattr(torch, name)

    def affine(x: Any, a: Any, b: Any, *, beta: Any = 1, alpha: Any = 1) -> Any:
        if name == "addmm" and beta == 1 and alpha == 1 and _is_linear(x, a, b):
            return linear(a, b.t(), x)  # transformers' Conv1D
        if is_dual(beta) or is_dual(alpha):
            raise UnsupportedOperation(
                f"{name} takes numbers for beta and alpha, got a Dual: multiply before."
            )
        if x.numel() == 1 and any_low((x, a, b)):
            # its gradient sums the cotangents of all elements, which cancel to rounding errors
            return once_rounded(affine)(x, a, b, beta=beta, alpha=alpha)
        k = num_tangents(x, a, b)
        (x0, *x_tan), (a0, *a_tan), (b0, *b_tan) = (y.stacked if is_dual(y) else (y,) for y in (x, a, b))
        primal = function(x0, a0, b0, beta=beta, alpha=alpha)
        products = [(y, b0) for y in a_tan] + [(a0, y) for y in b_tan]
        # at beta = 0 torch ignores its first operand, be it NaN
        terms = [raised(function(x0, *pair, beta=0)) for pair in products]
        results = [primal]
        for i in range(k):
            total = sum(terms[i::k], torch.zeros((), dtype=primal.dtype, device=primal.device)) * alpha
            if x_tan and beta:
                total = total + raised(x_tan[i]) * beta
            results.append(total.expand(primal.shape).to(primal.dtype))
        inner = {"addr": 1, "addbmm": a0.shape[0] * a0.shape[-1]}.get(name, a0.shape[-1])
        _count(f"torch.{name}", primal, inner, 1 + len(terms))
        return Dual(torch.stack(results))

    return affine


for _name in ("addmm", "addmv", "baddbmm", "addbmm", "addr"):
    rule(_name, kind="op")(_affine(_name))


@rule("linear", kind="op")
def _linear(x: Any, weight: Any, bias: Any = None) -> Any:
    if is_dual(x) and not is_dual(weight) and not is_dual(bias) and not x.is_complex():
        return linear(x, weight, bias)
    k = num_tangents(x, weight, bias)
    x0, w0 = primal_of(x), primal_of(weight)
    primal = F.linear(x0, w0, primal_of(bias))
    if k == 0:
        return Dual(primal.unsqueeze(0))
    terms = [F.linear(x.tangents, w0)] if is_dual(x) else []
    if is_dual(weight):
        terms.append(torch.stack([F.linear(x0, part) for part in weight.tangents.unbind(0)]))
    if is_dual(bias):
        terms.append(align(bias.tangents, primal.dim()))
    _count("torch.linear", primal, x0.shape[-1], 1 + len(terms))
    return join(primal.unsqueeze(0), once_rounded_sum(terms, primal.dtype))


def bilinear(function: Callable[..., torch.Tensor]) -> Callable[..., Any]:
    """The rule of a function bilinear in its first two arguments, by the product rule, one tangent at a time."""

    def rule_(a: Any, b: Any, *args: Any, **kwargs: Any) -> Dual:
        k = num_tangents(a, b)
        a_parts = a.stacked.unbind(0) if is_dual(a) else (a,)
        b_parts = b.stacked.unbind(0) if is_dual(b) else (b,)
        results = [function(a_parts[0], b_parts[0], *args, **kwargs)]
        for i in range(1, k + 1):
            of_a = function(a_parts[i], b_parts[0], *args, **kwargs) if is_dual(a) else None
            of_b = function(a_parts[0], b_parts[i], *args, **kwargs) if is_dual(b) else None
            results.append(summed(of_a, of_b))
        _count(getattr(function, "__name__", "bilinear"), results[0], 1, 1 + k)
        return Dual(torch.stack(results))

    return rule_


for _name in ("kron", "tensordot"):
    rule(_name, kind="op")(bilinear(getattr(torch, _name)))
rule("cross", kind="op")(bilinear(torch.linalg.cross))


@rule(torch.cross, torch.Tensor.cross, kind="op")
def _cross(input: Any, other: Any, dim: int | None = None) -> Any:
    if dim is None:  # torch's legacy choice: the first axis of size 3
        dim = next((i for i, size in enumerate(input.shape) if size == 3), -1)
    return bilinear(torch.linalg.cross)(input, other, dim=dim)


@rule("einsum", kind="op")
def _einsum(equation: Any, *operands: Any) -> Any:
    """Multilinear: Σ over the factors of the product with that factor's tangent, one tangent at a time."""
    if not isinstance(equation, str):
        raise TypeError("einsum of a Dual takes its equation as a string: einsum('bij,jk->bik', x, w).")
    if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
        operands = tuple(operands[0])
    k = num_tangents(*operands)
    primals = [x.stacked[0] if is_dual(x) else x for x in operands]
    duals = [i for i, x in enumerate(operands) if is_dual(x)]
    out = torch.einsum(equation, *primals)
    tangents = []
    for i in range(1, k + 1):
        factors = ([*primals[:j], operands[j].stacked[i], *primals[j + 1 :]] for j in duals)
        tangents.append(summed(*(torch.einsum(equation, *f) for f in factors)))
    if recording():
        record(
            "torch.einsum", "torch", 2.0 * max(p.numel() for p in primals) * out.shape[-1:].numel() * (1 + k)
        )
    return Dual(torch.stack([out, *tangents]))


rule(torch.linalg.multi_dot, kind="op")(lambda matrices: functools.reduce(torch.matmul, matrices))
rule("chain_matmul", kind="op")(lambda *matrices: functools.reduce(torch.matmul, matrices))


@rule("bilinear", kind="op")
def _bilinear(x1: Any, x2: Any, weight: Any, bias: Any = None) -> Any:
    product = torch.einsum("...i,oij,...j->...o", x1, weight, x2)
    return product if bias is None else product + bias
