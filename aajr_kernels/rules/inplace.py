"""In-place methods, generated from the out-of-place rules.

The result is computed from a clone of the storage and copied back, so that autograd's version counters see one
write and saved tensors stay valid. The table is built once, at import: parsing names at call time
would break torch.compile.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from ..backends.errors import UnsupportedOperation
from ..torch_private import NN
from .common import Dual, as_now, is_dual, num_tangents
from .registry import COMPLEX, KINDS, RULES, functions_named
from .registry import register as enter

_RESHAPING = {"unsqueeze_", "squeeze_", "transpose_", "t_", "swapaxes_", "swapdims_", "as_strided_"}


def _in_place(name: str, rule: Callable[..., Any]) -> Callable[..., Any]:
    def in_place(x: Any, *args: Any, **kwargs: Any) -> Any:
        if not is_dual(x):
            raise UnsupportedOperation(
                f"Tensor.{name} writes a Dual into a plain tensor, which has no room for its tangent: allocate the "
                "buffer with x.new_zeros(...) of a Dual x, or use the out-of-place form."
            )
        before = Dual(x.stacked.clone())
        args = tuple(before if a is x else as_now(a) for a in args)  # an argument may be another view of x
        kwargs.pop("inplace", None)
        result = rule(before, *args, **kwargs)
        if not is_dual(result):
            raise UnsupportedOperation(
                f"Tensor.{name} would overwrite a Dual by values without a derivative: use the out-of-place form."
            )
        if result.shape != x.shape:
            raise UnsupportedOperation(
                f"{name} of a Dual of shape {tuple(x.shape)} cannot hold a result of {tuple(result.shape)}."
            )
        if not torch.can_cast(result.dtype, x.dtype):
            raise RuntimeError(f"{name} of a Dual of {x.dtype} cannot hold a result of {result.dtype}.")
        x.stacked.copy_(result.stacked)
        return x

    return in_place


def _reshaping(rule: Callable[..., Any]) -> Callable[..., Any]:
    def in_place(x: Dual, *args: Any, **kwargs: Any) -> Dual:
        x.stacked = rule(x, *args, **kwargs).stacked
        return x

    return in_place


def _zero(x: Dual) -> Dual:
    x.stacked.zero_()
    return x


def _fill(x: Any, value: Any) -> Any:
    return _copy(x, value if is_dual(value) else torch.as_tensor(value, dtype=x.dtype, device=x.device))


def _drawn(name: str) -> Callable[..., Any]:
    """Random values in place: the same as torch draws, with tangents of zero."""

    def draw(x: Dual, *args: Any, **kwargs: Any) -> Dual:
        if not is_dual(x) or any(is_dual(value) for value in (*args, *kwargs.values())):
            raise UnsupportedOperation(f"Tensor.{name} has no derivative in its parameters: pass them plain.")
        with torch.no_grad():
            values = getattr(torch.empty_like(x.stacked[0]), name)(*args, **kwargs)
        return _copy(x, values)

    return draw


def _copy(x: Any, source: Any, non_blocking: bool = False) -> Any:
    if not is_dual(x):
        return RULES[torch.Tensor.add_](x, source)  # raises: no room for the tangent
    num_tangents(x, source)
    if is_dual(source):
        x.stacked.copy_(source.expand(tuple(x.shape)).stacked, non_blocking)
    else:
        x.stacked[0].copy_(source, non_blocking)
        x.stacked[1:].zero_()
    return x


def register() -> None:
    """Give every in-place method whose out-of-place form has a rule its own; called after all rules are registered."""
    for name in "bernoulli_ normal_ uniform_ exponential_ random_ log_normal_ cauchy_ geometric_".split():
        enter(getattr(torch.Tensor, name), _drawn(name), "view")
    for name in sorted({*dir(torch.Tensor), *dir(torch), *dir(F), *dir(NN)}):
        if not name.endswith("_") or name.endswith("__"):
            continue
        # the method comes first: in-place forms take its arguments (torch.polygamma has the number before the tensor).
        # Wrappers of torch.nn.functional have other arguments than the builtins behind them
        method = getattr(torch.Tensor, name[:-1], None)
        bases = sorted(functions_named(name[:-1]), key=lambda f: (f is not method, inspect.isfunction(f)))
        base = next((function for function in bases if function in RULES), None)
        if base is None:
            continue
        rule, forms = RULES[base], functions_named(name)
        if not any(form in RULES for form in forms):
            made = _reshaping(rule) if name in _RESHAPING else _in_place(name, rule)
            for form in forms:
                enter(form, made, KINDS[base])
        if (of_complex := COMPLEX.get(base)) is not None:
            for form in forms:
                COMPLEX[form] = RULES[form] if of_complex is rule else _in_place(name, of_complex)
    for name in ("add", "sub", "mul", "truediv", "pow", "mod", "floordiv"):
        method = getattr(torch.Tensor, f"__i{name}__", None)
        out_of_place = RULES.get(getattr(torch.Tensor, f"__{name}__"))
        if method is not None and out_of_place is not None:
            enter(method, _in_place(f"__i{name}__", out_of_place), "torch")
            COMPLEX[method] = RULES[method]
    for function, rule in (
        (torch.Tensor.zero_, _zero),
        (torch.zero_, _zero),
        (torch.Tensor.fill_, _fill),
        (torch.fill_, _fill),
        (torch.fill, lambda x, value: _fill(Dual(x.stacked.clone()) if is_dual(x) else x, value)),
        (torch.Tensor.copy_, _copy),
    ):
        enter(function, rule, "view")
        COMPLEX[function] = rule
