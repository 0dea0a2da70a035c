"""Suite `gpu`: the Triton kernels on a device, at the sizes of language models in bfloat16.

Forward and backward are timed apart. Ratios and times have bounds where an H100 is the device; everything also runs on
a CPU at small sizes, for the tests.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch
from torch.nn.attention import SDPBackend

from aajr_kernels.backends import choice, cuda
from aajr_kernels.coverage import record, recording

from .. import peers
from ..case import Case, Gradients, Run, Selection, Suite, Variant
from ..roofline import Attention
from . import attention, head, models, pointwise, step

#: where it runs; the tests say "cpu"
DEVICE = "cuda"
PARTS = ("forward", "backward")
SHAPES = {
    "full": Attention(1, 24, 24, 8192, 8192, 128),
    "causal": Attention(4, 32, 8, 4096, 4096, 128, causal=True),
}
#: milliseconds of `full` on an H100, where a published kernel takes 16.7 and 90.7; ratios of `causal` to torch's flash
MILLISECONDS, RATIOS = {"forward": 7.0, "backward": 28.0}, {"forward": 3.3, "backward": 5.0}
#: of ``[2, positions, features]``
POSITIONS, FEATURES = 8192, 4096
#: time over that of a copy of as many bytes: 80 % of the bandwidth, 85 % for the kernels in CUDA C++
COPY_RATIO, CUDA_RATIO = 1.25, 1 / 0.85
ROWS = ("rms_norm", "layer_norm", "swiglu", "gelu", "rotary")
WORDS, HIDDEN, TOKENS, HEAD_RATIO = 128256, 2048, 4096, 2.2
STEP_LENGTH, STEP_RATIO, STEP_PEAK = 4096, 2.4, 2.2
#: the purpose of the kernels in CUDA C++: starting them, at few rows; their time over Triton's, without a graph
LAUNCH_ROWS, LAUNCH_CALLS, LAUNCH_RATIO = (1, 4, 16, 64, 256, 1024, 4096), 50, 1 / 3


def cases(selection: Selection) -> list[Case]:
    families: dict[str, tuple[Any, tuple[int, ...]]] = {
        **{
            f"{n}-{p}": (functools.partial(_attention, n, p), (s.N,))
            for n, s in SHAPES.items()
            for p in PARTS
        },
        **{f"{n}-{p}": (functools.partial(_rows, n, p), (POSITIONS,)) for n in ROWS for p in PARTS},
        "head": (_head, (TOKENS,)),
        "step": (_step, (STEP_LENGTH,)),
        "launches": (_launches, LAUNCH_ROWS),
    }
    on_device = dataclasses.replace(selection, device=DEVICE)
    return [
        dataclasses.replace(maker(dtype, n, on_device), suite="gpu", family=family)
        for family, (maker, lengths) in families.items()
        if selection.wants(family)
        for dtype, n in selection.grid(("bfloat16",), lengths)
    ]


def on_h100() -> bool:
    return torch.cuda.is_available() and "H100" in torch.cuda.get_device_name()


def _attention(name: str, part: str, dtype: str, length: int, selection: Selection) -> Case:
    shape = dataclasses.replace(SHAPES[name], N=length, M=length, item=getattr(torch, dtype).itemsize)
    bounds: dict[str, float] = {}
    if name == "causal" and shape == SHAPES[name]:
        bounds["ratio"] = RATIOS[part]
    elif shape == SHAPES[name] and on_h100():
        bounds["ms"] = MILLISECONDS[part]
    plain = {"flash": attention.torchs(shape, SDPBackend.FLASH_ATTENTION)}
    if shape.H != shape.HK:
        plain["flash, keys repeated"] = attention.torchs(shape, SDPBackend.FLASH_ATTENTION, repeat=True)
    base = tuple(plain)
    plain["cuDNN"] = attention.torchs(shape, SDPBackend.CUDNN_ATTENTION)
    return selection.case(
        *("gpu", name, dtype, length, attention.variants(shape, dtype, part, DEVICE, plain, bounds)),
        base=base,
        config={**attention.config(shape), "part": part},
        gate_length=129,
        repeats=20,
        why=f"{part} of the dual ÷ torch's plain flash attention",
    )


def _rows(name: str, part: str, dtype: str, length: int, selection: Selection) -> Case:
    one = pointwise.OPS[name]
    op = one.op(FEATURES, dtype, part, DEVICE)
    plain, dual = pointwise.variants(one, op, dtype, length, FEATURES)
    bounded = length == POSITIONS
    made = [plain, dataclasses.replace(dual, bounds={"copy_ratio": COPY_RATIO} if bounded else {})]
    if one.suite == "norm" and cuda.missing() is None:
        bound = {"copy_ratio": CUDA_RATIO} if bounded else {}
        made.append(dataclasses.replace(dual, name="dual, CUDA C++", backend="cuda", bounds=bound))
    return selection.case(
        *("gpu", name, dtype, length, made),
        base=("plain",),
        config={"shape": [2, length, FEATURES], "part": part, "op": one.suite},
        repeats=20,
        graph=True,
        why=f"{part} of the dual: share of the copy bandwidth",
    )


def _launches(dtype: str, length: int, selection: Selection) -> Case:
    """An RMS norm of `length` rows, called again and again by Python: the cost of a call, where rows are few.

    Not in the roofline model, which has devices and no Python.
    """
    one = pointwise.OPS["rms_norm"]
    op = one.op(FEATURES, dtype, "forward", DEVICE)
    make, truth = functools.partial(_launch_run, dtype=dtype), op.dual_truth(one.formula)
    variants = [Variant("Triton", make, truth, backend="triton" if DEVICE == "cuda" else None)]
    if cuda.missing() is None:
        bounds = {"ratio": LAUNCH_RATIO} if length == 64 else {}
        variants.append(Variant("CUDA C++", make, truth, backend="cuda", bounds=bounds))
    return selection.case(
        *("gpu", "launches", dtype, length, variants),
        base=("Triton",),
        config={"shape": [2, length, FEATURES], "calls": LAUNCH_CALLS, "op": "norm"},
        repeats=20,
        why=f"{LAUNCH_CALLS} calls of the launcher of a norm's forward",
    )


def _launch_run(length: int, dtype: str) -> Run:
    op = pointwise.OPS["rms_norm"].op(FEATURES, dtype, "forward", DEVICE)
    (x,), (weight,), _ = op.leaves(length, stacked=True)
    x, weight = x.detach(), weight.detach()
    backend = choice.select_backend("norm", x, weight)
    launcher = choice.implementation("norm", backend).norm_fwd

    def call() -> Gradients:
        if recording():
            record("rms_norm", backend, 0.0)
        for _ in range(LAUNCH_CALLS):
            y, *_ = launcher(x, weight, None, pointwise.EPS, 0.0, False)
        return [y]

    return Run(call)


def _head(dtype: str, length: int, selection: Selection) -> Case:
    ways = head.variants(dtype, length, HIDDEN, WORDS, DEVICE)
    bound = {"ratio": HEAD_RATIO} if length == TOKENS else {}
    return selection.case(
        *("gpu", "head", dtype, length),
        [ways["plain"], dataclasses.replace(ways["fisher"], bounds=bound)],
        base=("plain",),
        config={"V": WORDS, "C": HIDDEN, "metric": "fisher"},
        repeats=10,
        peak=True,
        why="Fisher head, forward + backward ÷ linear + cross-entropy",
    )


def _step(dtype: str, length: int, selection: Selection) -> Case:
    bounds = {"ratio": STEP_RATIO, "peak_ratio": STEP_PEAK} if length == STEP_LENGTH else {}
    task = step.tasks(selection, model="llama-1b", dtype=dtype)
    plain, work = (tuple(models.sizes("llama-1b", length).step(length, K)) for K in (0, 1))
    variants = [
        step.variant("plain", task("plain"), work=plain),
        step.variant("exact, fused", task("penalty", form="fused"), work=work, bounds=bounds),
        step.variant(step.FINITE, task("differences"), exact=False, peak=False),
        *(step.variant(p, task(p), exact=False, optional=True, peak=False) for p in peers.device_peers()),
    ]
    why = "exact penalty step ÷ plain flash step, 16 layers of hidden 2048"
    where = ("step", "llama-1b", dtype, length, selection, variants, ("plain",), why)
    return step.step_case(*where, repeats=8, peak=True)


SUITE = Suite(
    "gpu",
    "bfloat16 on a device: attention, rows, the head and a step at the sizes of language models",
    (*(f"{name}-{part}" for name in (*SHAPES, *ROWS) for part in PARTS), "head", "step", "launches"),
    cases,
    device="cuda",
    parts=False,  # they are families
)
