"""Tiles of the attention kernels: a static table by processor, kernel, dtype and head size."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Tile:
    """Queries, keys, warps and pipeline stages of a program."""

    m: int
    n: int
    warps: int
    stages: int


def tile(kernel: str, arch: str, dtype: torch.dtype, d: int, v: int, causal: bool) -> Tile:
    """The tile of a kernel: "fwd", "dq", "dk", "dv", "dkv" or "bias"."""
    if arch == "interpreter":
        return Tile(32, 32, 1, 1)
    return Tile(128, 64, 8, 2)
