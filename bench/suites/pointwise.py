"""Suites `norm`, `activation` and `rotary`: the memory-bound ops against torch's plain ones."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from aajr_kernels.dual import Dual
from aajr_kernels.ops.activation import gelu, silu, swiglu
from aajr_kernels.ops.norm import layer_norm, rms_norm
from aajr_kernels.ops.rotary import rotary

from ..case import Case, Gradients, Run, Selection, Suite, Variant, draw, has_kernels, portion, true_portion
from ..counting import operations

#: positions -> features of ``[2, positions, features]``
SHAPES = {2048: 2048, 512: 384}
ROTARY_HEAD = 64
EPS = 1e-5


@dataclass(frozen=True)
class Op:
    """An op to be measured.

    Attributes:
        suite: op package and suite.
        inputs: how many arguments are stacked.
        weights: how many vectors of parameters follow them.
        dual: our op, also on a plain tensor; takes inputs, then weights.
        plain: torch's own function.
        formula: the same from elementary operations, as model code writes it.
    """

    suite: str
    inputs: int
    weights: int
    dual: Callable[..., Any]
    plain: Callable[..., Tensor]
    formula: Callable[..., Tensor]


def _last(x: Any) -> tuple[int]:
    return (x.shape[-1],)


def _rms_formula(x: Tensor, w: Tensor) -> Tensor:
    wide = x.float() if x.dtype != torch.float64 else x
    return w * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype)


def _layer_formula(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return w * (centred * torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + EPS)) + b


def _gelu_formula(x: Tensor) -> Tensor:
    return 0.5 * x * (1.0 + torch.erf(x * 0.5**0.5))


def _gelu_tanh_formula(x: Tensor) -> Tensor:
    return 0.5 * x * (1.0 + torch.tanh((2.0 / torch.pi) ** 0.5 * (x + 0.044715 * x.pow(3))))


def _rotary_formula(x: Tensor) -> Tensor:
    tables = _tables(x.shape[-2], x.dtype == torch.float64, x.device)
    cos, sin = (t.to(x.dtype).unsqueeze(1) for t in tables)
    turned = torch.cat((-x[..., ROTARY_HEAD // 2 :], x[..., : ROTARY_HEAD // 2]), dim=-1)
    return x * cos + turned * sin


@functools.lru_cache(maxsize=4)
def _tables(length: int, double: bool = False, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """cos and sin ``[1, N, D]``, float32 numbers as in Hugging Face."""
    speed = 10000.0 ** (-torch.arange(0, ROTARY_HEAD, 2).float() / ROTARY_HEAD)
    angle = torch.outer(torch.arange(length).float(), speed).repeat(1, 2).unsqueeze(0)
    cos, sin = angle.cos().to(device), angle.sin().to(device)
    return (cos.double(), sin.double()) if double else (cos, sin)


def _rotary(x: Any) -> Any:
    return rotary(x, *_tables(x.shape[-2], device=x.device))


OPS = {
    "rms_norm": Op(
        "norm",
        1,
        1,
        lambda x, w: rms_norm(x, _last(x), w, EPS),
        lambda x, w: F.rms_norm(x, _last(x), w, EPS),
        _rms_formula,
    ),
    "layer_norm": Op(
        "norm",
        1,
        2,
        lambda x, w, b: layer_norm(x, _last(x), w, b, EPS),
        lambda x, w, b: F.layer_norm(x, _last(x), w, b, EPS),
        _layer_formula,
    ),
    "swiglu": Op(
        "activation", 2, 0, swiglu, lambda g, u: F.silu(g) * u, lambda g, u: g * torch.sigmoid(g) * u
    ),
    "gelu": Op("activation", 1, 0, gelu, F.gelu, _gelu_formula),
    "gelu_tanh": Op(
        "activation",
        1,
        0,
        lambda x: gelu(x, "tanh"),
        lambda x: F.gelu(x, approximate="tanh"),
        _gelu_tanh_formula,
    ),
    "silu": Op("activation", 1, 0, silu, F.silu, lambda x: x * torch.sigmoid(x)),
    "rotary": Op("rotary", 1, 0, _rotary, _rotary_formula, _rotary_formula),
}


def _cases(suite: str, selection: Selection) -> list[Case]:
    return [
        _case(family, op, dtype, n, selection)
        for family, op in OPS.items()
        if op.suite == suite and selection.wants(family)
        for dtype, n in selection.grid(("float32", "bfloat16"), tuple(SHAPES))
    ]


def _case(family: str, op: Op, dtype: str, length: int, selection: Selection) -> Case:
    features = SHAPES.get(length, 384)
    # what has to move: inputs in and results out; inputs and cotangents in and gradients out
    streams = {"forward": op.inputs + 1, "backward": 2 * op.inputs + 1, "both": 3 * op.inputs + 2}
    item = getattr(torch, dtype).itemsize
    moved = 2.0 * length * features * item * streams[selection.part]
    count = functools.partial(_operations, family, selection.part, length * features)
    plain, dual = count(False), count(True)
    judge = functools.partial(functools.partial, op=op, features=features, dtype=dtype, part=selection.part)
    make = functools.partial(judge, device=selection.device)
    exact, truth = judge(_truth, stacked=True), judge(_truth, stacked=False)
    variants = [Variant("plain", make(_plain, function=op.plain), truth, flops=plain, bytes=moved)]
    if op.plain is not op.formula:
        variants.append(
            Variant(
                "plain, written out",
                make(_plain, function=op.formula),
                truth,
                exact=False,
                flops=plain,
                bytes=moved,
            )
        )
    variants.append(Variant("dual", make(_dual), exact, flops=dual, bytes=2 * moved))
    if has_kernels(op.suite, selection.device):
        variants.append(
            Variant(
                "dual, reference",
                make(_dual),
                exact,
                backend="reference",
                flops=dual,
                bytes=2 * moved,
                rounds=5,
                peak=False,
            )
        )
    return Case(
        op.suite,
        family,
        dtype,
        length,
        tuple(variants),
        base=("plain",),
        config={"shape": [2, length, features]},
        gate_length=min(length, 67),
        repeats=10,
        part=selection.part,
        device=selection.device,
        why="the dual ÷ torch's plain op (twice the memory traffic)",
    )


def _operations(family: str, part: str, numbers: int, stacked: bool) -> float:
    """Arithmetic of the op's formula on two rows of so many numbers, scaled up from small ones."""
    op = OPS[family]
    stacks, weights, cotangent = inputs(8, op, ROTARY_HEAD, "float32")
    leaves = [(x if stacked else x[0].clone()).requires_grad_() for x in stacks]
    formula = lambda *xs: op.formula(*xs, *weights)
    counted = operations(formula, leaves, cotangent if stacked else cotangent[0], part, stacked)
    return counted / leaves[0][0 if stacked else slice(None)].numel() * 2.0 * numbers


def inputs(
    length: int, op: Op, features: int, dtype: str, device: str = "cpu"
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Stacked inputs, weights, and the cotangent like an input."""
    shape: tuple[int, ...] = (2, 2, length, features)
    if op.suite == "rotary":
        shape = (2, 2, features // ROTARY_HEAD, length, ROTARY_HEAD)
    stacks = [draw(*shape, dtype=dtype, seed=i).to(device) for i in range(op.inputs)]
    weights = [draw(features, dtype=dtype, seed=10 + i).to(device) for i in range(op.weights)]
    return stacks, weights, draw(*shape, dtype=dtype, seed=20).to(device)


def _plain(
    length: int, op: Op, features: int, dtype: str, part: str, device: str, function: Callable[..., Tensor]
) -> Run:
    stacks, weights, cotangent = inputs(length, op, features, dtype, device)
    leaves = [x.requires_grad_() for x in [*(x[0].clone() for x in stacks), *weights]]
    return portion(lambda: function(*leaves), leaves, cotangent[0], part)


def _dual(length: int, op: Op, features: int, dtype: str, part: str, device: str) -> Run:
    stacks, weights, cotangent = inputs(length, op, features, dtype, device)
    leaves = [x.requires_grad_() for x in [*stacks, *weights]]

    def forward() -> Tensor:
        out: Tensor = op.dual(*(Dual(x) for x in leaves[: op.inputs]), *leaves[op.inputs :]).stacked
        return out

    return portion(forward, leaves, cotangent, part)


def _truth(length: int, op: Op, features: int, dtype: str, part: str, stacked: bool) -> Gradients:
    stacks, weights, cotangent = inputs(length, op, features, dtype)
    vectors = [w.double().requires_grad_() for w in weights]
    function = lambda *xs: op.formula(*xs, *vectors)
    if not stacked:
        leaves = [x[0].double().requires_grad_() for x in stacks]
        return true_portion(function(*leaves), [*leaves, *vectors], cotangent[0].double(), part)
    leaves = [x.double().requires_grad_() for x in stacks]
    pair = torch.func.jvp(function, tuple(x[0] for x in leaves), tuple(x[1] for x in leaves))
    return true_portion(torch.stack(pair), [*leaves, *vectors], cotangent.double(), part)


def _suite(name: str, summary: str) -> Suite:
    families = tuple(family for family, op in OPS.items() if op.suite == name)
    return Suite(name, summary, families, functools.partial(_cases, name))


SUITES = (
    _suite("norm", "RMSNorm and LayerNorm, [2, 2048, 2048] and [2, 512, 384]"),
    _suite("activation", "SwiGLU, GELU and SiLU, [2, 2048, 2048] and [2, 512, 384]"),
    _suite("rotary", "rotary embedding, heads of 64, [2, 2048, 2048] and [2, 512, 384]"),
)
