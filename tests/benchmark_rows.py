"""Rows of benchmarks for tests: invented, small, with every field of the schema."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bench.row import Row

PLAIN: dict[str, Any] = {
    "suite": "step",
    "family": "llama",
    "config": {"model": "llama", "metric": "l2"},
    "length": 512,
    "variant": "plain",
    "device": "cpu",
    "dtype": "float32",
    "backend": "torch",
    "ops": {},
    "min_ms": 200.0,
    "median_ms": 210.0,
    "base": "plain",
    "ratio": 1.0,
    "gflop_per_s": None,
    "gb_per_s": None,
    "peak_bytes": None,
    "gradient_bytes": None,
    "peak_ratio": None,
    "gradient_error": 1.5e-7,
    "bounds": {},
    "passed": None,
    "repeats": 8,
    "seed": 0,
    "machine": "x86_64",
    "cpu": "Some CPU",
    "torch_capability": "AVX2",
    "native_capability": "avx2",
    "threads": 2,
    "settings": {},
    "allocator": "default",
    "python": "3.11.7",
    "torch": "2.13.0",
    "transformers": "5.23.0",
    "aajr_kernels": "0.1.0",
    "commit": "abc1234",
    "dirty": False,
}


def fields(**changes: Any) -> dict[str, Any]:
    """A row as in a file from before the fields with defaults."""
    return PLAIN | changes


def row(**changes: Any) -> Row:
    return Row.parse(json.dumps(fields(**changes)))


def several() -> list[dict[str, Any]]:
    """A small file: two models, two lengths, peers, memory, rates, a repetition, and another machine."""
    lines = []
    for length in (512, 2048):
        for i, variant in enumerate(("plain", "exact", "exact, fused", "finite differences")):
            ratio = 1.0 + 0.31 * i + length / 10240 * (i > 0)
            error = {"finite differences": 9e-4}.get(variant, 4.2e-7)
            lines.append(
                fields(length=length, variant=variant, ratio=ratio, min_ms=200 * ratio, gradient_error=error)
            )
    lines.append(fields(variant="torch.func.jvp", ratio=3.81, min_ms=762.0))
    for variant, peak in (("plain", 1_000_000_000), ("exact, fused", 1_347_000_000)):
        lines.append(
            fields(
                family="memory",
                length=8192,
                variant=variant,
                min_ms=None,
                median_ms=None,
                ratio=None,
                peak_bytes=peak,
                peak_ratio=peak / 1e9,
            )
        )
    for variant, rate in (("plain", 3.7), ("dual", 22.9)):
        config = {"shape": [2, 512, 384]}
        lines.append(
            fields(
                suite="norm",
                family="rms_norm",
                config=config,
                variant=variant,
                gb_per_s=rate,
                ratio=3.7 / rate,
            )
        )
    lines.append(
        fields(variant="exact, fused", ratio=1.74, min_ms=348.0, gradient_error=4.1e-7, commit="def5678")
    )
    return lines


def write(path: Path, lines: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path
