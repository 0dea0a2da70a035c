"""Suite `gpu`: what the Triton kernels have to show on a device, at the sizes of language models in bfloat16.

Forward and backward are timed apart. Ratios and times have bounds where an H100 is the device; everything also runs on
a CPU at small sizes, for the tests.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch
from torch import Tensor

from aajr_kernels.backends import choice, cuda
from aajr_kernels.coverage import record, recording
from aajr_kernels.dual import Dual

from .. import peers, roofline
from ..case import Case, Gradients, Run, Selection, Suite, Variant, portion, true_portion
from . import gpu_attention, head, models, pointwise, step

#: where it runs; the tests say "cpu"
DEVICE = "cuda"
DTYPES = ("bfloat16",)
#: of ``[2, positions, features]``
POSITIONS, FEATURES = 8192, 4096
#: time over that of a copy of as many bytes, which is 80 % of the bandwidth
COPY_RATIO = 1.25
ROWS = ("rms_norm", "layer_norm", "swiglu", "gelu", "rotary")
#: the streams of each, in the roofline model
KINDS = {"rms_norm": "norm", "layer_norm": "norm", "swiglu": "gated", "gelu": "pointwise", "rotary": "rotary"}
WORDS, HIDDEN, TOKENS, HEAD_RATIO = 128256, 2048, 4096, 2.2
STEP_LENGTH, STEP_RATIO, STEP_PEAK = 4096, 2.4, 2.2
#: what the kernels in CUDA C++ are for: starting them, at few rows; their time over Triton's, without a graph
LAUNCH_ROWS, LAUNCH_CALLS, LAUNCH_RATIO = (1, 4, 16, 64, 256, 1024, 4096), 50, 1 / 3
#: time over that of a copy, which is 85 % of the bandwidth
CUDA_RATIO = 1 / 0.85
PARTS = ("forward", "backward")


def cases(selection: Selection) -> list[Case]:
    found: list[Case] = []
    for name in gpu_attention.SHAPES:
        length = gpu_attention.SHAPES[name].N
        for dtype, n in selection.grid(DTYPES, (length,)):
            for part in PARTS:
                if selection.wants(f"{name}-{part}"):
                    found.append(gpu_attention.case(name, part, dtype, n, DEVICE))
    for dtype, n in selection.grid(DTYPES, (POSITIONS,)):
        for name in ROWS:
            for part in PARTS:
                if selection.wants(f"{name}-{part}"):
                    found.append(_rows(name, part, dtype, n))
    for dtype, n in selection.grid(DTYPES, (TOKENS,)):
        if selection.wants("head"):
            found.append(_head(dtype, n))
    for dtype, n in selection.grid(DTYPES, (STEP_LENGTH,)):
        if selection.wants("step"):
            found.append(_step(dtype, n))
    for dtype, n in selection.grid(DTYPES, LAUNCH_ROWS):
        if selection.wants("launches"):
            found.append(_launches(dtype, n))
    return found


# ------------------------------------------------------------------------------------------------------------ rows
def _rows(name: str, part: str, dtype: str, length: int) -> Case:
    op = pointwise.OPS[name]
    item = getattr(torch, dtype).itemsize
    work = {
        K: roofline.stream(KINDS[name], 2.0 * length * FEATURES, part == "backward", K, item) for K in (0, 1)
    }
    make = functools.partial(functools.partial, name=name, part=part, dtype=dtype)
    variants = [
        Variant(
            label,
            make(_row_run, stacked=stacked),
            make(_row_truth, stacked=stacked),
            bytes=work[stacked].bytes,
            work=(work[stacked],),
            bounds={"copy_ratio": COPY_RATIO} if stacked and length == POSITIONS else {},
        )
        for label, stacked in (("plain", False), ("dual", True))
    ]
    if op.suite == "norm" and cuda.missing() is None:
        bounds = {"copy_ratio": CUDA_RATIO} if length == POSITIONS else {}
        variants.append(
            dataclasses.replace(variants[-1], name="dual, CUDA C++", backend="cuda", bounds=bounds)
        )
    return Case(
        "gpu",
        f"{name}-{part}",
        dtype,
        length,
        tuple(variants),
        base=("plain",),
        config={"shape": [2, length, FEATURES], "part": part, "op": op.suite},
        gate_length=min(length, 67),
        repeats=20,
        device=DEVICE,
        graph=True,
        why=f"{part} of the dual: share of the copy bandwidth",
    )


def _row_inputs(
    length: int, name: str, dtype: str, stacked: bool, device: str, double: bool = False
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Leaves, those among them that are inputs, and the cotangent."""
    op = pointwise.OPS[name]
    stacks, weights, cotangent = pointwise.inputs(length, op, FEATURES, dtype)
    place = lambda t: (t.double() if double else t.to(device)).requires_grad_()
    inputs = [place(x if stacked else x[0].clone()) for x in stacks]
    return (
        [*inputs, *(place(w) for w in weights)],
        inputs,
        (cotangent if stacked else cotangent[0]).to(device),
    )


def _row_run(length: int, name: str, part: str, dtype: str, stacked: bool) -> Run:
    op = pointwise.OPS[name]
    leaves, inputs, cotangent = _row_inputs(length, name, dtype, stacked, DEVICE)

    def forward() -> Tensor:
        if not stacked:
            return op.plain(*leaves)
        out: Tensor = op.dual(*(Dual(x) for x in inputs), *leaves[len(inputs) :]).stacked
        return out

    return portion(forward, leaves, cotangent, part)


def _row_truth(length: int, name: str, part: str, dtype: str, stacked: bool) -> Gradients:
    op = pointwise.OPS[name]
    leaves, inputs, cotangent = _row_inputs(length, name, dtype, stacked, "cpu", double=True)
    vectors = leaves[len(inputs) :]
    if stacked:
        function = lambda *xs: op.formula(*xs, *vectors)
        pair = torch.func.jvp(function, tuple(x[0] for x in inputs), tuple(x[1] for x in inputs))
        out = torch.stack(pair)
    else:
        out = op.formula(*leaves)
    return true_portion(out, leaves, cotangent.double(), part)


def _launches(dtype: str, length: int) -> Case:
    """An RMS norm of `length` rows, called again and again by Python: what a call costs, where rows are few.

    Not in the roofline model, which knows devices and no Python.
    """
    make = functools.partial(_launch_run, dtype=dtype)
    truth = functools.partial(_row_truth, name="rms_norm", part="forward", dtype=dtype, stacked=True)
    variants = [Variant("Triton", make, truth, backend="triton" if DEVICE == "cuda" else None)]
    if cuda.missing() is None:
        bounds = {"ratio": LAUNCH_RATIO} if length == 64 else {}
        variants.append(Variant("CUDA C++", make, truth, backend="cuda", bounds=bounds))
    return Case(
        "gpu",
        "launches",
        dtype,
        length,
        tuple(variants),
        base=("Triton",),
        config={"shape": [2, length, FEATURES], "calls": LAUNCH_CALLS, "op": "norm"},
        gate_length=min(length, 67),
        repeats=20,
        device=DEVICE,
        why=f"{LAUNCH_CALLS} calls of the launcher of a norm's forward",
    )


def _launch_run(length: int, dtype: str) -> Run:
    leaves, _, _ = _row_inputs(length, "rms_norm", dtype, True, DEVICE)
    x, weight = (t.detach() for t in leaves)
    backend = choice.select_backend("norm", x, weight)
    launcher = choice.implementation("norm", backend).norm_fwd

    def call() -> Gradients:
        if recording():
            record("rms_norm", backend, 0.0)
        for _ in range(LAUNCH_CALLS):
            y, _ = launcher(x, weight, None, pointwise.EPS, 0.0, False)
        return [y]

    return Run(call)


# ------------------------------------------------------------------------------------------------- head and step
def _head(dtype: str, length: int) -> Case:
    sizes = head.Sizes(HIDDEN, WORDS, DEVICE)
    found = head.variants(dtype, length, sizes)
    work = {
        "plain": tuple(roofline.plain_head(length, HIDDEN, WORDS)),
        "fisher": tuple(roofline.head(length, HIDDEN, WORDS)),
    }
    bounds: dict[str, dict[str, float]] = {"fisher": {"ratio": HEAD_RATIO}} if length == TOKENS else {}
    variants = [
        dataclasses.replace(found[name], work=work[name], bounds=bounds.get(name, {}), key=None)
        for name in ("plain", "fisher")
    ]
    return Case(
        "gpu",
        "head",
        dtype,
        length,
        tuple(variants),
        base=("plain",),
        config={"V": WORDS, "C": HIDDEN, "metric": "fisher"},
        gate_length=min(length, 67),
        repeats=10,
        peak=True,
        device=DEVICE,
        why="Fisher head, forward + backward ÷ linear + cross-entropy",
    )


def _step(dtype: str, length: int) -> Case:
    sizes = models.sizes("llama-1b", length)
    bounded = length == STEP_LENGTH
    bounds: dict[str, Any] = {"ratio": STEP_RATIO, "peak_ratio": STEP_PEAK} if bounded else {}
    task = functools.partial(step.Task, model="llama-1b", dtype=dtype, device=DEVICE)
    variants = [
        step.variant("plain", task("plain"), work=tuple(sizes.step(length, 0))),
        step.variant(
            "exact, fused", task("penalty", form="fused"), work=tuple(sizes.step(length, 1)), bounds=bounds
        ),
        step.variant(step.FINITE, task("differences"), exact=False, peak=False),
        *(step.variant(p, task(p), exact=False, optional=True, peak=False) for p in peers.device_peers()),
    ]
    return Case(
        "gpu",
        "step",
        dtype,
        length,
        tuple(variants),
        base=("plain",),
        config={"model": "llama-1b", "sizes": dataclasses.asdict(sizes), "metric": "l2", "B": 1},
        gate_length=min(length, models.SHALLOW),
        repeats=8,
        peak=True,
        device=DEVICE,
        why="exact penalty step ÷ plain flash step, 16 layers of hidden 2048",
    )


SUITE = Suite(
    "gpu",
    "bfloat16 on a device: attention, rows, the head and a step at the sizes of language models",
    (
        *(f"{name}-{part}" for name in (*gpu_attention.SHAPES, *ROWS) for part in PARTS),
        "head",
        "step",
        "launches",
    ),
    cases,
    device="cuda",
    parts=False,  # they are families
)
