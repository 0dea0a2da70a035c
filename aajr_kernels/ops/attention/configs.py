"""Tiles of the attention kernels: a static table by processor, head size and kernel.

``python -m bench.tune`` measures other tiles on a processor.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ...backends.operator import constant
from ...backends.triton.launch import architecture, forget
from ...torch_private import matmul_precision


class Tile(NamedTuple):
    """Queries, keys, warps and pipeline stages of a program."""

    m: int
    n: int
    warps: int
    stages: int


Sizes = tuple[int, int, int, int]
#: kernels: the forward; gradients of queries; of keys; of values; of both in one; of a bias
KERNELS = ("fwd", "dq", "dk", "dv", "dkv", "bias")

# Processor, largest head size -> tiles of KERNELS, for dtypes of 16 bits. Registers decide: two accumulators of float32
# take half of them, and no loop may spill. By processor:
# - sm_90 multiplies from shared memory, whole accumulators of 128 rows by 8 warps. Two loops, one of them masked, spill
#   descriptors of shared memory in both: there is one, always masked. In the gradients the scores come last.
# - Where products take their operands from registers (sm_80, sm_120) eight warps divide an accumulator by its rows
#   only if it has at least as many rows as columns; otherwise they share small tiles of scores and repeat them.
# - sm_100 has 512 columns of tensor memory for accumulators, scores and weights alike: larger tiles do not compile.
# - sm_90 has no room for 64 rows by warpgroup at heads of 256: products of single warps there.
# - sm_120 has 99 KB of shared memory. gfx has 64 KB of local memory; up to 256 registers two waves share a SIMD.
# fmt: off
_TILES: dict[str, dict[int, tuple[Sizes, ...]]] = {
    "sm_90": {
        64: ((128, 64, 8, 2), (128, 64, 8, 2), (32, 128, 8, 2), (64, 128, 8, 2), (32, 128, 8, 2), (64, 64, 4, 1)),
        128: ((128, 64, 8, 2), (128, 32, 8, 2), (32, 128, 8, 2), (64, 128, 8, 2), (32, 128, 8, 2), (64, 64, 8, 1)),
        256: ((32, 16, 8, 1), (32, 32, 8, 1), (16, 32, 8, 1), (16, 32, 8, 1), (16, 32, 8, 1), (32, 32, 8, 1)),
    },
    "sm_100": {
        64: ((128, 64, 8, 2), (128, 32, 8, 2), (32, 64, 4, 2), (32, 128, 8, 2), (32, 64, 4, 2), (32, 32, 4, 1)),
        128: ((128, 32, 8, 2), (64, 32, 4, 2), (32, 64, 4, 2), (32, 128, 8, 2), (32, 64, 4, 2), (32, 32, 8, 1)),
    },
    "sm_80": {
        64: ((128, 64, 8, 2), (64, 32, 4, 2), (16, 128, 8, 2), (16, 128, 8, 2), (16, 128, 8, 2), (32, 32, 4, 1)),
        128: ((128, 32, 8, 2), (128, 16, 8, 2), (16, 128, 8, 2), (16, 128, 8, 2), (16, 128, 8, 2), (32, 32, 8, 1)),
        256: ((64, 16, 8, 2), (32, 16, 8, 1), (16, 32, 8, 1), (16, 64, 8, 1), (16, 32, 8, 1), (16, 16, 4, 1)),
    },
    "sm_120": {
        64: ((128, 64, 8, 2), (64, 16, 4, 2), (16, 128, 8, 2), (16, 128, 8, 2), (16, 128, 8, 2), (32, 32, 4, 1)),
        128: ((64, 32, 8, 2), (32, 32, 4, 2), (32, 32, 4, 2), (32, 64, 8, 2), (32, 32, 4, 2), (32, 32, 8, 1)),
        256: ((16, 16, 4, 1), (16, 16, 4, 1), (16, 32, 8, 1), (16, 32, 8, 1), (16, 32, 8, 1), (16, 16, 4, 1)),
    },
    "gfx": {
        64: ((128, 32, 4, 1), (64, 32, 4, 1), (32, 64, 4, 1), (32, 64, 4, 1), (32, 64, 4, 1), (32, 32, 4, 1)),
        128: ((64, 32, 4, 1), (64, 16, 4, 1), (16, 64, 4, 1), (32, 64, 4, 1), (16, 64, 4, 1), (32, 32, 4, 1)),
        256: ((32, 16, 4, 1), (32, 16, 4, 1), (32, 16, 4, 1), (32, 16, 4, 1), (32, 16, 4, 1), (16, 16, 4, 1)),
    },
}
_TILES["sm_100"][256] = _TILES["sm_120"][256]
# A bias, a cap or dropout between products and weights takes registers, where these are full without. Tiles that still
# spill in their loops, for heads of 128 (the counts are in the committed budgets): on sm_90 the gradients under a soft
# cap, a bias or dropout and the forward with a bias; on sm_80 the gradient of the queries. Halving the keys or queries
# again would end most of it, but products over 16 columns read more from shared memory than they multiply.
_BUSY: dict[tuple[str, int, str], dict[str, Sizes]] = {
    ("sm_90", 64, "bias"): {"dq": (128, 32, 8, 2), "bias": (64, 16, 4, 1)},
    ("sm_90", 64, "softcap"): {"dq": (128, 32, 8, 2), "dkv": (16, 128, 8, 2)},
    ("sm_90", 64, "dropout"): {"dq": (128, 32, 8, 2), "dkv": (16, 128, 8, 2)},
    ("sm_90", 64, "packed"): {"dkv": (16, 128, 8, 2)},
    ("sm_90", 128, "bias"): {"fwd": (128, 16, 8, 2), "dv": (32, 128, 8, 2)},
    ("sm_90", 128, "softcap"): {"fwd": (128, 32, 8, 2), "dv": (32, 128, 8, 2)},
    ("sm_90", 128, "dropout"): {"fwd": (128, 32, 8, 2), "dv": (32, 128, 8, 2)},
    ("sm_90", 128, "packed"): {"dv": (32, 128, 8, 2)},
    ("sm_80", 64, "bias"): {
        "fwd": (128, 32, 8, 2), "dq": (64, 16, 4, 2), "dkv": (16, 32, 4, 2), "bias": (32, 16, 4, 1),
    },
    ("sm_80", 128, "bias"): {"fwd": (64, 32, 8, 2), "dq": (32, 16, 4, 2), "dk": (16, 64, 8, 2), "bias": (32, 16, 8, 1)},
    ("sm_80", 128, "softcap"): {"fwd": (64, 32, 8, 2), "dk": (16, 64, 8, 2)},
    ("sm_100", 64, "bias"): {"bias": (32, 16, 4, 1)},
    ("sm_100", 128, "bias"): {"bias": (32, 16, 8, 1)},
    ("sm_120", 64, "bias"): {"bias": (32, 16, 4, 1)},
    ("sm_120", 128, "bias"): {"bias": (32, 16, 8, 1)},
}
# fmt: on
# float32: multiplied without matrix units unless as tf32, by threads that hold whole rows of the operands
_FLOAT32 = {64: Tile(16, 32, 8, 1), 128: Tile(16, 16, 8, 1), 256: Tile(16, 16, 8, 1)}
# As three products of tf32, whose operands take twice the registers: tiles of KERNELS but the last for heads up to 64.
# On sm_100 the sums of three products exceed tensor memory, and larger heads spill by the hundred.
_TF32X3: dict[str, tuple[Sizes, ...]] = {
    "sm_80": ((64, 16, 8, 1), (16, 32, 8, 1), (32, 32, 8, 1), (32, 32, 8, 1), (32, 32, 8, 1)),
    "sm_90": ((128, 32, 8, 1), (16, 32, 8, 1), (16, 16, 4, 1), (16, 16, 4, 1), (16, 16, 4, 1)),
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


def products(offered: str, arch: str, d: int, v: int, busy: str) -> str:
    """How kernels form products of float32, from what the processor offers: three of tf32 only where they fit."""
    if offered == "tf32x3" and (max(d, v) > 64 or busy or arch not in (*_TF32X3, "interpreter")):
        return "ieee"
    return offered


def spills_in_triton(q: Tensor, k: Tensor, v: Tensor, *context: Tensor) -> bool:
    """Whether a kernel keeps hundreds of numbers of its innermost loop in memory, by compilation: `auto` avoids it.

    float32 rows of large heads exceed the registers; where matrix units multiply them, as tf32 or on AMD, those of
    more than 128.
    """
    size = max(q.shape[-1], v.shape[-1])
    return q.dtype == torch.float32 and (size > 128 or (size > 64 and not _has_float32_units(q.device)))


@constant
def _has_float32_units(device: torch.device) -> bool:
    return architecture(device).startswith("gfx") or matmul_precision() == "tf32"


def tile(
    kernel: str,
    arch: str,
    dtype: torch.dtype,
    d: int,
    v: int,
    causal: bool,
    busy: str = "",
    precision: str = "ieee",
) -> Tile:
    """The tile of a kernel of `KERNELS` for head sizes d and v.

    `busy` with "bias", "softcap", "dropout" or "packed"; `precision`: that of :func:`products`.
    """
    size = max(d, v)
    limit = 64 if size <= 64 else 128 if size <= 128 else 256
    if kernel in _trials:
        return Tile(*_trials[kernel])
    if arch == "interpreter":
        return Tile(32, 32, 1, 1)
    if precision == "tf32x3":
        return Tile(*_TF32X3[arch][KERNELS.index(kernel)])
    if dtype == torch.float32:
        return Tile(32, 32, 8, 1) if kernel == "fwd" and limit == 64 else _FLOAT32[limit]
    family = _family(arch)
    usual = _TILES[family][limit][KERNELS.index(kernel)]
    return Tile(*_BUSY.get((family, limit, busy), {}).get(kernel, usual))


_trials: dict[str, Sizes] = {}


@contextlib.contextmanager
def trial(kernel: str, sizes: Sizes) -> Iterator[None]:
    """Inside the block that kernel is launched with these sizes."""
    _trials[kernel] = sizes
    forget()
    try:
        yield
    finally:
        del _trials[kernel]
        forget()
