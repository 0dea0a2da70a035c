"""Stage `kernels`: device time of every kernel, by torch's profiler, beside torch's flash and cuDNN and plain layers.

The cases are those of the benchmark suite `gpu`, without its gate: the stage before compared the results.
"""

from __future__ import annotations

import collections
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from bench import gate
from bench.case import Selection
from bench.roofline import Decoder
from bench.suites import gpu, models

from .stage import Stage

FAMILIES = (
    *("causal-forward", "causal-backward", "full-forward", "full-backward"),
    *("rms_norm-forward", "rms_norm-backward", "swiglu-forward", "swiglu-backward"),
    *("rotary-forward", "rotary-backward", "head"),
    *("layer_norm-forward", "layer_norm-backward", "gelu-forward", "gelu-backward"),
)
CALLS = 4


def run(stage: Stage) -> None:
    if stage.dry:
        shrink()
    for family in FAMILIES[4:6] if stage.dry else FAMILIES:
        (case,) = gpu.cases(Selection(lengths=(8,) if stage.dry else None, families=(family,)))
        for variant in case.variants:
            name = f"{family} {variant.name}"
            if stage.left < 5 and not stage.dry:
                stage.row(name, "left out", reason="no time")
                continue
            try:
                with gate.on_backend(variant):
                    call = variant.make(case.length).call
                    times = kernel_times(stage, call)
            except Exception as error:  # torch's own attention may not take the shape
                stage.row(name, "left out" if variant.optional else "failed", reason=str(error)[:400])
                continue
            total = sum(us * count for us, count in times.values())
            rates = {"flop_per_s": variant.flops, "bytes_per_s": variant.bytes}
            facts: dict[str, Any] = {rate: 1e6 * n / total for rate, n in rates.items() if n and total}
            kernels = {kernel: {"us": round(us, 2), "calls": count} for kernel, (us, count) in times.items()}
            stage.row(name, us=round(total, 2), kernels=kernels, **facts)
            del call
            if not stage.dry:
                torch.cuda.empty_cache()


def kernel_times(stage: Stage, call: Callable[[], Any], calls: int = CALLS) -> dict[str, tuple[float, float]]:
    """Mean microseconds of every kernel, and its launches per call; on the CPU those of torch's operations."""
    for _ in range(1 if stage.dry else 3):  # the third call of a launcher is replayed
        call()
    stage.wait()
    kind = ProfilerActivity.CPU if stage.dry else ProfilerActivity.CUDA
    with profile(activities=[kind]) as recorded:
        for _ in range(calls):
            call()
        stage.wait()
    times: dict[str, list[float]] = collections.defaultdict(list)
    for event in recorded.events():
        on_device = event.device_type.name != "CPU"
        us = event.self_cpu_time_total if stage.dry else event.time_range.elapsed_us() if on_device else 0.0
        if us:
            times[event.name].append(us)
    by_time = sorted(times.items(), key=lambda item: -sum(item[1]))
    return {name: (sum(us) / len(us), len(us) / calls) for name, us in by_time[:40]}


def shrink() -> None:
    """The benchmark suite on the CPU, tiny."""
    gpu.DEVICE = "cpu"
    gpu.FEATURES, gpu.WORDS, gpu.HIDDEN = 32, 61, 24
    models.SIZES["tiny"] = Decoder(16, 1, 2, 1, 24)
