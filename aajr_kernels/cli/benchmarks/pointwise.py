"""Suites `norm`, `activation` and `rotary`: the memory-bound ops against torch's plain ones."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...dual import Dual
from ...ops.activation import gelu, silu, swiglu
from ...ops.norm import layer_norm, rms_norm
from ...ops.rotary import rotary
from .case import Case, Gradients, Run, Selection, Suite, Variant, draw, has_native

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
        _case(family, op, dtype, n)
        for family, op in OPS.items()
        if op.suite == suite and selection.wants(family)
        for dtype, n in selection.grid(("float32", "bfloat16"), tuple(SHAPES))
    ]


def _case(family: str, op: Op, dtype: str, length: int) -> Case:
    features = SHAPES.get(length, 384)
    # what has to move: inputs in and results out, then inputs and cotangents in and gradients out
    moved = (
        2.0
        * length
        * features
        * torch.empty(0, dtype=getattr(torch, dtype)).element_size()
        * (3 * op.inputs + 2)
    )
    make = functools.partial(functools.partial, op=op, features=features, dtype=dtype)
    exact, truth = make(_truth, stacked=True), make(_truth, stacked=False)
    variants = [Variant("plain", make(_plain, function=op.plain), truth, bytes=moved)]
    if op.plain is not op.formula:
        variants.append(
            Variant("plain, written out", make(_plain, function=op.formula), truth, exact=False, bytes=moved)
        )
    variants.append(Variant("dual", make(_dual), exact, bytes=2 * moved))
    if has_native(op.suite):
        variants.append(
            Variant(
                "dual, reference",
                make(_dual),
                exact,
                backend="reference",
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
        why="dual forward + backward ÷ torch's plain op (twice the memory traffic)",
    )


def inputs(length: int, op: Op, features: int, dtype: str) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Stacked inputs, weights, and the cotangent like an input."""
    shape: tuple[int, ...] = (2, 2, length, features)
    if op.suite == "rotary":
        shape = (2, 2, features // ROTARY_HEAD, length, ROTARY_HEAD)
    stacks = [draw(*shape, dtype=dtype, seed=i) for i in range(op.inputs)]
    weights = [draw(features, dtype=dtype, seed=10 + i) for i in range(op.weights)]
    return stacks, weights, draw(*shape, dtype=dtype, seed=20)


def _plain(length: int, op: Op, features: int, dtype: str, function: Callable[..., Tensor]) -> Run:
    stacks, weights, cotangent = inputs(length, op, features, dtype)
    leaves = [x.requires_grad_() for x in [*(x[0].clone() for x in stacks), *weights]]
    primal_bar = cotangent[0]
    return Run(lambda: torch.autograd.grad(function(*leaves), leaves, primal_bar))


def _dual(length: int, op: Op, features: int, dtype: str) -> Run:
    stacks, weights, cotangent = inputs(length, op, features, dtype)
    leaves = [x.requires_grad_() for x in [*stacks, *weights]]

    def call() -> Gradients:
        y = op.dual(*(Dual(x) for x in leaves[: op.inputs]), *leaves[op.inputs :])
        return torch.autograd.grad(y.stacked, leaves, cotangent)

    return Run(call)


def _truth(length: int, op: Op, features: int, dtype: str, stacked: bool) -> Gradients:
    stacks, weights, cotangent = inputs(length, op, features, dtype)
    vectors = [w.double().requires_grad_() for w in weights]
    function = lambda *xs: op.formula(*xs, *vectors)
    if not stacked:
        leaves = [x[0].double().requires_grad_() for x in stacks]
        return torch.autograd.grad(function(*leaves), [*leaves, *vectors], cotangent[0].double())
    leaves = [x.double().requires_grad_() for x in stacks]
    out = torch.func.jvp(function, tuple(x[0] for x in leaves), tuple(x[1] for x in leaves))
    return torch.autograd.grad(out, [*leaves, *vectors], (cotangent[0].double(), cotangent[1].double()))


def _suite(name: str, summary: str) -> Suite:
    families = tuple(family for family, op in OPS.items() if op.suite == name)
    return Suite(name, summary, families, functools.partial(_cases, name))


SUITES = (
    _suite("norm", "RMSNorm and LayerNorm, [2, 2048, 2048] and [2, 512, 384]"),
    _suite("activation", "SwiGLU, GELU and SiLU, [2, 2048, 2048] and [2, 512, 384]"),
    _suite("rotary", "rotary embedding, heads of 64, [2, 2048, 2048] and [2, 512, 384]"),
)
