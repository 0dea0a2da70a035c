"""Boolean masks of the Triton attention: packed into words, and what tiles of all sizes read from them."""

from __future__ import annotations

import itertools

import pytest
import torch
from backends.triton.test_attention import DEVICE, both, leaves, pytestmark, triton_problem  # noqa: F401
from torch import Tensor

from aajr_kernels.ops.attention.configs import Tile
from aajr_kernels.ops.attention.options import Options

packed_mask = triton_problem.packed_mask
B, H, N, M = 2, 2, 40, 70
SUBSETS = ["BHNM", "BNM", "NM", "BM", "M", "N", "HN", "BH", ""]


def mask_of(axes: str) -> Tensor:
    shape = [n if axis in axes else 1 for axis, n in zip("BHNM", (B, H, N, M))]
    return torch.rand(shape) > 0.4


def unpacked(bits: Tensor, strides: tuple[int | None, ...], rows: int, cols: int) -> Tensor:
    """``[B, H, rows, cols]`` from the words, found by the strides alone as a kernel does."""
    flat, at = bits.cpu().flatten(), torch.arange
    where = at(B)[:, None, None, None] * strides[0] + at(H)[:, None, None] * strides[1]
    where = where + at(rows)[:, None] * (strides[2] or 0) + at(cols) // 32 * (strides[3] or 0)
    return (flat[where] >> (at(cols) % 32)) & 1 != 0


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("axes", SUBSETS)
def test_words_hold_the_mask(axes, transposed):
    mask = mask_of(axes)
    bits, strides = packed_mask(mask.to(DEVICE), transposed)
    whole = mask.expand(B, H, N, M)
    whole = whole.mT if transposed else whole
    assert torch.equal(unpacked(bits, strides, *whole.shape[2:]), whole)
    # a tile reads whole blocks of rows and words
    assert strides[2] is None or bits.shape[2] % 128 == 0
    assert bits.shape[3] % 4 == 0


@pytest.mark.parametrize("transposed", [False, True])
def test_words_take_an_eighth_of_a_large_mask(transposed):
    bits, _ = packed_mask(torch.ones(1, 1, 512, 1024, dtype=torch.bool, device=DEVICE), transposed)
    assert bits.nbytes == 512 * 1024 // 8 and (bits == -1).all()


def test_a_mask_of_any_strides():
    mask = mask_of("BHNM")
    for view in (mask.mT.contiguous().mT, mask.flip(3), torch.cat([mask, mask], 3)[..., 1::2][..., :M]):
        bits, strides = packed_mask(view.to(DEVICE), False)
        assert torch.equal(unpacked(bits, strides, N, M), view)


TILES = [(32, 128), (16, 64), (128, 32), (64, 64), (16, 16)]


@pytest.mark.parametrize(
    ("axes", "tile", "options"),
    [
        pytest.param(axes, tile, options, marks=[pytest.mark.slow] if i % 15 else [])
        for i, (axes, tile, options) in enumerate(
            itertools.product(SUBSETS, TILES, [{}, {"offset": 20, "window": 30}])
        )
    ],
    ids=str,
)
def test_attention_under_a_mask(axes, tile, options, monkeypatch):
    monkeypatch.setattr(triton_problem, "tile", lambda *_: Tile(*tile, 1, 1))
    mask = mask_of(axes)
    if "N" in axes:
        mask[..., 3:5, :] = False  # rows that see nothing
    both(leaves((B, H, 1, N, M, 16, 16)), mask[None], Options(0.3, **options))
