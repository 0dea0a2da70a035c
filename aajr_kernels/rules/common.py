"""Building blocks of the rules: splitting a Dual, aligning broadcasts, joining it again.

Primals keep a leading axis of one and tangents one of K, so that a product of the two broadcasts and a ``cat`` of
them is the stacked result. Autograd differentiates the rules: ``split`` and ``cat`` are each other's adjoint.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from ..autocast import autocasting
from ..dual import Dual as Dual  # the rules import the number from here
from ..dual import is_dual as is_dual
from ..dual import num_tangents as num_tangents
from ..recompute import snapshot
from .leaving import refuse_shape


def split(x: Dual) -> tuple[torch.Tensor, torch.Tensor]:
    """Primal ``[1, *shape]`` and tangents ``[K, *shape]``."""
    primal, tangents = x.stacked.split([1, x.num_tangents])
    return primal, tangents


def join(primal: torch.Tensor, tangents: torch.Tensor) -> Dual:
    """The Dual of a primal ``[1, *shape]`` and tangents that broadcast to ``[K, *shape]``."""
    if tangents.shape[1:] != primal.shape[1:]:
        tangents = tangents.expand(tangents.shape[0], *primal.shape[1:])
    if tangents.dtype != primal.dtype:
        tangents = tangents.to(primal.dtype)
    return Dual(torch.cat([primal, tangents]))


def align(stacked: torch.Tensor, ndim: int) -> torch.Tensor:
    """`stacked` with axes of one after the first, so that its slices have `ndim` axes and broadcast from the right."""
    missing = ndim + 1 - stacked.dim()
    if missing <= 0:
        return stacked
    return stacked.reshape(stacked.shape[0], *(1,) * missing, *stacked.shape[1:])


def is_number(x: Any) -> bool:
    """A Python scalar (or symbolic one), as opposed to a tensor or Dual."""
    if isinstance(x, (torch.Tensor, Dual)):
        return False
    if getattr(x, "shape", ()) != ():  # an array would broadcast against the stack axis
        refuse_shape(x)
    return True


def parts(x: Any, ndim: int) -> tuple[Any, torch.Tensor | None]:
    """(primal, tangents or None) of a Dual, tensor or number, aligned for an elementwise operation of `ndim` axes."""
    if isinstance(x, Dual):
        primal, tangents = align(x.stacked, ndim).split([1, x.num_tangents])
        return primal, tangents
    return x, None


def primal_of(x: Any) -> Any:
    """`x`, or its primal if it is a Dual."""
    return x.primal if isinstance(x, Dual) else x


def ndim_of(*values: Any) -> int:
    """The number of axes of the broadcast of tensors, Duals and numbers."""
    return max([0] + [v.dim() for v in values if not is_number(v)])


def promoted(tensors: list[Any]) -> torch.dtype:
    """The dtype that torch gives a combination of tensors and Duals."""
    shaped = [value.dtype for value in tensors if value.dim()]
    dtype = functools.reduce(torch.promote_types, shaped or [value.dtype for value in tensors])
    if not dtype.is_complex and any(value.is_complex() for value in tensors):
        # a shapeless complex number leaves the precision to operands with axes
        dtype = dtype.to_complex() if dtype.is_floating_point else dtype
    if not (dtype.is_floating_point or dtype.is_complex):
        # integers with axes: the shapeless operands are of a higher category
        dtype = functools.reduce(
            torch.promote_types, [value.dtype for value in tensors if not value.dim()], dtype
        )
    return dtype


def settled(*values: Any) -> tuple[Any, ...]:
    """`values`, cast to the dtype that torch gives their combination where a shapeless Dual is among them.

    Otherwise the stack axis would give it the weight in type promotion that torch gives only to tensors with axes.
    """
    tensors = [value for value in values if not is_number(value)]
    if not any(is_dual(value) and value.dim() == 0 for value in tensors):
        return values
    dtype = promoted(tensors)
    return tuple(value if is_number(value) else value.to(dtype) for value in values)


_LOW = (torch.bfloat16, torch.float16)


def any_low(values: Any) -> bool:
    """Whether a Dual or tensor among `values` is of bfloat16 or float16."""
    return any(isinstance(x, (Dual, torch.Tensor)) and x.dtype in _LOW for x in values)


def cast(x: Any, dtype: torch.dtype) -> Any:
    """A floating-point Dual or tensor in another dtype; other values unchanged."""
    if isinstance(x, Dual):
        return Dual(x.stacked.to(dtype))
    return x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x


def raised(x: Any) -> Any:
    """A Dual or tensor of a low dtype in float32; other values unchanged."""
    return cast(x, torch.float32) if any_low((x,)) else x


def _result_dtype(rule: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.dtype:
    """The dtype of a rule's result for operands of low dtypes, as in torch."""
    tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, (Dual, torch.Tensor))]
    if not autocasting(tensors[0].device.type):
        return promoted([x for x in tensors if x.is_floating_point()])
    # autocast may want float32: its lists are torch's own, so the primal goes through the rule
    bare = lambda x: Dual(x.stacked[:1]) if isinstance(x, Dual) else x
    with torch.no_grad():
        result = rule(*(bare(x) for x in args), **{name: bare(x) for name, x in kwargs.items()})
    return (result[0] if isinstance(result, tuple) else result).dtype


def once_rounded(rule: Callable[..., Any]) -> Callable[..., Any]:
    """`rule`, computed in float32 where an operand is of bfloat16 or float16, and its result rounded once.

    A derivative must not be taken from a result that was already rounded, nor from a difference of rounded terms:
    e^(x − y) with y = logsumexp(x) rounded at 100 is off by a third. Autograd goes through the same float32 graph, so
    the gradient through the tangent is rounded once as well. Rules made of one product or sum need none of it.

    A ``dtype=`` is that of the computation: the first operand is cast to it beforehand, as torch does.
    """

    @functools.wraps(rule)
    def wide(*args: Any, **kwargs: Any) -> Any:
        wanted = kwargs.pop("dtype", None)
        if wanted is not None:
            args = (args[0].to(wanted), *args[1:])
        if not any_low((*args, *kwargs.values())):
            return rule(*args, **kwargs)
        dtype = _result_dtype(rule, args, kwargs)
        result = rule(*(raised(x) for x in args), **{name: raised(x) for name, x in kwargs.items()})
        if isinstance(result, tuple):
            return tuple([cast(x, dtype) for x in result])
        return cast(result, dtype)

    return wide


def once_rounded_sum(terms: list[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """The broadcast sum of given products, rounded once to `dtype`."""
    return summed(*map(raised, terms)).to(dtype) if len(terms) > 1 else terms[0]


def summed(*terms: torch.Tensor | None) -> torch.Tensor:
    """The sum of those that are not None."""
    return functools.reduce(torch.add, [term for term in terms if term is not None])


def elementwise(function: Callable[..., torch.Tensor], *partials: Callable[..., torch.Tensor]) -> Any:
    """The rule of an elementwise `function` of ``len(partials)`` broadcast arguments.

    Args:
        function: the function itself, called with primals.
        partials: per argument ``partial(out, *primals)``, the partial derivative.

    Returns:
        A rule ``rule(*args, **kwargs)`` whose keyword arguments go only to `function`; :func:`once_rounded`.
    """

    @once_rounded
    def rule(*args: Any, **kwargs: Any) -> Any:
        values = settled(*args[: len(partials)])
        num_tangents(*values)
        ndim = ndim_of(*values)
        pairs = [parts(value, ndim) for value in values]
        primals = [p for p, _ in pairs]
        out = function(*primals, *args[len(partials) :], **kwargs)
        if not any(is_dual(v) for v in values):
            return out
        duals = [
            (partial, tangents) for (_, tangents), partial in zip(pairs, partials) if tangents is not None
        ]
        return join(out, summed(*(partial(out, *primals) * tangents for partial, tangents in duals)))

    return rule


def as_now(x: Any) -> Any:
    """A :func:`~aajr_kernels.recompute.snapshot` of a Dual; the rest unchanged.

    For rules of functions whose result torch saves: their arguments may be written in place.
    """
    return Dual(snapshot(x.stacked)) if isinstance(x, Dual) else x


def per_slice(function: Callable[[torch.Tensor], torch.Tensor], x: Dual) -> Dual:
    """A linear `function` applied to the primal and to each tangent; for rare structural operations."""
    return Dual(torch.stack([function(part) for part in x.stacked.unbind(0)]))


#: rules made by :func:`by_slices`, which are right for complex numbers too
LINEAR: set[Callable[..., Dual]] = set()


def by_slices(function: Callable[..., torch.Tensor]) -> Callable[..., Dual]:
    """The rule of a `function` that is linear in its first argument: :func:`per_slice`; entered in :data:`LINEAR`."""

    def linear(x: Dual, *args: Any, **kwargs: Any) -> Dual:
        return per_slice(lambda part: function(part, *args, **kwargs), x)

    LINEAR.add(linear)
    return linear


def axis(x: Dual, dim: int) -> int:
    """Axis `dim` of the primal as an axis of the stacked tensor, checked: the stack axis is never touched.

    A 0-dimensional Dual has axes 0 and -1, as in torch, and none in the stack: the returned 1 makes torch raise.
    Rules with one axis use :func:`vector`, those with several use :func:`axes`, which returns none.
    """
    n = x.stacked.dim() - 1 or 1
    if not -n <= dim < n:
        raise IndexError(f"dim must be in [{-n}, {n - 1}], got {dim}.")
    return dim % n + 1


def axes(x: Dual, dims: Any) -> list[int]:
    """:func:`axis` of each of `dims`, or of the only one; none for a 0-dimensional Dual."""
    checked = [axis(x, d) for d in (dims if isinstance(dims, (tuple, list)) else (dims,))]
    if len(checked) > 1 and x.dim() == 0:
        raise ValueError(f"dims of a 0-dimensional Dual must name its axis once, got {dims}.")
    return checked if x.dim() else []


def vector(function: Callable[..., Any]) -> Callable[..., Any]:
    """Let a rule that names an axis treat a 0-dimensional Dual as a vector of one, as torch does."""

    @functools.wraps(function)
    def rule_(x: Dual, *args: Any, **kwargs: Any) -> Any:
        if x.dim():
            return function(x, *args, **kwargs)
        result = function(x.reshape(1), *args, **kwargs)
        shapeless = lambda r: r.reshape(()) if r.numel() == 1 else r
        return tuple(shapeless(r) for r in result) if isinstance(result, tuple) else shapeless(result)

    return rule_


def sizes_of(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Sizes or axes given as separate integers or as one sequence."""
    if len(args) == 1 and isinstance(args[0], (tuple, list, torch.Size)):
        return tuple(args[0])
    return args


def recast(stacked: torch.Tensor) -> Any:
    """The Dual of a stack whose dtype may have changed, or the plain primal if it became an integer one."""
    return Dual(stacked) if stacked.is_floating_point() or stacked.is_complex() else stacked[0]


def lift(x: torch.Tensor, k: int) -> Dual:
    """A Dual with zero tangents."""
    return Dual(torch.cat([x.unsqueeze(0), x.new_zeros((k, *x.shape))]))


def stacks(*values: Any) -> list[torch.Tensor]:
    """The stacks of Duals, and of tensors beside them, whose tangents are zero."""
    k = num_tangents(*values)
    return [x.stacked if is_dual(x) else lift(x, k).stacked for x in values]
