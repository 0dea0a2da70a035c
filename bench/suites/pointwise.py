"""Suites `norm`, `activation` and `rotary`: the memory-bound ops against torch's plain ones."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from aajr_kernels.ops.activation import gelu, silu, swiglu
from aajr_kernels.ops.norm import layer_norm, rms_norm
from aajr_kernels.ops.rotary import rotary
from aajr_kernels.testing import formulas, oracle

from ..case import PARTS, Case, Selection, Suite, Variant, draw, has_kernels
from ..roofline import stream
from .op import Op

#: positions -> features of ``[2, positions, features]``
SHAPES = {2048: 2048, 512: 384}
ROTARY_HEAD = 64
EPS = 1e-5


@dataclass(frozen=True)
class Pointwise:
    """An element-wise op or one over rows.

    Attributes:
        suite: op package and suite.
        inputs: number of stacked arguments.
        weights: number of vectors of parameters that follow them.
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

    def op(self, features: int, dtype: str, part: str, device: str) -> Op:
        """Its inputs ``[2, 2, positions, features]`` (rotary: heads before positions) and weights."""

        def inputs(length: int) -> tuple[list[Tensor], list[Tensor], Tensor]:
            shape: tuple[int, ...] = (2, 2, length, features)
            if self.suite == "rotary":
                shape = (2, 2, features // ROTARY_HEAD, length, ROTARY_HEAD)
            stacks = [draw(*shape, dtype=dtype, seed=i) for i in range(self.inputs)]
            weights = [draw(features, dtype=dtype, seed=10 + i) for i in range(self.weights)]
            return stacks, weights, draw(*shape, dtype=dtype, seed=20)

        return Op(inputs, part, device)


def _rms_formula(x: Tensor, w: Tensor) -> Tensor:
    wide = x.float() if x.dtype != torch.float64 else x
    return w * oracle.rms_norm(wide, w.shape, eps=EPS).to(x.dtype)


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


OPS = {
    "rms_norm": Pointwise(
        *("norm", 1, 1),
        lambda x, w: rms_norm(x, w.shape, w, EPS),
        lambda x, w: F.rms_norm(x, w.shape, w, EPS),
        _rms_formula,
    ),
    "layer_norm": Pointwise(
        *("norm", 1, 2),
        lambda x, w, b: layer_norm(x, w.shape, w, b, EPS),
        lambda x, w, b: F.layer_norm(x, w.shape, w, b, EPS),
        lambda x, w, b: oracle.layer_norm(x, w.shape, w, b, EPS),
    ),
    "swiglu": Pointwise(
        "activation", 2, 0, swiglu, lambda g, u: F.silu(g) * u, lambda g, u: formulas.silu(g) * u
    ),
    "gelu": Pointwise("activation", 1, 0, gelu, F.gelu, formulas.gelu),
    "gelu_tanh": Pointwise(
        *("activation", 1, 0),
        *(functools.partial(f, approximate="tanh") for f in (gelu, F.gelu, formulas.gelu)),
    ),
    "silu": Pointwise("activation", 1, 0, silu, F.silu, formulas.silu),
    "rotary": Pointwise(
        *("rotary", 1, 0),
        lambda x: rotary(x, *_tables(x.shape[-2], device=x.device)),
        _rotary_formula,
        _rotary_formula,
    ),
}


def _cases(suite: str, selection: Selection) -> list[Case]:
    return [
        _case(family, dtype, n, selection)
        for family, one in OPS.items()
        if one.suite == suite and selection.wants(family)
        for dtype, n in selection.grid(("float32", "bfloat16"), tuple(SHAPES))
    ]


def _case(family: str, dtype: str, length: int, selection: Selection) -> Case:
    one, features, part = OPS[family], SHAPES.get(length, 384), selection.part
    op = one.op(features, dtype, part, selection.device)
    plain, dual = variants(one, op, dtype, length, features)
    made = [plain]
    if one.plain is not one.formula:
        written = op.plain(one.formula)
        made.append(dataclasses.replace(plain, name="plain, written out", make=written, exact=False, work=()))
    made.append(dual)
    if has_kernels(one.suite, selection.device):
        slow: Any = {"backend": "reference", "rounds": 5, "peak": False, "work": ()}
        made.append(dataclasses.replace(dual, name="dual, reference", **slow))
    return selection.case(
        *(one.suite, family, dtype, length, made),
        base=("plain",),
        config={"shape": [2, length, features]},
        repeats=10,
        why="the dual ÷ torch's plain op (twice the memory traffic)",
    )


def variants(one: Pointwise, op: Op, dtype: str, length: int, features: int) -> tuple[Variant, Variant]:
    """Torch's op and the dual; each stream of the roofline model passes once."""
    kind, item = "gated" if one.inputs == 2 else one.suite, getattr(torch, dtype).itemsize
    plain, dual = (
        tuple(stream(kind, 2.0 * length * features, way == "backward", K, item) for way in PARTS[op.part])
        for K in (0, 1)
    )
    moved = [sum(work.bytes for work in kernels) for kernels in (plain, dual)]
    return (
        Variant("plain", op.plain(one.plain), op.truth(one.formula), bytes=moved[0], work=plain),
        Variant("dual", op.dual(one.dual), op.dual_truth(one.formula), bytes=moved[1], work=dual),
    )


def _suite(name: str, summary: str) -> Suite:
    families = tuple(family for family, one in OPS.items() if one.suite == name)
    return Suite(name, summary, families, functools.partial(_cases, name))


SUITES = (
    _suite("norm", "RMSNorm and LayerNorm, [2, 2048, 2048] and [2, 512, 384]"),
    _suite("activation", "SwiGLU, GELU and SiLU, [2, 2048, 2048] and [2, 512, 384]"),
    _suite("rotary", "rotary embedding, heads of 64, [2, 2048, 2048] and [2, 512, 384]"),
)
