"""Measured tiles: those that ``python -m bench --tune`` wrote for a processor go before the table in configs.py."""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Iterator
from pathlib import Path

import torch

#: processor/kernel/dtype/largest head size/mask -> queries, keys, warps, stages
PATH = Path(__file__).with_name("tuned.json")
Sizes = tuple[int, int, int, int]

_trial: dict[str, Sizes] = {}


def key(kernel: str, arch: str, dtype: torch.dtype, limit: int, causal: bool) -> str:
    """The line of the table; bfloat16 and float16 share theirs."""
    kind = "float32" if dtype == torch.float32 else "16 bits"
    return f"{arch}/{kernel}/{kind}/{limit}/{'causal' if causal else 'full'}"


@functools.cache
def table() -> dict[str, Sizes]:
    """The measured tiles, read once."""
    if not PATH.exists():
        return {}
    return {name: tuple(sizes) for name, sizes in json.loads(PATH.read_text()).items()}


def lookup(name: str) -> Sizes | None:
    """The tile under trial, else the measured one, else None."""
    return _trial.get(name) or table().get(name)


@contextlib.contextmanager
def trial(name: str, sizes: Sizes) -> Iterator[None]:
    """Kernels of that line are launched with these sizes inside the block."""
    _trial[name] = sizes
    try:
        yield
    finally:
        del _trial[name]


def write(measured: dict[str, Sizes], path: Path | None = None) -> Path:
    """Add measured tiles to the table, which takes effect at once; returns its path."""
    path = PATH if path is None else path
    merged = {**table(), **measured}
    lines = [f"  {json.dumps(name)}: {json.dumps(list(sizes))}" for name, sizes in sorted(merged.items())]
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    table.cache_clear()
    return path
