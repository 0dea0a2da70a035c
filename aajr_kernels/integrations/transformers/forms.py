"""The known forms of the layers in transformers' models, and the fused forward of each.

A form is recognised by the names that the code of a module's ``forward`` uses, not by its class: model files copy the
same few lines under many class names, and a changed line shows in the names it uses. What is not recognised is left
as it is.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
from torch import nn

from ...ops.activation import geglu, gelu, quick_gelu, relu2, swiglu
from ...ops.norm import rms_norm
from ...ops.rotary import rotary

__all__ = ["Replacement", "find"]


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


def _names(function: Any) -> frozenset[str]:
    code = getattr(function, "__code__", None)
    return frozenset() if code is None else frozenset(code.co_names)


def _constants(function: Any) -> tuple[Any, ...]:
    return function.__code__.co_consts


# -- norms ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Norm:
    """An RMS norm: its weight offset, the attribute of its epsilon, and how its output dtype follows.

    Attributes:
        dtype: ``"promoted"`` of x and the weight, ``"weight"`` (half precision; else promoted), or ``"input"``.
    """

    names: frozenset[str]
    eps: str
    dtype: str
    offset: float = 0.0
    constant: Any = None


_UPCAST = "to torch float32 pow mean rsqrt variance_epsilon weight dtype"
NORMS = (
    _Norm(frozenset(_UPCAST.split()), "variance_epsilon", "promoted"),
    _Norm(frozenset(f"{_UPCAST} float16 bfloat16".split()), "variance_epsilon", "weight"),
    _Norm(frozenset(["_norm", "float", "weight", "type_as"]), "eps", "input", offset=1.0, constant=1.0),
)


def _norm(module: nn.Module) -> Replacement | None:
    forward = type(module).forward
    for form in NORMS:
        if _names(forward) == form.names and (form.constant is None or form.constant in _constants(forward)):
            return Replacement("RMS norm", _rms_norm_forward(form))
    if type(module).__name__.endswith("RMSNorm") and not isinstance(module, nn.RMSNorm):
        return Replacement("RMS norm", reason=f"{type(module).__name__}.forward has an unknown form")
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
        if _names(type(module).forward) == form.names and hasattr(module, form.act):
            kind = _gate_kind(getattr(module, form.act))
            if kind is None:
                name = type(getattr(module, form.act)).__name__
                return Replacement(
                    "gated MLP", reason=f"there is no gated product with the activation {name}"
                )
            return Replacement(f"{_LABELS[kind]} MLP", _gated_forward(form, kind), inside=(form.act,))
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
    if _names(gate) != {"chunk", "act_fn"}:
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
    return Replacement(f"{_LABELS[kind]} of the experts", _packed_gate(kind), "_apply_gate")


@functools.cache
def _packed_gate(kind: str) -> Callable[..., Any]:
    product = _PRODUCTS[kind]

    def apply_gate(self: Any, gate_up_out: Any) -> Any:
        return product(*gate_up_out.chunk(2, dim=-1))

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


def uses_attention_interface(module: nn.Module) -> bool:
    """Whether the module's forward asks transformers' attention registry."""
    return {"ALL_ATTENTION_FUNCTIONS", "get_interface"} <= _names(type(module).forward)


def _rotary(module: nn.Module) -> Replacement | None:
    forward = type(module).forward
    if not uses_attention_interface(module) or ROTARY not in _names(forward):
        return None
    assert isinstance(forward, FunctionType)
    original = forward.__globals__[ROTARY]
    half = getattr(original, "__globals__", {}).get("rotate_half")
    if not _names(original) or not _names(original) <= _ROTARY_NAMES or _names(half) != _HALF_NAMES:
        return Replacement("rotary", reason=f"{ROTARY} of {forward.__module__} has an unknown form")
    return Replacement("rotary", with_globals(forward, ROTARY, apply_rotary))


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
