"""Boolean masks as bits: a word of a row of a tile holds 32 of its positions.

A tile of bools takes a register per position and as many pointers, in kernels whose registers are full, and is read
anew by every head. Packed by a pass of its own, an eighth of the memory of the mask, it takes a word or two per row.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["H", "rows", "cols"])
def _pack_mask_kernel(
    mask, bits, mask_strides, bit_strides, H, rows, cols, ROWS: tl.constexpr, WORDS: tl.constexpr
):
    """Words of a block of rows: bit k of word w is position 32 w + k; zero beyond the mask.

    Programs: (blocks of rows, blocks of words, batch rows times heads).
    """
    b = (tl.program_id(2) // H).to(tl.int64)
    h = (tl.program_id(2) % H).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    word = tl.program_id(1) * WORDS + tl.arange(0, WORDS)
    bit = tl.arange(0, 32)
    col = word[:, None] * 32 + bit[None, :]
    pointers = mask + b * mask_strides[0] + h * mask_strides[1]
    pointers = pointers + row.to(tl.int64)[:, None, None] * mask_strides[2]
    pointers = pointers + col.to(tl.int64)[None, :, :] * mask_strides[3]
    inside = (row < rows)[:, None, None] & (col < cols)[None, :, :]
    set_bits = (tl.load(pointers, mask=inside, other=0) != 0).to(tl.int32)
    words = tl.sum(set_bits << bit[None, None, :], 2)
    base = bits + b * bit_strides[0] + h * bit_strides[1]
    tl.store(base + row.to(tl.int64)[:, None] * bit_strides[2] + word[None, :], words)


@triton.jit
def allowed(bits, strides, b, h, row, col, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Which positions of the tile ``[ROWS, COLS]`` at `row`, `col` may be seen; `col` is a multiple of COLS."""
    base = bits + b.to(tl.int64) * strides[0] + h.to(tl.int64) * strides[1]
    offset = 0
    if strides[2] is not None:
        base += row.to(tl.int64) * strides[2]
        offset = tl.arange(0, ROWS)[:, None] * strides[2]
    if strides[3] is None:
        seen = tl.load(base + offset) + tl.zeros([1, COLS], tl.int32) != 0
    else:
        base += col // 32
        position = tl.arange(0, COLS)[None, :]
        word = tl.load(base + offset)
        if COLS < 32:
            word = word >> (col & 31)
        for w in tl.static_range(1, COLS // 32):
            word = tl.where(position >= 32 * w, tl.load(base + w + offset), word)
        if COLS > 32:
            seen = (word << (31 - (position & 31))) < 0
        else:
            # the threads of a warp differ in these bits of their columns, the registers of a thread in the others:
            # one shift per word, then constants
            seen = (word >> (position & 6)) & (1 << (position & 25)) != 0
    return seen
