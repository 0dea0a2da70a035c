"""The layers of transformers' models that have a fused op, found by their structure, and the fused forward of each.

A module is a candidate by its attributes and parameters, under any names of its class and of its parts: one weight
and an epsilon, linear layers around an activation. What its forward does with them shows when it runs: the candidate's
readings are tried in turn, and the first that agrees with the module (see ``verify``) replaces its forward, under the
same decorators. Where none agrees the module is left, with the difference as the reason.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import permutations, product
from typing import Any, NamedTuple

import torch
from torch import nn

from ...ops.activation import geglu, gelu, quick_gelu, relu2, swiglu
from ...torch_private import DROPOUT
from .projections import of_one_input, one_by_one
from .residual import rms_norm_of
from .verify import Case, Method, Trial, linear_sizes, undisturbed
from .wrappers import around, ways

__all__ = ["Replacement", "find", "is_torchs", "parts", "verified"]


@dataclass(frozen=True)
class Replacement:
    """A function for the place of one attribute of a module.

    Attributes:
        what: a few words for the listing.
        function: called with the module first, like a method; None leaves the module as it is.
        attribute: the method it replaces.
        reason: why the module is left, where `function` is None.
        inside: attributes of the module that the replacement no longer calls.
        runs_own: whether the module's own forward runs in it.
    """

    what: str
    function: Callable[..., Any] | None = None
    attribute: str = "forward"
    reason: str = ""
    inside: tuple[str, ...] = ()
    runs_own: bool = False


def verified(
    module: nn.Module,
    trial: Trial,
    what: str,
    op: str,
    readings: Iterable[Any],
    *,
    attribute: str = "forward",
    inside: tuple[str, ...] = (),
    through: str = "",
    method: Callable[[Any], Method] = lambda body: body,
) -> Replacement:
    """The first of `readings` that agrees with the module's own method, in its place; or the reason why none does.

    Args:
        module: the candidate.
        trial: its own method, on twins.
        what: a few words for the listing.
        op: the op that the replacement runs once.
        readings: functions to put inside the decorators of the method.
        attribute: the method.
        inside: attributes of the module that the replacement no longer calls.
        through: a function that the method finds among its globals, to be replaced in its stead.
        method: makes of a body what the trial calls.
    """
    differences, opaque = [], None
    for reading in () if trial.reason else readings:
        for way in ways(getattr(type(module), attribute), through):
            body = around(way, reading)
            if body is None:
                opaque = way[-1]
                continue
            difference = trial.difference(method(body), op)
            if difference is None:
                return Replacement(what, body, attribute, inside=inside)
            differences.append(difference)
    subject = f"{through} of {type(module).__name__}" if through else f"{type(module).__name__}.{attribute}"
    if trial.reason:
        reason = f"{subject} {trial.reason}"
    elif differences:
        reason = f"{subject} is not the fused {what}: {min(differences)[1]}"
    elif opaque is not None:
        reason = f"a decorator of {opaque.__qualname__} does not hold what it decorates"
    else:
        reason = f"{type(module).__name__}.{attribute} has {what} in an unknown form"
    return Replacement(what, reason=reason)


def is_torchs(module: nn.Module) -> bool:
    """Whether the module's forward is one of torch's, which runs on the rules of torch's functions."""
    return getattr(type(module).forward, "__module__", "").startswith("torch.nn.")


# -- norms ------------------------------------------------------------------------------------------------------------


def _norm(module: nn.Module, dtype: torch.dtype) -> Replacement | None:
    tensors = {name: t for name, t in {**module._parameters, **module._buffers}.items() if t is not None}
    epsilons = [name for name, value in vars(module).items() if isinstance(value, float)]
    if tensors.keys() != {"weight"} or tensors["weight"].ndim != 1 or not epsilons or module._modules:
        return None
    low, full = torch.bfloat16, torch.float32
    width, forward = tensors["weight"].numel(), type(module).forward
    trial = Trial(module, dtype, forward, width, (Case(low, full), Case(full, low)))
    readings = product(epsilons, (0.0, 1.0), ("promoted", "weight", "input"))
    return verified(module, trial, "RMS norm", "rms_norm", (_rms_norm_forward(*r) for r in readings))


@functools.cache
def _rms_norm_forward(eps_name: str, offset: float, out_dtype: str) -> Callable[..., Any]:
    """RMS norm whose output has the ``"promoted"`` dtype of x and weight, a half-precision ``"weight"``'s, or x's."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        (x,) = (*args, *kwargs.values())  # a decorator may pass it by its name
        weight, eps = self.weight, getattr(self, eps_name)
        if out_dtype == "input":
            return rms_norm_of(x, weight.shape, weight, eps, offset=offset)
        if weight.dtype != x.dtype:
            promoted = torch.promote_types(x.dtype, weight.dtype)
            x, weight = x.to(promoted), weight.to(promoted)
        y = rms_norm_of(x, weight.shape, weight, eps, offset=offset)
        half = out_dtype == "weight" and self.weight.dtype in (torch.float16, torch.bfloat16)
        return y.to(self.weight.dtype) if half else y

    return forward


# -- activations ------------------------------------------------------------------------------------------------------

_gelu_tanh = functools.partial(nn.functional.gelu, approximate="tanh")
#: label -> (activation, the fused one or the gated product with it, the name of that in coverage)
_WRITTEN_OUT: dict[str, tuple[Any, Any, str]] = {
    "GELU (tanh)": (_gelu_tanh, functools.partial(gelu, approximate="tanh"), "gelu_tanh"),
    "QuickGELU": (quick_gelu, quick_gelu, "quick_gelu"),
    "ReLU²": (relu2, relu2, "relu2"),
}
_GATES: dict[str, tuple[Any, Any, str]] = {
    "SwiGLU": (nn.functional.silu, swiglu, "swiglu"),
    "GeGLU": (nn.functional.gelu, geglu, "geglu"),
    "GeGLU (tanh)": (_gelu_tanh, functools.partial(geglu, approximate="tanh"), "geglu"),
}


#: modules without parameters that are no activations
_PASSING = (DROPOUT, nn.Identity)


def _is_activation(module: nn.Module) -> bool:
    return not (isinstance(module, _PASSING) or module._parameters or module._buffers or module._modules)


def _label(act: Any, table: dict[str, tuple[Any, Any, str]]) -> str | None:
    """The label in `table` of the function that a module or function computes, or None."""
    x = torch.linspace(-9, 9, 145, dtype=torch.float64, device="cpu")
    with undisturbed():
        try:
            y = type(act).forward(act, x) if isinstance(act, nn.Module) else act(x)
            labels = (name for name, (f, *_) in table.items() if torch.allclose(y, f(x), 1e-6, 1e-6))
            return next(labels, None)
        except Exception:  # it is no function of one tensor
            return None


def _activation(module: nn.Module, dtype: torch.dtype) -> Replacement | None:
    """Activations that are written out; those that call one function of torch run on its rule as they are."""
    label = _label(module, _WRITTEN_OUT) if _is_activation(module) else None
    if label is None:
        return None
    trial, op = Trial(module, dtype, type(module).forward, 16), _WRITTEN_OUT[label][2]
    as_it_is = trial.difference(type(module).forward, op)
    return as_it_is and verified(module, trial, label, op, [_activation_forward(label)])


@functools.cache
def _activation_forward(label: str) -> Callable[..., Any]:
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return _WRITTEN_OUT[label][1](*args, *kwargs.values())

    return forward


# -- gated products ---------------------------------------------------------------------------------------------------


class Parts(NamedTuple):
    """The parts of an MLP by their names in it: linear layers with their sizes, the activation, the dropout or ""."""

    linears: dict[str, tuple[int, int]]
    act: str
    dropout: str


def parts(module: nn.Module) -> Parts | None:
    """The parts of a module that is one to three linear layers, one activation and at most one dropout."""
    children = {name: child for name, child in module._modules.items() if child is not None}
    linears = {name: sizes for name, child in children.items() if (sizes := linear_sizes(child)) is not None}
    drops = [name for name, child in children.items() if isinstance(child, _PASSING)]
    acts = [name for name, child in children.items() if name not in linears and _is_activation(child)]
    acts = acts or [name for name, f in vars(module).items() if name != "forward" and inspect.isroutine(f)]
    rest = children.keys() - {*linears, *acts, *drops}
    if rest or module._parameters or module._buffers or len(acts) != 1 or len(drops) > 1:
        return None
    return Parts(linears, acts[0], "".join(drops)) if 1 <= len(linears) <= 3 else None


def _roles(linears: dict[str, tuple[int, int]]) -> Iterator[tuple[str, str, str]]:
    """(gate, up, down) by their sizes; without an up, the first gives gate and up side by side."""
    for first, *up, down in permutations(linears):
        features = linears[down][0]
        if up and linears[first] == linears[up[0]] and linears[first][1] == features:
            yield first, up[0], down
        elif len(linears) == 2 and linears[first][1] == 2 * features:
            yield first, "", down


def _gated(module: nn.Module, dtype: torch.dtype) -> Replacement | None:
    mlp = parts(module)
    roles = list(_roles(mlp.linears)) if mlp is not None and len(mlp.linears) > 1 else []
    if mlp is None or not roles:
        return None
    label = _label(act := getattr(module, mlp.act), _GATES)
    if label is None:
        return _without_gate(act, "gated MLP")
    low, down = torch.bfloat16, {role[-1] for role in roles}
    mixed = [Case(low, low, {name: torch.float32}) for name in down]
    trial = Trial(module, dtype, type(module).forward, mlp.linears[roles[0][0]][0], mixed)
    readings = (
        _gated_forward(label, *role, mlp.dropout, swapped, follows)
        for role, swapped, follows in product(roles, (False, True), (False, True))
        if not (role[1] and swapped)
    )
    op = _GATES[label][2]
    return verified(module, trial, f"{label} MLP", op, readings, inside=(mlp.act,))


def _without_gate(act: Any, what: str) -> Replacement:
    name = type(act).__name__ if isinstance(act, nn.Module) else getattr(act, "__name__", str(act))
    return Replacement(what, reason=f"there is no gated product with the activation {name}")


@functools.cache
def _gated_forward(
    label: str, gate: str, up: str, down: str, dropout: str, swapped: bool, follows: bool
) -> Callable[..., Any]:
    """A gated MLP; the product `follows` the dtype of the last weight, the halves of a packed one may be `swapped`."""
    gated = _GATES[label][1]

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        (x,) = (*args, *kwargs.values())
        if up:
            layers = getattr(self, gate), getattr(self, up)
            a, b = of_one_input(x, layers) or one_by_one(x, layers)
        else:
            a, b = getattr(self, gate)(x).chunk(2, dim=-1)
        h = gated(b, a) if swapped else gated(a, b)
        if dropout:
            h = getattr(self, dropout)(h)
        last = getattr(self, down)
        if follows:
            weight = getattr(last, "weight", None)  # quantised ones may have none, or integers
            if isinstance(weight, torch.Tensor) and weight.is_floating_point():
                h = h.to(weight.dtype)
        return last(h)

    return forward


def _experts(module: nn.Module, dtype: torch.dtype) -> Replacement | None:
    """Experts whose gate is a method of its own; the eager loop over experts has its gate written inline."""
    gate: Any = getattr(type(module), "_apply_gate", None)
    if gate is None or not getattr(module, "has_gate", False):
        return None
    act, what = getattr(module, "act_fn", None), "gated product of the experts"
    label = _label(act, _GATES)
    if label is None:
        return _without_gate(act, what)
    if getattr(module.config, "_experts_implementation", None) in (None, "eager"):
        remedy = 'set_experts_implementation("grouped_mm")'
        return Replacement(what, reason=f"the eager loop over experts has no gate to replace: {remedy}")
    trial, reading = Trial(module, dtype, gate, 32), _packed_gate(label)
    what, op = f"{label} of the experts", _GATES[label][2]
    return verified(module, trial, what, op, [reading], attribute="_apply_gate")


@functools.cache
def _packed_gate(label: str) -> Callable[..., Any]:
    def apply_gate(self: Any, *args: Any, **kwargs: Any) -> Any:
        (x,) = (*args, *kwargs.values())
        return _GATES[label][1](*x.chunk(2, dim=-1))

    return apply_gate


def find(module: nn.Module, dtype: torch.dtype) -> Replacement | None:
    """The replacement for a module, one with a reason where it is refused, or None where there is nothing."""
    finders = () if is_torchs(module) else (_norm, _gated, _experts, _activation)
    candidates = (finder(module, dtype) for finder in finders)
    return next((candidate for candidate in candidates if candidate is not None), None)
