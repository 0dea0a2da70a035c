"""Suite `sweep`: how the price grows with one size at a time; it runs when it is named.

==========  =============================================================  ====================================
family      size                                                           case
==========  =============================================================  ====================================
``S``       length of the sequence, 128 to 4096                            the 4-layer Llama step
``D-...``   features of a head                                             attention, N = 512
``K``       directions that share a primal                                 the 4-layer Llama step, S = 512
``V-...``   words of the head                                              the Fisher head on 512 tokens
==========  =============================================================  ====================================
"""

from __future__ import annotations

import dataclasses
from typing import Any

from ..case import Case, Selection, Suite
from . import attention, head, step

LENGTHS = (128, 256, 512, 1024, 2048, 4096)
FEATURES = (32, 64, 80, 96, 128, 256)
DIRECTIONS = (1, 2, 4, 8)
WORDS = (1000, 8000, 32000, 128000)
FAMILIES = ("S", *(f"D-{d}" for d in FEATURES), "K", *(f"V-{v}" for v in WORDS))


def cases(selection: Selection) -> list[Case]:
    cases: list[Case] = []
    for family in FAMILIES:
        if selection.wants(family):
            name, _, size = family.partition("-")
            for dtype, length in selection.grid(("float32",), LENGTHS if name == "S" else (512,)):
                if name == "S":
                    case = _lengths(dtype, length, selection)
                elif name == "D":
                    case = attention.attention_case(int(size), dtype, length, selection)
                elif name == "K":
                    case = _directions(dtype, length, selection)
                else:
                    case = head.head_case(dtype, length, selection, int(size))
                # bounds are those of the suites that the cases come from
                variants = tuple(dataclasses.replace(v, bounds={}, peer=None) for v in case.variants)
                own: Any = {"suite": "sweep", "family": family, "variants": variants, "peak": False}
                cases.append(dataclasses.replace(case, **own))
    return cases


def _lengths(dtype: str, length: int, selection: Selection) -> Case:
    task = step.tasks(selection, model="llama", dtype=dtype)
    variants = [
        step.variant("plain", task("plain")),
        step.variant("exact, fused", task("penalty", form="fused")),
        step.variant(step.FINITE, task("differences"), exact=False),
    ]
    return step.step_case(
        "llama", "llama", dtype, length, selection, variants, ("plain",), "penalty step against S", repeats=5
    )


def _directions(dtype: str, length: int, selection: Selection) -> Case:
    task = step.tasks(selection, kind="penalty", model="llama", dtype=dtype, form="fused")
    variants = [step.variant(f"K = {k}", task(directions=k)) for k in DIRECTIONS]
    why = "directions that share a primal"
    return step.step_case("llama", "llama", dtype, length, selection, variants, ("K = 1",), why, repeats=5)


SUITE = Suite(
    "sweep", "one size at a time: S, D, K, vocabulary (only when named)", FAMILIES, cases, usual=False
)
