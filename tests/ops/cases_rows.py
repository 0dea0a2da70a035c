"""Cases of the ops that work row by row: norms, activations, gated products, rotary, linear, sensitivities."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from ops.op_checks import stacks
from ops.suite import Case, flipped, gap, stacked, swapped
from torch import Tensor

import aajr_kernels as aajr
from aajr_kernels import Dual
from aajr_kernels.ops import activation
from aajr_kernels.ops.sensitivity import METRICS, sensitivity
from aajr_kernels.testing import formulas
from aajr_kernels.testing.oracle import metric_values

EPS = 1e-3


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


# ------------------------------------------------------------------------------------------------------- norms
def rms_formula(dims=1, offset=0.0):
    return lambda x, w=None: formulas.rms_norm(x, x.shape[-dims:], w, EPS, offset)


def layer_formula(x, w=None, b=None):
    return formulas.layer_norm(x, x.shape[-1:], w, b, EPS)


def in_float32(formula):
    # as the eager code of the models does: widen, normalise, round once
    return lambda x, *w: formula(x.float(), *(v.float() for v in w)).to(x.dtype)


def rms(name, size, count=1, batch=(2, 3), offset=0.0, scale=1.0, **options):
    formula = rms_formula(offset=offset)
    return stacked(
        "norm",
        f"rms {name}",
        lambda x, *w: aajr.rms_norm(x, size, *w, eps=EPS, offset=offset),
        formula,
        lambda k: ([stacks(*batch, size, k=k, scale=scale)], [randn(size) for _ in range(count)]),
        eager=in_float32(formula),
        **options,
    )


def layer(name, size, count=2, batch=(2, 3), mean=0.0, **options):
    def build(k):
        x = stacks(*batch, size, k=k)
        x[0] += mean
        return [x], [randn(size) for _ in range(count)]

    op = lambda x, *w: aajr.layer_norm(x, size, *w, eps=EPS)
    return stacked(
        "norm", f"layer {name}", op, layer_formula, build, eager=in_float32(layer_formula), **options
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
    stacked(
        "norm",
        "rms of two axes",
        lambda x, w: aajr.rms_norm(x, (4, 9), w, EPS),
        rms_formula(2),
        lambda k: ([stacks(5, 4, 9, k=k)], [randn(4, 9)]),
        eager=in_float32(rms_formula(2)),
    ),
    layer("2", 2, ulps=CANCELS),
    layer("37, no weight", 37, 0),
    layer("252, weight alone", 252, 1),
    layer("507 in rows with gaps", 507, layout=gap),
    layer("64, mean 100", 64, mean=100.0),
    layer("float32 weight and bias", 96, wide=(0, 1)),
    stacked(
        "norm",
        "layer, bias alone",
        lambda x, b: aajr.layer_norm(x, 33, None, b, EPS),
        lambda x, b: layer_formula(x, None, b),
        lambda k: ([stacks(7, 33, k=k)], [randn(33)]),
        eager=in_float32(lambda x, b: layer_formula(x, None, b)),
    ),
]

# ------------------------------------------------------------------------------------------------- activations
POINTWISE = {
    "gelu": (aajr.gelu, F.gelu),
    "gelu_tanh": (lambda x: aajr.gelu(x, "tanh"), lambda x: F.gelu(x, approximate="tanh")),
    "silu": (aajr.silu, F.silu),
    "quick_gelu": (activation.quick_gelu, lambda x: x * torch.sigmoid(1.702 * x)),
    "relu": (activation.relu, F.relu),
    "relu2": (activation.relu2, lambda x: F.relu(x).square()),
    "tanh": (activation.tanh, torch.tanh),
    "sigmoid": (activation.sigmoid, torch.sigmoid),
}
FORMULAS = {
    "gelu": formulas.gelu,
    "gelu_tanh": lambda x: formulas.gelu(x, "tanh"),
    "silu": formulas.silu,
    "quick_gelu": formulas.quick_gelu,
    "relu": formulas.relu,
    "relu2": formulas.relu2,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
}
GATES = {
    "silu": aajr.swiglu,
    "gelu": aajr.geglu,
    "gelu_tanh": lambda g, u: aajr.geglu(g, u, "tanh"),
}


def pointwise(kind, name, *shape, **options):
    ours, eager = POINTWISE[kind]
    build = lambda k: ([stacks(*shape, k=k, scale=2.0)], [])
    return stacked("activation", f"{kind} {name}", ours, FORMULAS[kind], build, eager=eager, **options)


def gated(kind, name, *shape, tangents=(True, True), **options):
    build = lambda k: ([stacks(*shape, k=k if moves else 0, scale=1.5) for moves in tangents], [])
    formula = lambda g, u: FORMULAS[kind](g) * u
    eager = lambda g, u: POINTWISE[kind][1](g) * u
    return stacked("activation", f"gated {kind} {name}", GATES[kind], formula, build, eager=eager, **options)


ACTIVATION = [
    *(pointwise(kind, "3x37", 3, 37) for kind in POINTWISE),
    pointwise("gelu", "one number"),
    pointwise("silu", "rows with gaps", 2, 3, 507, layout=gap),
    pointwise("gelu", "last axis not dense", 2, 4, 9, layout=flipped),
    *(gated(kind, "2x5x252", 2, 5, 252) for kind in GATES),
    gated("silu", "rows with gaps", 3, 65, layout=gap),
    gated("silu", "last axis not dense", 3, 4, 9, layout=flipped),
    gated("silu", "gate alone moves", 3, 37, tangents=(True, False)),
    gated("gelu", "up alone moves", 3, 37, tangents=(False, True)),
]


# ------------------------------------------------------------------------------------------------------ rotary
def rotary(name, shape, table, interleaved=False, axis=1, **options):
    return stacked(
        "rotary",
        name,
        lambda x, c, s: aajr.rotary(x, c, s, interleaved=interleaved, unsqueeze_dim=axis),
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


# ------------------------------------------------------------------------------------------------------ linear
def linear(name, batch, sizes, bias=True, **options):
    build = lambda k: (
        [stacks(*batch, sizes[0], k=k)],
        [randn(sizes[1], sizes[0]), *([randn(sizes[1])] if bias else [])],
    )
    return stacked("linear", name, aajr.linear, F.linear, build, **options)


LINEAR = [
    linear("37 to 65", (2, 7), (37, 65)),
    linear("without bias", (17,), (252, 123), bias=False),
    linear("1 to 1", (3,), (1, 1)),
    linear("one row", (), (64, 33)),
    linear("rows with gaps", (2, 3), (20, 12), layout=gap),
    linear("last axis not dense", (3, 6), (8, 5), layout=flipped),
]


# ---------------------------------------------------------------------------------------------------- reduction
def reduction(metric, name, *shape, scale=2.0, **options):
    return Case(
        "sensitivity",
        f"{metric} {name}",
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
    reduction("fisher", "one row", 252),
    reduction("fisher", "large logits", 5, 65, scale=30.0),
    reduction("probs", "last axis not dense", 3, 4, 9, layout=flipped),
]

CASES = [*NORM, *ACTIVATION, *ROTARY, *LINEAR, *REDUCE]
