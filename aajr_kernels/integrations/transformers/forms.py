"""The known forms of the layers in transformers' models, and the fused forward of each.

A form is recognised by the names that the code of a module's ``forward`` uses, under whatever decorators it has, not by
its class: model files copy the same few lines under many class names, and a changed line shows in the names it uses.
What is not recognised is left as it is. A replacement takes the place of the recognised code under the same decorators.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from types import CodeType, FunctionType
from typing import Any

import torch
from torch import nn

from ...ops.activation import geglu, gelu, quick_gelu, relu2, swiglu
from ...ops.norm import rms_norm
from ...ops.rotary import rotary
from .wrappers import around, chains

__all__ = ["Replacement", "find", "names_of", "uses_attention_interface"]


@dataclass(frozen=True)
class Replacement:
    """What to put in the place of one attribute of a module.

    Attributes:
        what: a few words for the listing.
        function: called with the module first, like a method; None leaves the module as it is.
        attribute: the method it replaces.
        reason: why the module is left, where `function` is None.
        inside: attributes of the module that the replacement no longer calls.
    """

    what: str
    function: Callable[..., Any] | None = None
    attribute: str = "forward"
    reason: str = ""
    inside: tuple[str, ...] = ()


def names_of(function: Any) -> frozenset[str]:
    """The names that the code of `function` uses, none where it has no code of Python's."""
    code = getattr(function, "__code__", None)
    return frozenset() if code is None else frozenset(code.co_names)


def _matching(function: Any, accepts: Callable[[FunctionType], bool]) -> tuple[Any, ...] | None:
    """The way from `function` through its decorators to the first function that `accepts` takes."""
    ways = (way for way in chains(function) if isinstance(way[-1], FunctionType))
    return next((way for way in ways if accepts(way[-1])), None)


def _takes_one(code: CodeType) -> bool:
    """Whether a method takes one argument beside ``self``, and nothing that is not named."""
    variadic = inspect.CO_VARARGS | inspect.CO_VARKEYWORDS
    return code.co_argcount == 2 and code.co_kwonlyargcount == 0 and not code.co_flags & variadic


def _replacing(what: str, way: tuple[Any, ...], function: Any, **options: Any) -> Replacement:
    """`function` in the place of the last of `way`, its ``x`` called as the parameter is there."""
    code, taken = function.__code__, way[-1].__code__.co_varnames[1]
    if _takes_one(code) and taken not in code.co_varnames:  # a decorator may pass it by its name
        function = _renamed(function, taken)
    body = around(way, function)
    if body is None:
        reason = f"a decorator of {way[-1].__qualname__} does not hold what it decorates"
        return Replacement(what, reason=reason)
    return Replacement(what, body, **options)


@functools.cache
def _renamed(function: FunctionType, parameter: str) -> FunctionType:
    names = tuple(parameter if name == "x" else name for name in function.__code__.co_varnames)
    code = function.__code__.replace(co_varnames=names)
    return FunctionType(code, function.__globals__, function.__name__, None, function.__closure__)


# -- norms ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Norm:
    """An RMS norm: its weight offset, the attribute of its epsilon, and how its output dtype follows.

    Attributes:
        dtype: ``"promoted"`` of x and the weight, ``"weight"`` (half precision; else promoted), or ``"input"``.
        inner: names that the method ``_norm`` uses, where ``forward`` calls it.
    """

    names: frozenset[str]
    eps: str
    dtype: str
    offset: float = 0.0
    constant: Any = None
    inner: frozenset[str] = frozenset()

    def matches(self, forward: FunctionType) -> bool:
        code = forward.__code__
        known = self.constant is None or self.constant in code.co_consts
        return names_of(forward) == self.names and known and _takes_one(code)


_UPCAST = "to torch float32 pow mean rsqrt variance_epsilon weight dtype"
NORMS = (
    _Norm(frozenset(_UPCAST.split()), "variance_epsilon", "promoted"),
    _Norm(frozenset(f"{_UPCAST} float16 bfloat16".split()), "variance_epsilon", "weight"),
    _Norm(
        frozenset(["_norm", "float", "weight", "type_as"]),
        "eps",
        "input",
        offset=1.0,
        constant=1.0,
        inner=frozenset(["torch", "rsqrt", "pow", "mean", "eps"]),
    ),
)


def _norm(module: nn.Module) -> Replacement | None:
    for form in NORMS:
        way = _matching(type(module).forward, form.matches)
        if way is not None and (
            not form.inner or names_of(getattr(type(module), "_norm", None)) == form.inner
        ):
            return _replacing("RMS norm", way, _rms_norm_forward(form))
    return None


@functools.cache
def _rms_norm_forward(form: _Norm) -> Callable[..., Any]:
    def forward(self: Any, x: Any) -> Any:
        weight = self.weight
        shape, eps = weight.shape, getattr(self, form.eps)
        if form.dtype == "input":
            return rms_norm(x, shape, weight, eps, offset=form.offset)
        out = torch.promote_types(x.dtype, weight.dtype)
        if weight.dtype != x.dtype:
            x, weight = x.to(out), weight.to(out)
        y = rms_norm(x, shape, weight, eps, offset=form.offset)
        half = form.dtype == "weight" and self.weight.dtype in (torch.float16, torch.bfloat16)
        return y.to(self.weight.dtype) if half else y

    return forward


# -- gated products ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Gated:
    """A gated MLP by the attributes of its parts; with `packed` one projection gives gate and up side by side."""

    names: frozenset[str]
    act: str
    down: str
    gate: str = ""
    up: str = ""
    packed: str = ""
    dropout: str = ""
    follows_down: bool = False  # the product is cast to the dtype of the last projection's weight

    def matches(self, forward: FunctionType) -> bool:
        return names_of(forward) == self.names and _takes_one(forward.__code__)


GATED = (
    _Gated(
        frozenset(["gate_proj", "up_proj", "down_proj", "act_fn"]),
        "act_fn",
        "down_proj",
        "gate_proj",
        "up_proj",
    ),
    _Gated(
        frozenset(["gate_up_proj", "chunk", "activation_fn", "down_proj"]),
        "activation_fn",
        "down_proj",
        packed="gate_up_proj",
    ),
    _Gated(frozenset(["Wi", "chunk", "act", "drop", "Wo"]), "act", "Wo", packed="Wi", dropout="drop"),
    _Gated(
        frozenset(
            [
                "wi_0",
                "wi_1",
                "act",
                "dropout",
                "wo",
                "weight",
                "torch",
                "Tensor",
                "dtype",
                "int8",
                "to",
                "isinstance",
            ]
        ),
        "act",
        "wo",
        "wi_0",
        "wi_1",
        dropout="dropout",
        follows_down=True,
    ),
)


def _gate_kind(act: Any) -> str | None:
    """Which gated op has `act` (a module of torch or transformers, or a function) as its gate, or None."""
    name = type(act).__name__
    if name in ("SiLU", "SiLUActivation") or act is torch.nn.functional.silu:
        return "silu"
    if name == "GELU":
        return "gelu" if act.approximate == "none" else "gelu_tanh"
    return {"GELUActivation": "gelu", "GELUTanh": "gelu_tanh", "NewGELUActivation": "gelu_tanh"}.get(name)


_PRODUCTS: dict[str, Callable[[Any, Any], Any]] = {
    "silu": swiglu,
    "gelu": geglu,
    "gelu_tanh": functools.partial(geglu, approximate="tanh"),
}
_LABELS = {"silu": "SwiGLU", "gelu": "GeGLU", "gelu_tanh": "GeGLU (tanh)"}


def _gated(module: nn.Module) -> Replacement | None:
    for form in GATED:
        way = _matching(type(module).forward, form.matches)
        if way is not None and hasattr(module, form.act):
            kind = _gate_kind(getattr(module, form.act))
            if kind is None:
                name = type(getattr(module, form.act)).__name__
                return Replacement(
                    "gated MLP", reason=f"there is no gated product with the activation {name}"
                )
            return _replacing(f"{_LABELS[kind]} MLP", way, _gated_forward(form, kind), inside=(form.act,))
    return None


@functools.cache
def _gated_forward(form: _Gated, kind: str) -> Callable[..., Any]:
    product = _PRODUCTS[kind]

    def forward(self: Any, x: Any) -> Any:
        if form.packed:
            gate, up = getattr(self, form.packed)(x).chunk(2, dim=-1)
        else:
            gate, up = getattr(self, form.gate)(x), getattr(self, form.up)(x)
        h = product(gate, up)
        if form.dropout:
            h = getattr(self, form.dropout)(h)
        down = getattr(self, form.down)
        if form.follows_down:
            weight = getattr(
                down, "weight", None
            )  # a wrapped or quantised projection may have none, or integers
            if isinstance(weight, torch.Tensor) and weight.is_floating_point():
                h = h.to(weight.dtype)
        return down(h)

    return forward


def _experts(module: nn.Module) -> Replacement | None:
    """Experts whose gate is a method of its own; the eager loop over experts has its gate written inline."""
    gate = getattr(type(module), "_apply_gate", None)
    if gate is None or not getattr(module, "has_gate", False):
        return None
    what = "gated product of the experts"
    way = _matching(
        gate, lambda method: names_of(method) == {"chunk", "act_fn"} and _takes_one(method.__code__)
    )
    if way is None:
        return Replacement(what, reason=f"{type(module).__name__} has a gate of its own")
    kind = _gate_kind(module.act_fn)
    if kind is None:
        name = type(module.act_fn).__name__
        return Replacement(what, reason=f"there is no gated product with the activation {name}")
    if getattr(module.config, "_experts_implementation", None) in (None, "eager"):
        return Replacement(
            what,
            reason='the eager loop over experts has no gate to replace: set_experts_implementation("grouped_mm")',
        )
    return _replacing(f"{_LABELS[kind]} of the experts", way, _packed_gate(kind), attribute="_apply_gate")


@functools.cache
def _packed_gate(kind: str) -> Callable[..., Any]:
    product = _PRODUCTS[kind]

    def apply_gate(self: Any, x: Any) -> Any:
        return product(*x.chunk(2, dim=-1))

    return apply_gate


# -- activations that transformers writes out -------------------------------------------------------------------------

_ACTIVATIONS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "NewGELUActivation": ("GELU (tanh)", functools.partial(gelu, approximate="tanh")),
    "QuickGELUActivation": ("QuickGELU", quick_gelu),
    "ReLUSquaredActivation": ("ReLU²", relu2),
}


def _activation(module: nn.Module) -> Replacement | None:
    found = _ACTIVATIONS.get(type(module).__name__)
    return None if found is None else Replacement(found[0], _activation_forward(type(module).__name__))


@functools.cache
def _activation_forward(name: str) -> Callable[..., Any]:
    function = _ACTIVATIONS[name][1]

    def forward(self: Any, input: Any) -> Any:
        return function(input)

    return forward


# -- rotary -----------------------------------------------------------------------------------------------------------

ROTARY = "apply_rotary_pos_emb"
# names used by the known forms, all of which rotate the two halves of the first cos.shape[-1] features
_ROTARY_NAMES = frozenset(["unsqueeze", "rotate_half", "shape", "torch", "cat", "dtype", "float", "to"])
_HALF_NAMES = frozenset(["shape", "torch", "cat"])


def apply_rotary(q: Any, k: Any, cos: Any, sin: Any, unsqueeze_dim: int = 1) -> tuple[Any, Any]:
    """What the model files call ``apply_rotary_pos_emb``, by the fused op."""
    return rotary(q, cos, sin, unsqueeze_dim=unsqueeze_dim), rotary(k, cos, sin, unsqueeze_dim=unsqueeze_dim)


_PARAMETERS = apply_rotary.__code__.co_varnames[: apply_rotary.__code__.co_argcount]


def _rotates_halves(function: FunctionType) -> bool:
    code = function.__code__
    half = function.__globals__.get("rotate_half")
    same = code.co_varnames[: code.co_argcount] == _PARAMETERS and function.__defaults__ == (1,)
    return same and "rotate_half" in names_of(function) <= _ROTARY_NAMES and names_of(half) == _HALF_NAMES


def _asks_the_registry(forward: FunctionType) -> bool:
    return {"ALL_ATTENTION_FUNCTIONS", "get_interface"} <= names_of(forward)


def uses_attention_interface(module: nn.Module) -> bool:
    """Whether the module's forward asks transformers' attention registry."""
    return _matching(module.__dict__.get("forward", type(module).forward), _asks_the_registry) is not None


def _rotary(module: nn.Module) -> Replacement | None:
    way = _matching(type(module).forward, _asks_the_registry)
    if way is None:
        return None
    forward = way[-1]
    code = forward.__code__
    if ROTARY not in code.co_names:
        words = {*code.co_names, *code.co_varnames}
        if words & {"position_embeddings", "rotary_emb", "cos"} or any("rotary" in word for word in words):
            return Replacement(
                "rotary", reason=f"rotary: {forward.__qualname__} applies it in an unknown form"
            )
        return None
    original = forward.__globals__.get(ROTARY)
    inner = _matching(original, _rotates_halves)
    fused = None if inner is None else around(inner, apply_rotary)
    if fused is None:
        return Replacement("rotary", reason=f"rotary: {ROTARY} of {forward.__module__} has an unknown form")
    return _replacing("rotary", way, with_globals(forward, ROTARY, fused))


@functools.cache
def with_globals(function: FunctionType, name: str, value: Any) -> FunctionType:
    """`function` with one of its global names bound to `value`; its module stays as it is."""
    namespace = {**function.__globals__, name: value}
    # without a module name torch.compile guards on this namespace and not on the module's, whose entry differs
    del namespace["__name__"]
    body = FunctionType(
        function.__code__, namespace, function.__name__, function.__defaults__, function.__closure__
    )
    body.__kwdefaults__ = function.__kwdefaults__
    body.__qualname__, body.__module__ = function.__qualname__, function.__module__
    return body


_FINDERS = (_norm, _gated, _experts, _activation, _rotary)


def find(module: nn.Module) -> Replacement | None:
    """The replacement for a module, one with a reason where its form is not known, or None where there is nothing."""
    return next((found for finder in _FINDERS if (found := finder(module)) is not None), None)
