"""Cases of the language-model head and of the metrics on given outputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from torch import Tensor

from ...dual import Dual
from ...ops.head import lm_head_penalty
from ...ops.sensitivity import sensitivity
from .. import formulas
from ..oracle import METRICS, metric_values
from .case import Case, Draw, Outputs


def _head_case(
    draw: Draw,
    label: str,
    batch: tuple[int, ...],
    size: int,
    vocabulary: int,
    metric: str,
    *,
    k: int = 1,
    bias: bool = False,
    labels: bool = False,
    scale: float = 1.0,
    softcap: float | None = None,
    spread: float = 1.0,
    strided: bool = False,
) -> Case:
    tensors = {"hidden": draw(*batch, size), "weight": draw(vocabulary, size, scale=spread * size**-0.5)}
    if bias:
        tensors["bias"] = draw(vocabulary, mean=2.0)
    constants = {}
    if labels:
        constants["labels"] = draw.integers(*batch, high=vocabulary)
        constants["labels"].view(-1)[1::4] = -100
    options: dict[str, Any] = {"metric": metric, "scale": scale, "softcap": softcap}

    def oracle(primals: Mapping[str, Tensor], tangents: Mapping[str, Tensor]) -> Outputs:
        primals = dict(primals)
        targets = primals.pop("labels", None)
        z, z_tan = formulas.forward_mode(
            partial(formulas.logits, scale=scale, softcap=softcap), primals, tangents
        )
        measured = (primals["hidden"], tangents["hidden"]) if metric == "l2" else (z, z_tan)
        outputs = {"q": metric_values(*measured, metric)}
        if targets is not None:
            outputs["nll"] = formulas.negative_log_likelihood(z, targets, -100)
        return outputs

    def ours(**arguments: Any) -> Outputs:
        result: Any = lm_head_penalty(**arguments, **options)
        return dict(zip(("q", "nll"), result)) if labels else {"q": result}

    name = f"{metric}, {label}{', labels' if labels else ''}, K={k}"
    return Case(name, tensors, draw.directions(tensors, "hidden", k), ours, oracle, constants, strided)


def lm_head_penalty_cases(draw: Draw) -> Iterator[Case]:
    for metric in METRICS:
        make = partial(_head_case, draw, metric=metric)
        yield make("37 words", (3, 5), 11, 37)
        yield make("37 words", (3, 5), 11, 37, k=3, labels=True)
        yield make("bias, scale, softcap", (7,), 9, 23, k=3, bias=True, scale=0.7, softcap=3.0)
        yield make("bias, scale, softcap", (7,), 9, 23, bias=True, labels=True, scale=0.7, softcap=3.0)
        # many rows, because each shares one rounding of its log-sum-exp
        yield make("large logits", (151,), 9, 41, k=3, bias=True, labels=True, spread=8.0)
        yield make("strided", (4, 5), 7, 19, labels=True, strided=True)
        yield make("540 tokens, 1061 words", (2, 270), 8, 1061, labels=True)


def sensitivity_cases(draw: Draw) -> Iterator[Case]:
    for metric in METRICS:
        for label, shape, k, scale, strided in (
            ("37 words", (3, 5, 37), 1, 1.0, False),
            ("37 words", (3, 5, 37), 3, 1.0, False),
            ("no batch", (13,), 3, 1.0, False),
            ("large logits", (9, 41), 3, 8.0, False),
            ("strided", (4, 5, 19), 1, 1.0, True),
            ("257 x 511", (257, 511), 1, 1.0, False),
        ):
            tensors = {"y": draw(*shape, scale=scale)}

            def oracle(primals: Any, tangents: Any, metric: str = metric) -> Outputs:
                return {"q": metric_values(primals["y"], tangents["y"], metric)}

            def ours(y: Dual, metric: str = metric) -> Outputs:
                return {"q": sensitivity(y, metric)}

            directions = draw.directions(tensors, "y", k)
            yield Case(f"{metric}, {label}, K={k}", tensors, directions, ours, oracle, strided=strided)
