"""Cases of the linear layer, the norms, the activations and rotary embeddings."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...ops.linear import linear
from ...ops.norm import layer_norm, rms_norm
from ...ops.rotary import rotary
from .. import formulas
from .case import Case, Draw, case


def linear_cases(draw: Draw) -> Iterator[Case]:
    def make(batch: tuple[int, ...], inner: int, outer: int, bias: bool) -> dict[str, Tensor]:
        tensors = {"x": draw(*batch, inner), "weight": draw(outer, inner, scale=inner**-0.5)}
        return {**tensors, "bias": draw(outer)} if bias else tensors

    yield case(draw, "37 -> 11 with bias", linear, formulas.linear, make((3, 5), 37, 11, True))
    yield case(draw, "no bias", linear, formulas.linear, make((7,), 13, 5, False), k=3)
    yield case(draw, "one feature", linear, formulas.linear, make((2, 3), 1, 1, True), k=3)
    yield case(draw, "strided", linear, formulas.linear, make((4, 9), 21, 6, True), k=3, strided=True)
    yield case(draw, "253 rows, 252 -> 131", linear, formulas.linear, make((253,), 252, 131, True))


def _norm_tensors(draw: Draw, batch: tuple[int, ...], *shape: int, affine: str) -> dict[str, Tensor]:
    tensors = {"x": draw(*batch, *shape, mean=0.3)}
    for name in affine.split():
        tensors[name] = draw(*shape, scale=0.5, mean=1.0 if name == "weight" else 0.0)
    return tensors


def rms_norm_cases(draw: Draw) -> Iterator[Case]:
    make = partial(_norm_tensors, draw)
    both = partial(case, draw, op=rms_norm, formula=_shaped(formulas.rms_norm))
    yield both("weight", tensors=make((3, 5), 37, affine="weight"), options=_norm((37,)))
    yield both("no weight", tensors=make((7,), 21, affine=""), options=_norm((21,)), k=3)
    yield both("offset 1", tensors=make((3, 5), 37, affine="weight"), options=_norm((37,), offset=1.0), k=3)
    yield both("two axes", tensors=make((4,), 3, 7, affine="weight"), options=_norm((3, 7)))
    yield both("strided", tensors=make((4, 5), 9, affine="weight"), options=_norm((9,)), k=3, strided=True)
    yield both("611 rows of 252", tensors=make((611,), 252, affine="weight"), options=_norm((252,)))


def layer_norm_cases(draw: Draw) -> Iterator[Case]:
    make = partial(_norm_tensors, draw)
    both = partial(case, draw, op=layer_norm, formula=_shaped(formulas.layer_norm))
    yield both(
        "weight and bias", tensors=make((3, 5), 37, affine="weight bias"), options=_norm((37,), eps=1e-5)
    )
    yield both("plain", tensors=make((7,), 21, affine=""), options=_norm((21,), eps=1e-5), k=3)
    yield both("weight", tensors=make((7,), 21, affine="weight"), options=_norm((21,), eps=1e-3), k=3)
    yield both("two axes", tensors=make((4,), 3, 7, affine="weight bias"), options=_norm((3, 7), eps=1e-5))
    yield both(
        "strided",
        tensors=make((4, 5), 9, affine="weight bias"),
        options=_norm((9,), eps=1e-5),
        k=3,
        strided=True,
    )
    yield both(
        "611 rows of 252", tensors=make((611,), 252, affine="weight bias"), options=_norm((252,), eps=1e-5)
    )


def add_norm_cases(
    op: Callable[..., Any], formula: Callable[..., Tensor], affine: str, draw: Draw
) -> Iterator[Case]:
    def make(batch: tuple[int, ...], size: int, affine: str) -> dict[str, Tensor]:
        return {**_norm_tensors(draw, batch, size, affine=affine), "residual": draw(*batch, size, mean=-0.2)}

    def joined(x: Any, residual: Any, **rest: Any) -> Any:
        return torch.cat(op(x, residual, **rest), -1)

    def oracle(x: Tensor, residual: Tensor, normalized_shape: tuple[int, ...], **rest: Any) -> Tensor:
        return torch.cat([formula(x + residual, normalized_shape, **rest), x + residual], -1)

    both = partial(case, draw, op=joined, formula=oracle)
    yield both(affine, tensors=make((3, 5), 37, affine), options=_norm((37,)))
    yield both("plain", tensors=make((7,), 21, ""), options=_norm((21,)), k=3)
    yield both("strided", tensors=make((4, 5), 9, affine), options=_norm((9,)), k=3, strided=True)
    yield both("611 rows of 252", tensors=make((611,), 252, affine), options=_norm((252,)))


def _norm(shape: tuple[int, ...], **options: float) -> dict[str, Any]:
    return {"normalized_shape": shape, "eps": 1e-6, **options}


def _shaped(formula: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def call(x: Tensor, normalized_shape: tuple[int, ...], **rest: Any) -> Tensor:
        return formula(x, normalized_shape, **rest)

    return call


def pointwise_cases(
    op: Callable[..., Any], formula: Callable[..., Tensor], draw: Draw, *, forms: tuple[str, ...] = ("",)
) -> Iterator[Case]:
    for form in forms:
        both = partial(case, draw, op=op, formula=formula, options={"approximate": form} if form else None)
        name = form and f" ({form})"
        yield both(f"5 x 37{name}", tensors={"x": draw(5, 37, scale=1.5)})
        yield both(f"strided{name}", tensors={"x": draw(3, 5, 7, scale=1.5)}, k=3, strided=True)
        far = torch.cat([draw(31, scale=8.0), torch.tensor([0.0, -0.0, 30.0, -30.0], dtype=torch.float64)])
        yield both(f"large values and zeros{name}", tensors={"x": far}, k=3)
        yield both(f"701 x 129{name}", tensors={"x": draw(701, 129)})


def gated_cases(
    op: Callable[..., Any],
    activation: Callable[..., Tensor],
    draw: Draw,
    *,
    forms: tuple[str, ...] = ("",),
) -> Iterator[Case]:
    def formula(gate: Tensor, up: Tensor, **options: Any) -> Tensor:
        return activation(gate, **options) * up

    for form in forms:
        both = partial(case, draw, op=op, formula=formula, options={"approximate": form} if form else None)
        name = form and f" ({form})"

        def make(*shape: int, scale: float = 1.5) -> dict[str, Tensor]:
            return {"gate": draw(*shape, scale=scale), "up": draw(*shape)}

        yield both(f"5 x 37{name}", tensors=make(5, 37), duals="gate up")
        yield both(f"strided{name}", tensors=make(3, 5, 7), duals="gate up", k=3, strided=True)
        yield both(f"plain up{name}", tensors=make(3, 11), duals="gate", k=3)
        yield both(f"plain gate{name}", tensors=make(3, 11), duals="up")
        yield both(f"large gates{name}", tensors=make(41, scale=8.0), duals="gate up")
        yield both(f"701 x 129{name}", tensors=make(701, 129), duals="gate up")


def rotary_cases(draw: Draw) -> Iterator[Case]:
    for interleaved in (False, True):
        name = "interleaved" if interleaved else "halves"
        for label, shape, size, axis, k, strided in (
            ("all features", (2, 3, 5, 8), 8, 1, 1, False),
            ("6 of 11 features", (2, 3, 5, 11), 6, 1, 3, False),
            ("heads last", (2, 5, 3, 10), 10, 2, 3, False),
            ("strided", (2, 3, 7, 8), 4, 1, 3, True),
        ):
            length = shape[2] if axis == 1 else shape[1]
            angles = draw.angles(shape[0], length, size // 2)
            angles = angles.repeat_interleave(2, -1) if interleaved else torch.cat([angles, angles], -1)
            yield case(
                draw,
                f"{name}, {label}",
                rotary,
                formulas.rotary,
                {"x": draw(*shape), "cos": angles.cos(), "sin": angles.sin()},
                k=k,
                strided=strided,
                options={"interleaved": interleaved, "unsqueeze_dim": axis},
            )
