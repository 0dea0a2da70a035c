"""Sizes of the head's tiles: a pure function of the processor, the number of stacks and the dtype."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Tile:
    """Tokens, columns of the vocabulary and depth of a step; `descriptors`: the copy engine fills shared memory."""

    tokens: int
    columns: int
    depth: int
    warps: int
    stages: int
    descriptors: bool = False


#: of cotangents from logits that are there
ELEMENTWISE = Tile(32, 128, 32, 8, 1)


def product_tile(architecture: str, dtype: torch.dtype, precision: str) -> Tile:
    """Of the products over tokens that count: `tokens` rows of the result, `columns`, and `depth` of a step."""
    if architecture == "interpreter":
        return Tile(32, 32, 32, 4, 1)
    if architecture.startswith("gfx") or (dtype == torch.float32 and precision == "ieee"):
        return Tile(64, 64, 32, 4, 2)
    return Tile(128, 128, 64 if dtype.itemsize == 2 else 32, 8, 3)


def tile(architecture: str, stacks: int, dtype: torch.dtype, precision: str) -> Tile:
    """The float32 sums of all stacks share the registers: `stacks` blocks of tokens by columns."""
    if architecture == "interpreter":
        return Tile(64, 64, 32, 4, 1)
    few = stacks <= 2
    if architecture.startswith("gfx"):
        return Tile(64, 64 if stacks <= 4 else 32, 32, 4, 2)
    if dtype == torch.float32 and precision == "ieee":
        return Tile(64 if few else 32, 64 if few else 32, 32, 8 if few else 4, 2)
    capability = int(architecture.removeprefix("sm_"))
    if precision == "tf32x3":  # parts of the operands and a second sum beside those of tf32
        if capability == 80:
            return Tile(64, 64, 16, 8, 3)
        return Tile(128, 128 if capability == 90 else 64, 32, 8, 3, True)
    depth = 64 if dtype.itemsize == 2 else 32
    if capability in (90, 100, 103):
        if few:
            return Tile(128, 128, depth, 8, 4, True)
        return Tile(64, 128, depth, 8, 4, True) if stacks <= 4 else Tile(64, 64, depth, 8, 2, True)
    if few:
        return Tile(128, 128, depth // 2, 8, 3)
    return Tile(32, 128 if stacks <= 4 else 64, depth // 2, 8, 3)
