"""Tiles of the attention kernels: a static table by processor, head size and kernel."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from . import tuned


@dataclass(frozen=True)
class Tile:
    """Queries, keys, warps and pipeline stages of a program."""

    m: int
    n: int
    warps: int
    stages: int


#: kernels: the forward; gradients of queries; of keys; of values; of both in one; of a bias
KERNELS = ("fwd", "dq", "dk", "dv", "dkv", "bias")

# (processor, largest head size) -> tiles of KERNELS, for dtypes of 16 bits
_TILES: dict[tuple[str, int], tuple[Tile, ...]] = {
    ("sm_90", 64): (
        Tile(128, 64, 8, 2),
        Tile(128, 32, 8, 2),
        Tile(32, 128, 8, 2),
        Tile(64, 128, 8, 2),
        Tile(32, 128, 8, 2),
        Tile(64, 64, 4, 1),
    ),
    ("sm_90", 128): (
        Tile(128, 64, 8, 2),
        Tile(128, 32, 8, 2),
        Tile(32, 128, 8, 2),
        Tile(64, 128, 8, 2),
        Tile(32, 128, 8, 2),
        Tile(64, 64, 8, 1),
    ),
    ("sm_90", 256): (
        Tile(64, 32, 8, 1),
        Tile(64, 16, 8, 1),
        Tile(16, 64, 8, 1),
        Tile(16, 64, 8, 1),
        Tile(16, 64, 8, 1),
        Tile(32, 32, 8, 1),
    ),
    ("sm_80", 64): (
        Tile(64, 32, 8, 2),
        Tile(64, 32, 8, 2),
        Tile(32, 64, 8, 2),
        Tile(32, 64, 8, 2),
        Tile(32, 64, 8, 2),
        Tile(32, 32, 4, 1),
    ),
    ("sm_80", 128): (
        Tile(64, 32, 8, 2),
        Tile(64, 32, 8, 2),
        Tile(32, 64, 8, 2),
        Tile(32, 64, 8, 2),
        Tile(32, 64, 8, 2),
        Tile(32, 32, 8, 1),
    ),
    ("sm_80", 256): (
        Tile(64, 16, 8, 1),
        Tile(32, 16, 8, 1),
        Tile(16, 32, 8, 1),
        Tile(16, 32, 8, 1),
        Tile(16, 32, 8, 1),
        Tile(16, 16, 4, 1),
    ),
}
# float32 tiles are twice as large in every memory, and are multiplied without matrix units unless as tf32
_FLOAT32 = (
    Tile(32, 32, 4, 1),
    Tile(32, 32, 4, 1),
    Tile(32, 32, 4, 1),
    Tile(32, 32, 4, 1),
    Tile(32, 32, 4, 1),
    Tile(32, 32, 4, 1),
)
_FLOAT32_LARGE = tuple(Tile(16, 16, 4, 1) for _ in KERNELS)


def tile(kernel: str, arch: str, dtype: torch.dtype, d: int, v: int, causal: bool) -> Tile:
    """The tile of a kernel of `KERNELS` for head sizes d and v."""
    index, size = KERNELS.index(kernel), max(d, v)
    limit = 64 if size <= 64 else 128 if size <= 128 else 256
    measured = tuned.lookup(tuned.key(kernel, arch, dtype, limit, causal))
    if measured is not None:
        if measured[0] > 128:
            raise ValueError(
                f"tuned.json: statistics are padded for blocks of 128 queries, got {measured[0]}."
            )
        return Tile(*measured)
    if arch == "interpreter":
        return Tile(32, 32, 1, 1)
    if dtype == torch.float32:
        return (_FLOAT32 if size <= 128 else _FLOAT32_LARGE)[index]
    family = "sm_90" if arch in ("sm_90", "sm_100") else "sm_80"
    found = _TILES[family, limit][index]
    if arch.startswith("gfx"):
        found = Tile(found.m, found.n, 4, 1)
    return found
