"""Which program does what: the grids of the attention kernels, and the head, block and range of a program.

Programs start in the order of their index, the first axis fastest. It counts heads and the second one blocks, the
heaviest first: those that start last are the shortest, and the multiprocessors end together. A section of heads, the
third axis, is as small as keeps that balance, so that the heads that run at a time share the cache.

``python -m bench.schedule`` simulates it with the functions below and the grids of the launchers.
"""

from __future__ import annotations

import triton
import triton.language as tl

# constants of the sizes, not of the device, which alone decide the order of sums
#: programs from which a section is balanced on a device of up to about 150 multiprocessors
SECTION_PROGRAMS = 512
#: programs below which those of a key head share the query heads of its group
SPLIT_PROGRAMS = 200
#: programs along the second and third axis of a grid
GRID_LIMIT = 65535


def grid(batch: int, heads: int, blocks: int) -> tuple[int, int, int]:
    """Heads of a section, blocks of a head, sections.

    Raises:
        ValueError: more blocks than a grid takes.
    """
    if blocks > GRID_LIMIT:
        raise ValueError(
            f"attention: the positions must fit into {GRID_LIMIT} blocks on the triton backend, got {blocks}: choose "
            "backend 'reference' or split the sequence."
        )
    rows = min(batch, -(-SECTION_PROGRAMS // max(1, heads * blocks)))
    while rows < batch and (batch % rows or batch // rows > GRID_LIMIT):
        rows += 1
    return rows * heads, blocks, batch // max(1, rows)


def parts(programs: int, group: int) -> int:
    """Programs that share the `group` query heads of a key head, where one each would be `programs` in all."""
    enough = (n for n in range(1, group) if group % n == 0 and n * programs >= SPLIT_PROGRAMS)
    return next(enough, group)


# Python calls the functions below too, as `place.fn`: they keep to its operators, min and max.


@triton.jit
def place(x, y, z, width, height, LAST_FIRST: tl.constexpr):
    """Head and block of the program (x, y, z) in a grid of that width and height."""
    block = y
    if LAST_FIRST:
        block = height - 1 - y
    return z * width + x, block


@triton.jit
def own_place(LAST_FIRST: tl.constexpr):
    """That of the program that asks."""
    return place(
        tl.program_id(0), tl.program_id(1), tl.program_id(2), tl.num_programs(0), tl.num_programs(1), LAST_FIRST
    )  # fmt: skip


@triton.jit
def visible_keys(
    i0, m, offset, window, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr
):  # fmt: skip
    """The keys ``[low, high)`` that the block of queries from i0 on sees; low is a multiple of BLOCK_N."""
    low = 0
    high = m
    if CAUSAL:
        high = max(min(m, i0 + BLOCK_M + offset), 0)
        if WINDOW:
            low = (max(i0 + offset - window + 1, 0) // BLOCK_N) * BLOCK_N
    return low, high


@triton.jit
def visible_queries(
    j0, n, offset, window, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr
):  # fmt: skip
    """The queries ``[low, high)`` that see the block of keys from j0 on; low is a multiple of BLOCK_M."""
    low = 0
    high = n
    if CAUSAL:
        low = (max(j0 - offset, 0) // BLOCK_M) * BLOCK_M
        if WINDOW:
            high = max(min(n, j0 + BLOCK_N - 1 - offset + window), 0)
    return low, high
