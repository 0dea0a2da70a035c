"""Rules of elementwise functions: arithmetic with broadcasting, unary mathematics, comparisons.

Each is one line of calculus, the partial derivative; autograd differentiates it once more for the gradient through
the tangent. At kinks and at a root of sqrt the conventions are torch's own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from ..torch_private import VERSION
from .common import (
    Dual,
    align,
    as_now,
    elementwise,
    is_dual,
    is_number,
    join,
    lift,
    ndim_of,
    num_tangents,
    once_rounded,
    parts,
    primal_of,
    settled,
    summed,
)
from .registry import functions_named, rule

# -- sums and products ------------------------------------------------------------------------------------------------


def _plus(a: Any, b: Any) -> Any:
    """a + b with the cheapest form for each mixture of Dual, tensor and number."""
    num_tangents(a, b)
    if not is_dual(a) and not is_dual(b):
        return a + b
    a, b = settled(a, b)
    n = ndim_of(a, b)
    if is_dual(a) and is_dual(b) and a.dim() and b.dim():
        return Dual(torch.add(align(a.stacked, n), align(b.stacked, n)))
    (p, p_tan), (q, q_tan) = parts(a, n), parts(b, n)
    primal = torch.add(p, q)
    return join(primal, summed(p_tan, q_tan))


@once_rounded
def _plus_product(a: Any, b: Any, c: Any) -> Any:
    """a + b c."""
    return _plus(a, _multiply(b, c))


rule("add", torch.Tensor.__add__, torch.Tensor.__radd__)(
    lambda a, b, *, alpha=1: _plus(a, b) if alpha == 1 else _plus_product(a, b, alpha)
)


@rule("sub", "subtract", torch.Tensor.__sub__)
def _sub(a: Any, b: Any, *, alpha: Any = 1) -> Any:
    if is_dual(a) and is_dual(b) and alpha == 1 and a.dim() and b.dim():
        num_tangents(a, b)
        n = ndim_of(a, b)
        return Dual(torch.sub(align(a.stacked, n), align(b.stacked, n)))
    return _plus_product(a, b, -alpha) if alpha != 1 else _plus(a, _multiply(b, -1))


rule("rsub", torch.Tensor.__rsub__)(lambda a, b, *, alpha=1: _sub(b, a, alpha=alpha))


@rule("mul", "multiply", torch.Tensor.__mul__, torch.Tensor.__rmul__)
def _multiply(a: Any, b: Any) -> Any:
    if not is_dual(a):
        a, b = b, a
    if not is_dual(a):
        return a * b
    if is_number(b):
        return Dual(a.stacked * b)
    a, b = settled(a, b)
    n = ndim_of(a, b)
    if not is_dual(b):
        return Dual(align(a.stacked, n) * b)
    num_tangents(a, b)
    (p, p_tan), (q, q_tan) = parts(a, n), parts(b, n)
    return join(p * q, p_tan * q + p * q_tan)


@rule("div", "divide", "true_divide", torch.Tensor.__truediv__)
def _div(a: Any, b: Any, *, rounding_mode: str | None = None) -> Any:
    if rounding_mode is not None:
        # piecewise constant: the tangent is zero wherever it exists
        k = num_tangents(a, b)
        primal = torch.div(primal_of(a), primal_of(b), rounding_mode=rounding_mode)
        return lift(primal, k)
    num_tangents(a, b)
    if not is_dual(a) and not is_dual(b):
        return a / b
    if is_number(b):
        return Dual(a.stacked / b)
    if is_dual(b):
        return _quotient(a, as_now(b) if is_number(a) else b)
    (a, b) = settled(a, b)
    return Dual(align(a.stacked, ndim_of(a, b)) / b)


@once_rounded
def _quotient(a: Any, b: Dual) -> Dual:
    a, b = settled(a, b)
    n = ndim_of(a, b)
    (p, p_tan), (q, q_tan) = parts(a, n), parts(b, n)
    assert q_tan is not None
    out = p / q
    tangents = -out * q_tan if p_tan is None else p_tan - out * q_tan
    return join(out, tangents / q)


rule(torch.Tensor.__rdiv__, torch.Tensor.__rtruediv__)(lambda a, b: _div(b, a))
rule("floor_divide", torch.Tensor.__floordiv__)(lambda a, b: _div(a, b, rounding_mode="floor"))
rule(torch.Tensor.__rfloordiv__)(lambda a, b: _div(b, a, rounding_mode="floor"))
rule("neg", "negative", torch.Tensor.__neg__)(lambda x: Dual(-x.stacked))


_between = once_rounded(lambda start, end, weight: _plus(start, _multiply(_sub(end, start), weight)))


@rule("lerp")
def _lerp(start: Any, end: Any, weight: Any) -> Any:
    if end.dtype != start.dtype:
        raise TypeError(f"end of lerp must have the dtype of start ({start.dtype}), got {end.dtype}.")
    return _between(start, end, weight)


rule("addcmul")(once_rounded(lambda x, a, b, *, value=1: _plus(x, _multiply(_multiply(a, b), value))))
rule("addcdiv")(once_rounded(lambda x, a, b, *, value=1: _plus(x, _multiply(_div(a, b), value))))

# -- powers -----------------------------------------------------------------------------------------------------------


@rule("pow", torch.Tensor.__pow__)
def _pow(a: Any, b: Any) -> Any:
    if is_number(b):
        if b == 2:
            return elementwise(torch.square, lambda out, x: 2 * x)(a)
        if b == 0:
            return elementwise(lambda x: torch.pow(x, b), lambda out, x: torch.zeros_like(x))(a)
        return elementwise(lambda x: torch.pow(x, b), lambda out, x: b * torch.pow(x, b - 1))(a)
    return _pow_tensor(a, b)


def _power_partial(out: torch.Tensor, x: Any, y: torch.Tensor) -> torch.Tensor:
    # x^0 is constant: its derivative is 0 also where x^-1 is infinite
    return torch.where(y == 0, torch.zeros_like(out), y * torch.pow(x, y - 1))


def _exponent_partial(out: torch.Tensor, x: Any, y: torch.Tensor) -> torch.Tensor:
    base = torch.as_tensor(x, dtype=out.dtype, device=out.device)
    nonzero = torch.where(base == 0, torch.ones_like(base), base)
    return torch.where(base == 0, torch.zeros_like(out), out * nonzero.log())  # 0^y is constant for y > 0


_pow_tensor = elementwise(torch.pow, _power_partial, _exponent_partial)
rule(torch.Tensor.__rpow__)(lambda b, a: _pow_tensor(a, b))

# -- unary ------------------------------------------------------------------------------------------------------------

_TWO_OVER_SQRT_PI = 2 / math.sqrt(math.pi)

#: functions -> derivative, from the output y and the input x
_DERIVATIVES: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "abs absolute": lambda y, x: x.sign(),
    "acos arccos": lambda y, x: -(1 - x * x).rsqrt(),
    "acosh arccosh": lambda y, x: (x * x - 1).rsqrt(),
    "asin arcsin": lambda y, x: (1 - x * x).rsqrt(),
    "asinh arcsinh": lambda y, x: (x * x + 1).rsqrt(),
    "atan arctan": lambda y, x: (1 + x * x).reciprocal(),
    "atanh arctanh": lambda y, x: (1 - x * x).reciprocal(),
    "cos": lambda y, x: -x.sin(),
    "cosh": lambda y, x: x.sinh(),
    "deg2rad": lambda y, x: torch.full_like(x, math.pi / 180),
    "digamma": lambda y, x: torch.polygamma(1, x),
    "erf": lambda y, x: _TWO_OVER_SQRT_PI * (-x * x).exp(),
    "erfc": lambda y, x: -_TWO_OVER_SQRT_PI * (-x * x).exp(),
    "erfinv": lambda y, x: (y * y).exp() / _TWO_OVER_SQRT_PI,
    "exp": lambda y, x: y,
    "exp2": lambda y, x: y * math.log(2),
    "expm1": lambda y, x: x.exp(),  # y + 1 cancels where y rounds to -1
    "frac": lambda y, x: torch.ones_like(x),
    "lgamma": lambda y, x: x.digamma(),
    "log": lambda y, x: x.reciprocal(),
    "log10": lambda y, x: (x * math.log(10)).reciprocal(),
    "log1p": lambda y, x: (x + 1).reciprocal(),
    "log2": lambda y, x: (x * math.log(2)).reciprocal(),
    "logsigmoid": lambda y, x: (-x).sigmoid(),
    "rad2deg": lambda y, x: torch.full_like(x, 180 / math.pi),
    "reciprocal": lambda y, x: -y * y,
    "rsqrt": lambda y, x: -0.5 * y * y * y,
    "sigmoid expit": lambda y, x: y * (1 - y),
    "sin": lambda y, x: x.cos(),
    "sinc": lambda y, x: torch.where(x == 0, 0.0, ((math.pi * x).cos() - y) / torch.where(x == 0, 1.0, x)),
    "sinh": lambda y, x: x.cosh(),
    "sqrt": lambda y, x: 0.5 / y,
    "square": lambda y, x: 2 * x,
    "tan": lambda y, x: 1 + y * y,
    "tanh": lambda y, x: 1 - y * y,
}
UNARY = {name: derivative for names, derivative in _DERIVATIVES.items() for name in names.split()}
_TORCH_SAVES_RESULT = "exp exp2 expit expm1 reciprocal rsqrt sigmoid sqrt tan tanh".split()


for _name, _derivative in UNARY.items():
    _rule = elementwise(functions_named(_name)[0], _derivative)
    rule(_name)((lambda x, _rule=_rule: _rule(as_now(x))) if _name in _TORCH_SAVES_RESULT else _rule)
rule(torch.Tensor.__abs__)(elementwise(torch.abs, UNARY["abs"]))


@rule("logit")
def _logit(x: Dual, eps: float | None = None) -> Dual:
    def slope(y: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
        inside = (p * (1 - p)).reciprocal()
        return inside if eps is None else torch.where((p < eps) | (p > 1 - eps), 0.0, inside)

    return elementwise(lambda p: torch.logit(p, eps), slope)(x)


#: piecewise constant functions: the tangent is zero
for _name in ("sign", "sgn", "floor", "ceil", "round", "trunc", "fix"):
    rule(_name)(elementwise(getattr(torch, _name), lambda y, x: torch.zeros_like(y)))

# -- extrema and remainders -------------------------------------------------------------------------------------------


def _wins(sign: int) -> Callable[..., torch.Tensor]:
    """Share of the derivative of maximum (sign 1) or minimum (-1) that the first argument takes: ties are halved."""

    def share(out: torch.Tensor, a: Any, b: Any) -> torch.Tensor:
        difference = (a - b) * sign
        return torch.where(difference == 0, 0.5, (difference > 0).to(out.dtype))

    return share


def _over_nan(share: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """The same for fmax and fmin, which take the other argument where one is NaN."""
    return lambda out, a, b: torch.where(b.isnan(), 1.0, torch.where(a.isnan(), 0.0, share(out, a, b)))


def _without_nan(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """fmax or fmin by maximum or minimum: torch 2.14 gives NaN arguments of its own a derivative."""
    return lambda a, b: function(torch.where(a.isnan(), b, a), torch.where(b.isnan(), a, b))


for _name, _function, _share in (
    ("maximum", torch.maximum, _wins(1)),
    ("minimum", torch.minimum, _wins(-1)),
    ("fmax", _without_nan(torch.maximum), _over_nan(_wins(1))),
    ("fmin", _without_nan(torch.minimum), _over_nan(_wins(-1))),
):
    rule(_name)(elementwise(_function, _share, lambda out, a, b, _share=_share: 1 - _share(out, a, b)))


@rule("clamp", "clip")
def _clamp(x: Any, min: Any = None, max: Any = None) -> Any:
    if is_dual(min) or is_dual(max) or not is_dual(x):
        x = x if min is None else torch.maximum(*_tensors(x, min))
        return x if max is None else torch.minimum(*_tensors(x, max))

    def inside(out: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
        mask = torch.ones_like(out)
        if min is not None:
            mask = mask * (p >= min)
        return mask if max is None else mask * (p <= max)

    n = ndim_of(x, *(bound for bound in (min, max) if bound is not None))
    aligned = Dual(align(x.stacked, n))
    return elementwise(lambda p: torch.clamp(p, min, max), inside)(aligned)


def _tensors(a: Any, b: Any) -> list[Any]:
    like = b if is_number(a) else a
    return [
        torch.as_tensor(value, dtype=like.dtype, device=like.device) if is_number(value) else value
        for value in (a, b)
    ]


rule("clamp_min")(lambda x, min: _clamp(x, min=min))
rule("clamp_max")(lambda x, max: _clamp(x, max=max))
_ones, _zeros = (lambda y, *primals: torch.ones_like(y)), (lambda y, *primals: torch.zeros_like(y))
_remainder = elementwise(torch.remainder, _ones, lambda y, a, b: -torch.floor(a / b))
# of a number and a tensor torch has no derivative
rule("remainder", torch.Tensor.__mod__)(
    lambda a, b: _remainder(*(_tensors(a, b) if is_number(a) else (a, b)))
)
rule(torch.Tensor.__rmod__)(lambda b, a: _remainder(*_tensors(a, b)))
rule("fmod")(elementwise(torch.fmod, _ones, lambda y, a, b: -torch.trunc(a / b)))
rule("atan2", "arctan2")(
    elementwise(torch.atan2, lambda y, a, b: b / (a * a + b * b), lambda y, a, b: -a / (a * a + b * b))
)
rule("hypot")(elementwise(torch.hypot, lambda y, a, b: a / y, lambda y, a, b: b / y))
rule("logaddexp")(
    elementwise(torch.logaddexp, lambda y, a, b: (a - b).sigmoid(), lambda y, a, b: (b - a).sigmoid())
)


def _log_beside(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """log b, the slope of a log b in a; 0 where a = 0 and the logarithm does not exist, as in torch."""
    return torch.where((a == 0) & (b <= 0), 1.0, b).log()


rule("xlogy")(
    elementwise(
        torch.xlogy,
        lambda y, a, b: _log_beside(torch.as_tensor(a), torch.as_tensor(b)),
        lambda y, a, b: a / b,
    )
)
if VERSION > (2, 11):  # where it has no derivative, in neither mode
    rule("nextafter")(elementwise(torch.nextafter, _ones, _zeros))
rule("copysign")(elementwise(torch.copysign, lambda y, a, b: torch.where(a == 0, 0.0, y / a), _zeros))


rule("nan_to_num")(
    lambda x, nan=0.0, posinf=None, neginf=None: elementwise(
        lambda p: torch.nan_to_num(p, nan, posinf, neginf), lambda y, p: torch.isfinite(p).to(p.dtype)
    )(x)
)


# -- results without a derivative -------------------------------------------------------------------------------------


def _plain(function: Callable[..., Any]) -> Callable[..., Any]:
    """A rule that acts on primals and returns a plain result: comparisons, predicates, integers."""

    def on_primals(*args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            return function(*map(primal_of, args), **{name: primal_of(a) for name, a in kwargs.items()})

    return on_primals


_PLAIN = """
eq ne lt le gt ge greater greater_equal less less_equal not_equal isnan isinf isfinite isposinf isneginf isreal
signbit isclose allclose equal argmax argmin argsort count_nonzero nonzero any all logical_and logical_or
logical_xor logical_not bincount searchsorted bucketize histc is_same_size is_floating_point
is_complex is_tensor numel isin result_type can_cast multinomial bernoulli is_conj is_neg is_inference
is_signed is_set_to is_shared is_pinned argwhere is_distributed
""".split()
for _name in _PLAIN:
    for _function in functions_named(_name):
        rule(_function, kind="view")(_plain(_function))
rule("is_nonzero", kind="view")(bool)
for _name in ("__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__", "__contains__"):
    rule(getattr(torch.Tensor, _name), kind="view")(_plain(getattr(torch.Tensor, _name)))
