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

# (processor, largest head size) -> tiles of KERNELS, for dtypes of 16 bits. What decides is registers: two accumulators
# of float32 take half of them, and no loop may spill. What that takes, by processor:
# - sm_90 multiplies from shared memory, whole accumulators of 128 rows by 8 warps. Two loops, one of them masked, spill
#   descriptors of shared memory in both: there is one, always masked. In the gradients the scores come last.
# - Where products take their operands from registers (sm_80, sm_120) eight warps divide an accumulator by its rows
#   only if it has at least as many rows as columns; otherwise they share small tiles of scores and repeat them.
# - sm_100 has 512 columns of tensor memory for accumulators, scores and weights alike: larger tiles do not compile.
_TILES: dict[tuple[str, int], tuple[Tile, ...]] = {
    ("sm_90", 64): (
        Tile(128, 64, 8, 2),
        Tile(128, 64, 8, 2),
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
    # heads this large leave no room for 64 rows by warpgroup: products of single warps
    ("sm_90", 256): (
        Tile(32, 16, 8, 1),
        Tile(32, 32, 8, 1),
        Tile(16, 32, 8, 1),
        Tile(16, 32, 8, 1),
        Tile(16, 32, 8, 1),
        Tile(32, 32, 8, 1),
    ),
    ("sm_100", 64): (
        Tile(128, 64, 8, 2),
        Tile(128, 32, 8, 2),
        Tile(32, 64, 4, 2),
        Tile(32, 128, 8, 2),
        Tile(32, 64, 4, 2),
        Tile(32, 32, 4, 1),
    ),
    ("sm_100", 128): (
        Tile(128, 32, 8, 2),
        Tile(64, 32, 4, 2),
        Tile(32, 64, 4, 2),
        Tile(32, 128, 8, 2),
        Tile(32, 64, 4, 2),
        Tile(32, 32, 8, 1),
    ),
    ("sm_80", 64): (
        Tile(128, 64, 8, 2),
        Tile(64, 32, 4, 2),
        Tile(16, 128, 8, 2),
        Tile(16, 128, 8, 2),
        Tile(16, 128, 8, 2),
        Tile(32, 32, 4, 1),
    ),
    ("sm_80", 128): (
        Tile(128, 32, 8, 2),
        Tile(128, 16, 8, 2),
        Tile(16, 128, 8, 2),
        Tile(16, 128, 8, 2),
        Tile(16, 128, 8, 2),
        Tile(32, 32, 8, 1),
    ),
    ("sm_80", 256): (
        Tile(64, 16, 8, 2),
        Tile(32, 16, 8, 1),
        Tile(16, 32, 8, 1),
        Tile(16, 64, 8, 1),
        Tile(16, 32, 8, 1),
        Tile(16, 16, 4, 1),
    ),
    # 99 KB of shared memory
    ("sm_120", 64): (
        Tile(128, 64, 8, 2),
        Tile(64, 16, 4, 2),
        Tile(16, 128, 8, 2),
        Tile(16, 128, 8, 2),
        Tile(16, 128, 8, 2),
        Tile(32, 32, 4, 1),
    ),
    ("sm_120", 128): (
        Tile(64, 32, 8, 2),
        Tile(32, 32, 4, 2),
        Tile(32, 32, 4, 2),
        Tile(32, 64, 8, 2),
        Tile(32, 32, 4, 2),
        Tile(32, 32, 8, 1),
    ),
    ("sm_120", 256): (
        Tile(16, 16, 4, 1),
        Tile(16, 16, 4, 1),
        Tile(16, 32, 8, 1),
        Tile(16, 32, 8, 1),
        Tile(16, 32, 8, 1),
        Tile(16, 16, 4, 1),
    ),
    # 64 KB of local memory; up to 256 registers two waves share a SIMD
    ("gfx", 64): (
        Tile(128, 32, 4, 1),
        Tile(64, 32, 4, 1),
        Tile(32, 64, 4, 1),
        Tile(32, 64, 4, 1),
        Tile(32, 64, 4, 1),
        Tile(32, 32, 4, 1),
    ),
    ("gfx", 128): (
        Tile(64, 32, 4, 1),
        Tile(64, 16, 4, 1),
        Tile(16, 64, 4, 1),
        Tile(32, 64, 4, 1),
        Tile(16, 64, 4, 1),
        Tile(32, 32, 4, 1),
    ),
    ("gfx", 256): (
        Tile(32, 16, 4, 1),
        Tile(32, 16, 4, 1),
        Tile(32, 16, 4, 1),
        Tile(32, 16, 4, 1),
        Tile(32, 16, 4, 1),
        Tile(16, 16, 4, 1),
    ),
}
_TILES["sm_100", 256] = _TILES["sm_120", 256]
# What stands between products and weights takes registers, where these are full without. Tiles that still spill in
# their loops, for heads of 128 (the counts are in the committed budgets): on sm_90 the gradients under a soft cap, a
# bias or dropout and the forward with a bias; on sm_80 the gradient of the queries. Halving the keys or queries again
# would end most of it, but products over 16 columns read more from shared memory than they multiply.
_BUSY: dict[tuple[str, int, str], dict[str, Tile]] = {
    ("sm_90", 64, "bias"): {"dq": Tile(128, 32, 8, 2), "bias": Tile(64, 16, 4, 1)},
    ("sm_90", 64, "softcap"): {"dq": Tile(128, 32, 8, 2), "dkv": Tile(16, 128, 8, 2)},
    ("sm_90", 64, "dropout"): {"dq": Tile(128, 32, 8, 2), "dkv": Tile(16, 128, 8, 2)},
    ("sm_90", 64, "packed"): {"dkv": Tile(16, 128, 8, 2)},
    ("sm_90", 128, "bias"): {"fwd": Tile(128, 32, 8, 2), "dv": Tile(32, 128, 8, 2)},
    ("sm_90", 128, "softcap"): {"fwd": Tile(128, 32, 8, 2), "dv": Tile(32, 128, 8, 2)},
    ("sm_90", 128, "dropout"): {"fwd": Tile(128, 32, 8, 2), "dv": Tile(32, 128, 8, 2)},
    ("sm_90", 128, "packed"): {"dv": Tile(32, 128, 8, 2)},
    ("sm_80", 64, "bias"): {
        "fwd": Tile(128, 32, 8, 2),
        "dq": Tile(64, 16, 4, 2),
        "dkv": Tile(16, 32, 4, 2),
        "bias": Tile(32, 16, 4, 1),
    },
    ("sm_80", 128, "bias"): {
        "fwd": Tile(64, 32, 8, 2),
        "dq": Tile(32, 16, 4, 2),
        "dk": Tile(16, 64, 8, 2),
        "bias": Tile(32, 16, 8, 1),
    },
    ("sm_80", 128, "softcap"): {"fwd": Tile(64, 32, 8, 2), "dk": Tile(16, 64, 8, 2)},
}
# float32: multiplied without matrix units unless as tf32, by threads that hold whole rows of the operands
_FLOAT32 = {
    64: (Tile(32, 32, 8, 1), *(Tile(16, 32, 8, 1) for _ in KERNELS[1:])),
    128: tuple(Tile(16, 16, 8, 1) for _ in KERNELS),
    256: tuple(Tile(16, 16, 8, 1) for _ in KERNELS),
}


def _family(arch: str) -> str:
    """The processor of the table that `arch` is like."""
    if arch.startswith("gfx"):
        return "gfx"
    number = int(arch.removeprefix("sm_"))
    if number >= 100:
        return "sm_100" if number < 110 else "sm_120"
    # 163 KB of shared memory on sm_80 and sm_87, 99 KB on their siblings
    return "sm_90" if number == 90 else "sm_80" if number in (80, 87) else "sm_120"


def tile(kernel: str, arch: str, dtype: torch.dtype, d: int, v: int, causal: bool, busy: str = "") -> Tile:
    """The tile of a kernel of `KERNELS` for head sizes d and v; busy with "bias", "softcap", "dropout" or "packed"."""
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
        return _FLOAT32[limit][index]
    family = _family(arch)
    return _BUSY.get((family, limit, busy), {}).get(kernel, _TILES[family, limit][index])
