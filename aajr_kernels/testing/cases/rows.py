"""Cases of the ops that work row by row: norms, activations, gated products, rotary, linear, sensitivities."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...dual import Dual
from ...ops import activation
from ...ops.linear import linear as linear_op
from ...ops.norm import add_layer_norm, add_rms_norm, layer_norm, rms_norm
from ...ops.rotary import rotary as rotary_op
from ...ops.sensitivity import METRICS, sensitivity
from .. import formulas, oracle
from ..oracle import metric_values
from .case import Case, flipped, gap, stacked, stacks, swapped

EPS = 1e-3
Formula = Callable[..., Tensor]


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


# -- norms ----------------------------------------------------------------------------------------------------------
def rms_formula(dims: int = 1, offset: float = 0.0) -> Formula:
    return lambda x, w=None: oracle.rms_norm(x, x.shape[-dims:], None if w is None else w + offset, EPS)


def layer_formula(dims: int = 1) -> Formula:
    return lambda x, w=None, b=None: oracle.layer_norm(x, x.shape[-dims:], w, b, EPS)


def in_float32(formula: Formula) -> Formula:
    # as the eager code of the models does: widen, normalise, round once
    return lambda x, *w: formula(x.float(), *(v.float() for v in w)).to(x.dtype)


def rms(
    name: str,
    size: int,
    count: int = 1,
    batch: Sequence[int] = (2, 3),
    offset: float = 0.0,
    scale: float = 1.0,
    **options: Any,
) -> Case:
    formula = rms_formula(offset=offset)
    return stacked(
        *("norm", f"rms {name}", "rms_norm", "x weight"),
        lambda x, w=None: rms_norm(x, size, w, EPS, offset=offset),
        formula,
        lambda k: ([stacks(*batch, size, k=k, scale=scale)], [randn(size) for _ in range(count)]),
        eager=in_float32(formula),
        **options,
    )


def layer(
    name: str, size: int, count: int = 2, batch: Sequence[int] = (2, 3), mean: float = 0.0, **options: Any
) -> Case:
    def build(k: int) -> tuple[list[Tensor], list[Tensor]]:
        x = stacks(*batch, size, k=k)
        x[0] += mean
        return [x], [randn(size) for _ in range(count)]

    op: Formula = lambda x, w=None, b=None: layer_norm(x, size, w, b, EPS)
    names = ("norm", f"layer {name}", "layer_norm", "x weight bias")
    return stacked(*names, op, layer_formula(), build, eager=in_float32(layer_formula()), **options)


def two_axes(public: str, op: Callable[..., Any], formula: Formula, count: int) -> Case:
    build = lambda k: ([stacks(5, 4, 9, k=k)], [randn(4, 9) for _ in range(count)])
    names = ("norm", f"{public.split('_')[0]} of two axes", public, "x weight bias")
    ours = lambda x, *w: op(x, (4, 9), *w, eps=EPS)
    return stacked(*names, ours, formula, build, eager=in_float32(formula))


def added(name: str, kind: str, size: int, count: int, batch: Sequence[int] = (2, 3), **options: Any) -> Case:
    """The norm of a sum, beside the sum; as one output of twice the features."""
    op: Callable[..., Any] = add_rms_norm if kind == "rms" else add_layer_norm
    norm = rms_formula() if kind == "rms" else layer_formula()

    def joined(x: Any, residual: Any, *w: Tensor) -> Any:
        return torch.cat(op(x, residual, size, *w, eps=EPS), -1)

    def formula(x: Tensor, residual: Tensor, *w: Tensor) -> Tensor:
        return torch.cat([norm(x + residual, *w), x + residual], -1)

    return stacked(
        *("norm", f"add {kind} {name}", f"add_{kind}_norm", "x residual weight bias"),
        joined,
        formula,
        lambda k: (
            [stacks(*batch, size, k=k), stacks(*batch, size, k=k)],
            [randn(size) for _ in range(count)],
        ),
        **options,
    )


# the derivative of a norm of one or two features is a difference of nearly equal terms
CANCELS = 128.0

NORM = [
    rms("1", 1, ulps=CANCELS),
    rms("37, no weight", 37, 0),
    rms("252, offset", 252, offset=1.0),
    rms("507 in rows with gaps", 507, layout=gap),
    rms("65, large", 65, scale=1e3),
    rms("37, heads cut out of rows", 37, batch=(2, 3, 5), layout=swapped),
    rms("36, last axis not dense", 36, layout=flipped),
    rms("one row", 64, batch=()),
    rms("float32 weight", 96, wide=(0,)),
    rms("611 rows of 252", 252, batch=(611,), large=True),
    two_axes("rms_norm", rms_norm, rms_formula(2), 1),
    layer("2", 2, ulps=CANCELS),
    layer("37, no weight", 37, 0),
    layer("252, weight alone", 252, 1),
    layer("507 in rows with gaps", 507, layout=gap),
    layer("64, mean 100", 64, mean=100.0),
    layer("2, no weight, mean 10", 2, 0, mean=10.0),
    layer("701, mean 1,000", 701, mean=1e3),
    layer("float32 weight and bias", 96, wide=(0, 1)),
    layer("611 rows of 252", 252, batch=(611,), large=True),
    two_axes("layer_norm", layer_norm, layer_formula(2), 2),
    stacked(
        *("norm", "layer, bias alone", "layer_norm", "x bias"),
        lambda x, b: layer_norm(x, 33, None, b, EPS),
        lambda x, b: layer_formula()(x, None, b),
        lambda k: ([stacks(7, 33, k=k)], [randn(33)]),
        eager=in_float32(lambda x, b: layer_formula()(x, None, b)),
    ),
    added("37", "rms", 37, 1),
    added("21, no weight", "rms", 21, 0),
    added("65 in rows with gaps", "rms", 65, 1, layout=gap),
    added("611 rows of 252", "rms", 252, 1, batch=(611,), large=True),
    added("37", "layer", 37, 2),
    added("21, no weight", "layer", 21, 0),
    added("65 in rows with gaps", "layer", 65, 2, layout=gap),
    added("611 rows of 252", "layer", 252, 2, batch=(611,), large=True),
]

# -- activations ----------------------------------------------------------------------------------------------------
#: kind -> public name, ours, as a model computes it, formula
POINTWISE: dict[str, tuple[str, Callable[..., Any], Formula, Formula]] = {
    "gelu": ("gelu", activation.gelu, F.gelu, formulas.gelu),
    "gelu_tanh": (
        "gelu",
        lambda x: activation.gelu(x, "tanh"),
        lambda x: F.gelu(x, approximate="tanh"),
        lambda x: formulas.gelu(x, "tanh"),
    ),
    "silu": ("silu", activation.silu, F.silu, formulas.silu),
    "quick_gelu": (
        "quick_gelu",
        activation.quick_gelu,
        lambda x: x * torch.sigmoid(1.702 * x),
        formulas.quick_gelu,
    ),
    "relu": ("relu", activation.relu, F.relu, formulas.relu),
    "relu2": ("relu2", activation.relu2, lambda x: F.relu(x).square(), formulas.relu2),
    "tanh": ("tanh", activation.tanh, torch.tanh, torch.tanh),
    "sigmoid": ("sigmoid", activation.sigmoid, torch.sigmoid, torch.sigmoid),
}
GATES: dict[str, tuple[str, Callable[..., Any]]] = {
    "silu": ("swiglu", activation.swiglu),
    "gelu": ("geglu", activation.geglu),
    "gelu_tanh": ("geglu", lambda g, u: activation.geglu(g, u, "tanh")),
}
Build = Callable[[int], tuple[list[Tensor], list[Tensor]]]


def pointwise(kind: str, name: str, *shape: int, build: Build | None = None, **options: Any) -> Case:
    public, ours, eager, formula = POINTWISE[kind]
    build = build or (lambda k: ([stacks(*shape, k=k, scale=2.0)], []))
    return stacked("activation", f"{kind} {name}", public, "x", ours, formula, build, eager=eager, **options)


def far(k: int) -> tuple[list[Tensor], list[Tensor]]:
    """Large values, and zeros of both signs."""
    x = torch.cat([stacks(31, k=k, scale=8.0), stacks(4, k=k)], -1)
    x[0, 31:] = torch.tensor([0.0, -0.0, 30.0, -30.0], dtype=torch.float64)
    return [x], []


def gated(
    kind: str,
    name: str,
    *shape: int,
    tangents: Sequence[bool] = (True, True),
    scale: float = 1.5,
    **options: Any,
) -> Case:
    _, _, activated, formula = POINTWISE[kind]
    public, ours = GATES[kind]
    build: Build = lambda k: ([stacks(*shape, k=k if moves else 0, scale=scale) for moves in tangents], [])
    return stacked(
        *("activation", f"gated {kind} {name}", public, "gate up"),
        ours,
        lambda g, u: formula(g) * u,
        build,
        eager=lambda g, u: activated(g) * u,
        **options,
    )


ACTIVATION = [
    *(pointwise(kind, "3x37", 3, 37) for kind in POINTWISE),
    *(pointwise(kind, "large values and zeros", build=far) for kind in POINTWISE),
    *(pointwise(kind, "701x129", 701, 129, large=True) for kind in POINTWISE),
    pointwise("gelu", "one number"),
    pointwise("silu", "rows with gaps", 2, 3, 507, layout=gap),
    pointwise("gelu", "last axis not dense", 2, 4, 9, layout=flipped),
    *(gated(kind, "2x5x252", 2, 5, 252) for kind in GATES),
    *(gated(kind, "large gates", 41, scale=8.0) for kind in GATES),
    *(gated(kind, "701x129", 701, 129, large=True) for kind in GATES),
    gated("silu", "rows with gaps", 3, 65, layout=gap),
    gated("silu", "last axis not dense", 3, 4, 9, layout=flipped),
    gated("silu", "gate alone moves", 3, 37, tangents=(True, False)),
    gated("gelu", "up alone moves", 3, 37, tangents=(False, True)),
]


# -- rotary ---------------------------------------------------------------------------------------------------------
def rotary(
    name: str,
    shape: Sequence[int],
    table: Sequence[int],
    interleaved: bool = False,
    axis: int = 1,
    **options: Any,
) -> Case:
    return stacked(
        *("rotary", name, "rotary", "x cos sin"),
        lambda x, c, s: rotary_op(x, c, s, interleaved=interleaved, unsqueeze_dim=axis),
        lambda x, c, s: formulas.rotary(x, c.to(x.dtype), s.to(x.dtype), interleaved, axis),
        lambda k: ([stacks(*shape, k=k)], [randn(*table), randn(*table)]),
        **options,
    )


ROTARY = [
    rotary("halves", (2, 3, 5, 64), (2, 5, 64)),
    rotary("neighbours", (2, 3, 5, 64), (2, 5, 64), interleaved=True),
    rotary("part of the features", (2, 3, 7, 37), (2, 7, 6)),
    rotary("part of the features, neighbours", (2, 3, 7, 37), (2, 7, 10), interleaved=True),
    rotary("smallest", (1, 1, 1, 2), (1, 1, 2)),
    rotary("one table for the batch", (2, 3, 5, 20), (1, 5, 20)),
    rotary("heads last", (2, 5, 3, 36), (2, 5, 36), axis=2),
    rotary("heads cut out of rows", (2, 3, 5, 32), (2, 5, 32), layout=swapped),
    rotary("last axis not dense", (2, 3, 5, 8), (2, 5, 8), layout=flipped),
    rotary("rows with gaps, float32 tables", (2, 3, 5, 26), (2, 5, 26), layout=gap, wide=(0, 1)),
]


# -- linear ---------------------------------------------------------------------------------------------------------
def linear(
    name: str, batch: Sequence[int], sizes: tuple[int, int], bias: bool = True, **options: Any
) -> Case:
    def build(k: int) -> tuple[list[Tensor], list[Tensor]]:
        return [stacks(*batch, sizes[0], k=k)], [
            randn(sizes[1], sizes[0]),
            *([randn(sizes[1])] if bias else []),
        ]

    return stacked("linear", name, "linear", "x weight bias", linear_op, F.linear, build, **options)


LINEAR = [
    linear("37 to 65", (2, 7), (37, 65)),
    linear("without bias", (17,), (252, 123), bias=False),
    linear("1 to 1", (3,), (1, 1)),
    linear("one row", (), (64, 33)),
    linear("rows with gaps", (2, 3), (20, 12), layout=gap),
    linear("last axis not dense", (3, 6), (8, 5), layout=flipped),
    linear("253 rows, 252 to 131", (253,), (252, 131), large=True),
]


# -- sensitivity ----------------------------------------------------------------------------------------------------
def reduction(metric: str, name: str, *shape: int, scale: float = 2.0, **options: Any) -> Case:
    return Case(
        *("sensitivity", f"{metric} {name}", "sensitivity", ("y",)),
        lambda k: ([stacks(*shape, k=k, scale=scale)], []),
        lambda s, p: sensitivity(Dual(s[0]), metric),
        lambda s, p: metric_values(s[0][0], s[0][1:], metric),
        rows="each",
        **options,
    )


REDUCE = [
    *(reduction(metric, "5x37", 5, 37) for metric in METRICS),
    *(reduction(metric, "2x3x507, gaps", 2, 3, 507, layout=gap) for metric in METRICS),
    *(reduction(metric, "one class", 4, 1) for metric in METRICS),
    *(reduction(metric, "257x511", 257, 511, large=True) for metric in METRICS),
    reduction("fisher", "one row", 252),
    reduction("fisher", "large logits", 5, 65, scale=30.0),
    reduction("probs", "large logits", 9, 41, scale=8.0),
    reduction("probs", "last axis not dense", 3, 4, 9, layout=flipped),
]

CASES = [*NORM, *ACTIVATION, *ROTARY, *LINEAR, *REDUCE]
