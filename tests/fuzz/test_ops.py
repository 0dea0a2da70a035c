"""Ops with random sizes, strides, dtypes, scales and options, on every backend, against float64.

An example is a case of the shared suite with drawn parameters: the oracle, the budgets and the targets are those of
tests/ops.
"""

from __future__ import annotations

from typing import Any

import torch
from fuzz.examples import fuzzed
from hypothesis import strategies as st
from ops.suite import DTYPES, Target, check, targets

from aajr_kernels.testing.cases import products, rows
from aajr_kernels.testing.cases.case import Case, dense, flipped, gap, swapped

LAYOUTS = {f.__name__: f for f in (dense, gap, swapped, flipped)}
#: sizes around those of vectors, tiles and rows that the kernels hold, and any others
EDGES = (1, 2, 3, 7, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129)
BATCH = st.lists(st.integers(1, 4), max_size=3).map(tuple)
#: computations that round at random, for a part over the budget of the shared suite
DRAWS = 16
SCALES = st.sampled_from((1e-4, 1e-2, 1.0, 1e2, 1e4))


class Place:
    """Where an example runs: drawn first, since Triton's interpreter takes up to seconds for sizes above `most`."""

    def __init__(self, data: Any, op: str, most: int = 40) -> None:
        self.data, self.op = data, op
        self.target: Target = data.draw(st.sampled_from(targets(op)), "target")
        self.most = most if self.target.backend == "triton" else 1100

    def size(self, name: str, least: int = 1, most: int = 300) -> int:
        most = min(most, self.most)
        edges = st.sampled_from([n for n in EDGES if least <= n <= most])
        return self.data.draw(st.one_of(edges, st.integers(least, most)), name)

    def check(self, case: Case) -> None:
        """The case there, in a drawn dtype and with a drawn number of tangents."""
        k = self.data.draw(st.integers(1, 4), "K")
        dtypes = (*DTYPES, torch.float64) if self.target.backend == "reference" else DTYPES
        dtype = self.data.draw(st.sampled_from(dtypes), "dtype")
        needed = None
        if self.data.draw(st.booleans(), "some gradients"):
            count = sum(len(tensors) for tensors in case.build(1))
            every = st.lists(st.booleans(), min_size=count, max_size=count)
            needed = self.data.draw(every.filter(any), f"gradients of {case.leaves}")
        if self.target.why_not(self.op) is None:
            check(case, self.target, k, dtype, needed, DRAWS)


def options(data: Any, wide: int = 0) -> dict[str, Any]:
    """Layout of the inputs, and parameters that stay float32."""
    drawn: dict[str, Any] = {"layout": LAYOUTS[data.draw(st.sampled_from(sorted(LAYOUTS)), "layout")]}
    if wide and data.draw(st.booleans(), "float32 parameters"):
        drawn["wide"] = tuple(range(wide))
    return drawn


@fuzzed("random ops", quick=15, full=2000)
def test_norm(data):
    place, batch = Place(data, "norm"), data.draw(BATCH, "batch")
    kind = data.draw(st.sampled_from(("rms", "layer", "add rms", "add layer")), "kind")
    size = place.size("size")
    count = data.draw(st.integers(0, 1 if kind.endswith("rms") else 2), "parameters")
    more = options(data, count)
    name = f"{size} {batch} {count}"
    if kind == "rms":
        offset = data.draw(st.sampled_from((0.0, 1.0)[: 1 + count]), "offset")
        scale = data.draw(SCALES, "scale")
        case = rows.rms(name, size, count, batch, offset=offset, scale=scale, **more)
    elif kind == "layer":
        mean = data.draw(st.sampled_from((0.0, 10.0)), "mean")
        case = rows.layer(name, size, count, batch, mean=mean, **more)
    else:
        case = rows.added(name, kind.split()[1], size, count, batch, **more)
    place.check(case)


@fuzzed("random ops", quick=10, full=1500)
def test_activation(data):
    place = Place(data, "activation")
    shape = (*data.draw(BATCH, "batch"), place.size("size"))
    kind, more = data.draw(st.sampled_from((*rows.POINTWISE, *rows.GATES)), "kind"), options(data)
    if kind in rows.GATES and data.draw(st.booleans(), "gated"):
        tangents = data.draw(st.sampled_from(((True, True), (True, False), (False, True))), "tangents")
        case = rows.gated(kind, str(shape), *shape, tangents=tangents, **more)
    else:
        case = rows.pointwise(kind, str(shape), *shape, **more)
    place.check(case)


@fuzzed("random ops", quick=10, full=1000)
def test_rotary(data):
    place = Place(data, "rotary")
    most = 2 if place.target.backend == "triton" else 5
    batch, heads, length = (data.draw(st.integers(1, most), name) for name in ("batch", "heads", "length"))
    size = place.size("features", 2, 70)
    rotated = 2 * data.draw(st.integers(1, size // 2), "pairs")
    axis = data.draw(st.sampled_from((1, 2)), "axis")
    shape = (batch, heads, length, size) if axis == 1 else (batch, length, heads, size)
    table = (data.draw(st.sampled_from((1, batch)), "tables"), length, rotated)
    interleaved = data.draw(st.booleans(), "interleaved")
    place.check(rows.rotary(f"{shape} {table}", shape, table, interleaved, axis, **options(data, 2)))


@fuzzed("random ops", quick=10, full=1500)
def test_linear(data):
    place = Place(data, "linear")
    sizes, batch = (place.size("in"), place.size("out")), data.draw(BATCH, "batch")
    bias = data.draw(st.booleans(), "bias")
    place.check(rows.linear(f"{batch} {sizes}", batch, sizes, bias, **options(data)))


@fuzzed("random ops", quick=10, full=1500)
def test_sensitivity(data):
    place = Place(data, "sensitivity")
    shape = (*data.draw(BATCH, "batch"), place.size("classes"))
    metric = data.draw(st.sampled_from(rows.METRICS), "metric")
    scale = data.draw(st.sampled_from((1e-2, 1.0, 8.0)), "scale")
    place.check(rows.reduction(metric, str(shape), *shape, scale=scale, **options(data)))


@fuzzed("random ops", quick=6, full=500)
def test_attention(data):
    place = Place(data, "attention", most=20)
    on_triton = place.target.backend == "triton"
    keys = data.draw(st.integers(1, 1 if on_triton else 3), "key heads")
    heads = keys * data.draw(st.integers(1, 2 if on_triton else 3), "queries of a key head")
    n = place.size("N", most=70)
    d, v = place.size("D", most=40), place.size("V", most=40)
    batch = data.draw(st.integers(1, 1 if on_triton else 2), "batch")
    context = data.draw(st.sampled_from((0, 0, 1, 9, 33)), "context")
    causal = data.draw(
        st.sampled_from((False, "lower_right", *([] if context else ["upper_left"]))), "causal"
    )
    m = place.size("M", most=70)
    more: dict[str, Any] = {"causal": causal, "context": context}
    if causal == "lower_right":
        more["window"] = data.draw(st.sampled_from((None, None, 1, 5, 40)), "window")
    more["softcap"] = data.draw(st.sampled_from((None, None, 2.0)), "softcap")
    more["scale"] = data.draw(st.sampled_from((None, None, 0.4)), "scale")
    mask = data.draw(st.sampled_from((None, None, "square", "padding", "bias")), "mask")
    moves = st.tuples(*3 * [st.integers(0, 1)])
    more["moves"] = data.draw(moves.filter(any if not context else (lambda moved: moved[0])), "moves")
    if mask == "bias":
        lead = data.draw(st.sampled_from(((), (heads,), (batch, heads), (batch, 1))), "bias per")
        last = (data.draw(st.sampled_from((1, n)), "bias rows"), context + m)
        more |= {"bias": (*lead, *last), "bias_moves": data.draw(st.booleans(), "bias moves")}
    elif mask is not None:
        more["mask"] = mask
    place.check(products.attention(f"{more}", (batch, heads, keys, n, m, d, v), **more, **options(data)))


@fuzzed("random ops", quick=10, full=700)
def test_head(data):
    place, batch = Place(data, "head"), data.draw(BATCH, "batch")
    size = place.size("features", most=70)
    words = place.size("tokens", 1, data.draw(st.sampled_from((300, 1100)), "most tokens"))
    more: dict[str, Any] = {
        "bias": data.draw(st.booleans(), "bias"),
        "labelled": data.draw(st.booleans(), "labels"),
        "scale": data.draw(st.sampled_from((1.0, 1.0, -1.5, 0.3)), "scale"),
        "softcap": data.draw(st.sampled_from((None, None, 4.0)), "softcap"),
        "spread": data.draw(st.sampled_from((0.01, 0.3, 1.0)), "spread"),
    }
    metric = data.draw(st.sampled_from(products.METRICS), "metric")
    more |= options(data)
    place.check(products.head(metric, f"{batch} {size} {words} {more}", batch, size, words, **more))
