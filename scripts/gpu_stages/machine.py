"""Stage `machine`: versions, modules, clocks, and the rates of a copy and of a product."""

from __future__ import annotations

import subprocess
import time

import torch

from bench import roofline
from common import machine

from .stage import Stage


def run(stage: Stage) -> None:
    start = time.perf_counter()
    from aajr_kernels.backends import choice

    stage.row("versions", **machine.describe())
    stage.row("backends", reasons=choice.backends(), seconds=time.perf_counter() - start)
    if not stage.dry:
        properties = torch.cuda.get_device_properties(0)
        stage.row(
            "device",
            device=properties.name,
            multiprocessors=properties.multi_processor_count,
            memory=properties.total_memory,
            cuda=torch.version.cuda,
        )
    _clocks(stage, "clocks, idle")
    sizes = (256, 2**16, 0.05) if stage.dry else (8192, 2**29, 1.0)
    rates = roofline.measure(stage.device, "float32" if stage.dry else "bfloat16", *sizes)
    stage.row("ceilings", flop_per_s=rates.flops, bytes_per_s=rates.bytes)
    _clocks(stage, "clocks, after products")


def _clocks(stage: Stage, name: str) -> None:
    query = "clocks.sm,clocks.mem,power.draw,temperature.gpu,driver_version"
    try:
        done = subprocess.run(
            ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            check=False,
            timeout=10,
        )
        stage.row(name, values=dict(zip(query.split(","), done.stdout.strip().split(", "))))
    except (OSError, subprocess.TimeoutExpired) as error:
        stage.row(name, state="left out", reason=str(error))
