"""Rules that reduce or normalise along axes: sums, moments, extrema, norms, scans and the softmax family."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from ..backends.errors import UnsupportedOperation
from ..ops.sensitivity import softmax
from .common import Dual, as_now, axes, axis, is_dual, join, once_rounded, recast, split, vector
from .registry import rule


def _dims(x: Dual, dim: Any) -> list[int]:
    """The stacked axes a reduction acts on: all but the stack axis for None or an empty list."""
    if dim is None or (isinstance(dim, (tuple, list)) and len(dim) == 0):
        return list(range(1, x.dim() + 1))
    return axes(x, dim)


# -- sums and moments -------------------------------------------------------------------------------------------------


def _linear(name: str) -> Callable[..., Any]:
    def reduce(x: Dual, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Any:
        dims = _dims(x, dim)
        return recast(
            getattr(x.stacked, name)(dims, keepdim, dtype=dtype) if dims else x.stacked.to(dtype or x.dtype)
        )

    return vector(reduce)


for _name in ("sum", "mean"):
    rule(_name)(_linear(_name))


@rule("cumsum")
@vector
def _cumsum(x: Dual, dim: int, *, dtype: Any = None) -> Any:
    return recast(x.stacked.cumsum(axis(x, dim), dtype=dtype))


def _variance(x: Dual, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Dual, list[int], bool]:
    """Variance and its tangent 2 Σ (x − m)(ẋ − ṁ) / (n − correction), axes kept; arguments of torch.var in any form.

    The x − m add up to zero but for the rounding of m, which would count as often as ṁ is large: ẋ is centred as well.
    """
    if args and isinstance(args[0], bool):
        args = (None, *args)
    options = dict(zip(("dim", "unbiased", "keepdim"), args)) | kwargs
    correction = options.get("correction") if options.get("unbiased") is None else int(options["unbiased"])
    correction = 1 if correction is None else correction
    dims = _dims(x, options.get("dim"))
    count = math.prod(x.stacked.shape[d] for d in dims)
    primal, tangents = split(x)
    centred, along = (t - t.mean(dims, keepdim=True) if dims else t - t for t in (primal, tangents))
    scale = 1.0 / max(count - correction, 0) if count > correction else float("inf")
    primal = centred.square().sum(dims, keepdim=True) * scale
    tangent = (centred * along).sum(dims, keepdim=True) * (2 * scale)
    return join(primal, tangent), dims, options.get("keepdim", False)


def _dropped(x: Dual, dims: list[int], keepdim: bool) -> Dual:
    return x if keepdim or not dims else Dual(x.stacked.squeeze(dims))


def _deviation(variance: Dual) -> Dual:
    """The root of a variance. Where that is zero the derivative is 0, torch's choice as well."""
    primal, tangents = split(variance)
    constant = primal == 0
    root = torch.where(constant, 1.0, primal).sqrt()
    return join(torch.where(constant, 0.0, root), torch.where(constant, 0.0, tangents / (2 * root)))


def _moment(name: str) -> None:
    """var, std, var_mean and std_mean."""

    @rule(name)
    @vector
    @once_rounded
    def moment(x: Dual, *args: Any, **kwargs: Any) -> Any:
        variance, dims, keepdim = _variance(x, args, kwargs)
        moment = _dropped(_deviation(variance) if name.startswith("std") else variance, dims, keepdim)
        return (moment, Dual(x.stacked.mean(dims, keepdim))) if name.endswith("mean") else moment


for _name in ("var", "std", "var_mean", "std_mean"):
    _moment(_name)


@rule("prod")
@vector
@once_rounded
def _prod(x: Dual, dim: int | None = None, keepdim: bool = False) -> Dual:
    """Σ_i ẋ_i Π_{j≠i} x_j with exclusive products from both sides, exact at zeros."""
    if dim is None:
        return _prod(x.reshape(-1), 0).reshape(tuple(1 for _ in x.shape) if keepdim else ())
    primal, tangents = split(x)
    d = axis(x, dim)
    n = primal.shape[d]
    if n == 0:
        return join(primal.prod(d, keepdim), tangents.sum(d, keepdim))
    ones = torch.ones_like(primal.narrow(d, 0, 1))
    before = torch.cat([ones, primal.narrow(d, 0, n - 1)], d).cumprod(d)
    after = torch.cat([primal.narrow(d, 1, n - 1), ones], d).flip(d).cumprod(d).flip(d)
    return join(primal.prod(d, keepdim), (tangents * (before * after)).sum(d, keepdim))


@rule("cumprod")
@vector
@once_rounded
def _cumprod(x: Dual, dim: int) -> Dual:
    """Products of Duals at doubling distance: no division, so exact at zeros, where torch's own gradient is NaN."""
    step, size = 1, x.shape[dim]
    while step < size:
        later = x.narrow(dim, step, size - step) * x.narrow(dim, 0, size - step)
        x = torch.cat([x.narrow(dim, 0, step), later], dim)  # type: ignore[assignment]
        step *= 2
    return x


# -- extrema ----------------------------------------------------------------------------------------------------------


def _extremum(name: str, shared: Callable[[Any], Any], pairwise: Callable[[Any, Any], Any]) -> None:
    """max and min: of all values `shared` by ties, along an axis, or of two operands."""
    function = getattr(torch, name)
    named = getattr(torch.return_types, name)

    def rule_(x: Any, dim: Any = None, keepdim: bool = False) -> Any:
        if dim is None:
            return shared(x)
        if not isinstance(dim, int):
            return pairwise(x, dim)
        axis(x, dim)
        if x.dim() == 0:
            return named((x, torch.zeros((), dtype=torch.long, device=x.device)))
        index = function(x.primal.detach(), dim, True).indices
        values = as_now(x).gather(dim, index)
        if not keepdim:
            values, index = values.squeeze(dim), index.squeeze(dim)
        return named((values, index))

    rule(name)(rule_)


def _shared_extremum(name: str) -> Callable[..., Dual]:
    """amax and amin share the derivative evenly among ties."""

    @rule(name)
    @vector
    @once_rounded
    def reduce(x: Dual, dim: Any = None, keepdim: bool = False) -> Dual:
        dims = _dims(x, dim)
        primal, tangents = split(x)
        out = getattr(primal, name)(dims, keepdim=True)
        ties = (primal == out).to(primal.dtype)
        tangent = (tangents * ties).sum(dims, keepdim=True) / ties.sum(dims, keepdim=True)
        return _dropped(join(out, tangent), dims, keepdim)

    return reduce


_amax, _amin = _shared_extremum("amax"), _shared_extremum("amin")
_extremum("max", _amax, torch.maximum)
_extremum("min", _amin, torch.minimum)


@rule("aminmax")
def _aminmax(x: Dual, *, dim: int | None = None, keepdim: bool = False) -> Any:
    if dim is not None:
        axis(x, dim)
    values: Any = (_amin(x, dim, keepdim), _amax(x, dim, keepdim))
    return torch.return_types.aminmax(values)


def _ordered(name: str) -> None:
    """topk, sort, kthvalue, median, mode, cummax, cummin: values are gathered where the primal puts the index."""
    function = getattr(torch, name)

    def rule_(x: Dual, *args: Any, **kwargs: Any) -> Any:
        result = function(x.primal.detach(), *args, **kwargs)
        if isinstance(result, torch.Tensor):  # median without an axis
            flat = x.reshape(-1)
            if not flat.numel():
                return flat.sum() * float("nan")
            return flat[flat.primal.detach().argsort(stable=True)[(flat.numel() - 1) // 2]]
        place = 1 if name in ("topk", "kthvalue") else 0
        dim = kwargs.get("dim", args[place] if len(args) > place else -1)
        index = result.indices
        if x.dim() == 0:
            return type(result)((x, index))
        squeezed = index.dim() < x.dim()
        values = as_now(x).gather(dim, index.unsqueeze(dim) if squeezed else index)
        return type(result)((values.squeeze(dim) if squeezed else values, index))

    rule(name)(rule_)


for _name in ("topk", "sort", "kthvalue", "median", "cummax", "cummin"):
    _ordered(_name)
rule("msort")(lambda x: torch.sort(x, dim=0).values)

# -- norms ------------------------------------------------------------------------------------------------------------


@vector
@once_rounded
def _vector_norm(x: Dual, p: float, dim: Any, keepdim: bool) -> Dual:
    """At a zero vector the derivative is 0, torch's choice as well."""
    dims = _dims(x, dim)
    if p == float("inf") or p == float("-inf"):
        return (_amax if p > 0 else _amin)(x.abs(), dim, keepdim)
    primal, tangents = split(x)
    out = torch.linalg.vector_norm(primal, p, dims, keepdim=True)
    if p == 0:  # a count
        weight = torch.zeros_like(primal)
    elif p == 1:
        weight = primal.sign()
    elif p == 2:
        weight = primal / torch.where(out == 0, 1.0, out)
    else:
        nonzero = torch.where(primal == 0, 1.0, primal)
        power = torch.where(primal == 0, 0.0, nonzero.abs().pow(p - 1) * nonzero.sign())
        weight = power / torch.where(out == 0, 1.0, out).pow(p - 1)
    return _dropped(join(out, (weight * tangents).sum(dims, keepdim=True)), dims, keepdim)


@rule("norm", torch.linalg.vector_norm)
def _norm(
    x: Dual, p: Any = 2, dim: Any = None, keepdim: bool = False, dtype: Any = None, **kwargs: Any
) -> Dual:
    p = kwargs.get("ord", p)
    p = 2 if p is None or p == "fro" else p
    if p == "nuc":
        return torch.linalg.matrix_norm(x, p, dim or (-2, -1), keepdim, dtype=dtype)
    if not isinstance(p, (int, float)):
        raise UnsupportedOperation(f"norm of order {p!r} has no rule for a Dual: use a vector norm.")
    if dtype is not None and torch.promote_types(x.dtype, dtype) != dtype:
        raise ValueError(
            f"dtype of a norm must hold that of its input ({x.dtype}), got {dtype}: cast the result with .to()."
        )
    return _vector_norm(x, p, dim, keepdim, dtype=dtype)


@rule(torch.linalg.norm)
def _linalg_norm(
    x: Dual, ord: Any = None, dim: Any = None, keepdim: bool = False, *, dtype: Any = None
) -> Dual:
    """A matrix norm where an order meets two axes, a vector norm otherwise."""
    if ord is not None and dim is None and x.dim() not in (1, 2):
        raise ValueError(
            f"dim of linalg.norm must be given with ord={ord!r} unless x has one or two axes, got shape "
            f"{tuple(x.shape)}."
        )
    if isinstance(dim, (tuple, list)) and len(dim) not in (1, 2):
        raise ValueError(f"dim of linalg.norm must name one or two axes, got {dim}: use linalg.vector_norm.")
    matrix = x.dim() == 2 if dim is None else isinstance(dim, (tuple, list)) and len(dim) == 2
    if matrix and ord not in (None, "fro"):
        return torch.linalg.matrix_norm(x, ord, dim or (-2, -1), keepdim, dtype=dtype)
    return _norm(x, ord, dim, keepdim, dtype=dtype)


# -- softmax family ---------------------------------------------------------------------------------------------------


def _softmax_axis(x: Dual, dim: int | None) -> int:
    if dim is None:  # torch's legacy choice for F.softmax without dim
        dim = 0 if x.dim() in (0, 1, 3) else 1
    return axis(x, dim)


@vector
def _softmax_of(x: Dual, dim: int | None, dtype: Any = None) -> Dual:
    return softmax(x if dtype is None else x.to(dtype), _softmax_axis(x, dim) - 1)


@vector
@once_rounded
def _log_softmax_of(x: Dual, dim: int | None) -> Dual:
    """ẋ − Σ p ẋ."""
    d = _softmax_axis(x, dim)
    primal, tangents = split(as_now(x))
    out = primal.log_softmax(d)
    return join(out, tangents - (out.exp() * tangents).sum(d, keepdim=True))


for _name, _function, _kind in (("softmax", _softmax_of, "op"), ("log_softmax", _log_softmax_of, "torch")):
    rule(_name, kind=_kind)(lambda x, dim=None, dtype=None, _f=_function, **kwargs: _f(x, dim, dtype=dtype))
    rule(getattr(F, _name), kind=_kind)(
        lambda x, dim=None, _stacklevel=3, dtype=None, _f=_function: _f(x, dim, dtype=dtype)
    )
rule(F.softmin, kind="op")(lambda x, dim=None, _stacklevel=3, dtype=None: _softmax_of(-x, dim, dtype))


def _shares(exponents: torch.Tensor, total: torch.Tensor, dims: Any) -> torch.Tensor:
    """The weights of a logsumexp: e^(x − y) over its own sum, since e^y is only as right as the rounded y = `total`.

    A row of only −inf has weight 0 everywhere.
    """
    powers = (exponents - torch.where(torch.isinf(total), 0.0, total).detach()).exp()
    sums = powers.sum(dims, keepdim=True)
    return powers / torch.where(sums == 0, 1.0, sums)


@rule("logsumexp")
@vector
@once_rounded
def _logsumexp(x: Dual, dim: Any = None, keepdim: bool = False) -> Dual:
    dims = _dims(x, dim)
    primal, tangents = split(x)
    out = primal.logsumexp(dims, keepdim=True)
    weight = _shares(primal, out, dims)
    return _dropped(join(out, (weight * tangents).sum(dims, keepdim=True)), dims, keepdim)


@rule("logcumsumexp")
@vector
@once_rounded
def _scan_logsumexp(x: Dual, dim: int) -> Dual:
    """Σ_{j ≤ i} e^(x_j − y_i) ẋ_j by a matrix of weights: a running sum of e^x ẋ would underflow before a late peak."""
    d = axis(x, dim)
    primal, tangents = (part.movedim(d, -1) for part in split(x))
    out = primal.logcumsumexp(-1)
    n = primal.shape[-1]
    later = torch.ones(n, n, dtype=torch.bool, device=out.device).triu(1)
    exponents = primal.unsqueeze(-2).expand(*primal.shape, n).masked_fill(later, float("-inf"))
    weights = _shares(exponents, out.unsqueeze(-1), -1)
    tangent = (weights @ tangents.unsqueeze(-1)).squeeze(-1)
    return join(out.movedim(-1, d), tangent.movedim(-1, d))


@rule("dist")
@once_rounded
def _dist(a: Any, b: Any, p: float = 2) -> Any:
    return torch.linalg.vector_norm((a - b) if is_dual(a) else -(b - a), p)
