"""Device functions that the attention kernels share: loads, masks, scores, products, dropout.

A tile of scores is ``[queries, keys]`` or, TRANSPOSED, ``[keys, queries]``; positions and row statistics come
already as a column or a row, so that every function below serves both.

Boolean masks travel as bits: a word of a row of a tile holds 32 of its positions. A tile of bools takes a register per
position and as many pointers, in kernels whose registers are full, and is read anew by every head. Packed by a pass of
its own, an eighth of the memory of the mask, it takes a word or two per row.
"""

import triton
import triton.language as tl

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def load_rows(
    x, strides, b, h, start, end, ROWS: tl.constexpr, COLS: tl.constexpr, WIDTH: tl.constexpr,
    TMA: tl.constexpr,
):  # fmt: skip
    """Rows ``[start, start + ROWS)`` of ``x[b, h]``, ``[ROWS, COLS]``; zeros from `end` and WIDTH on.

    `x` is a descriptor of blocks ``[1, 1, ROWS, COLS]`` with TMA, whose bounds end the rows, and a pointer
    without it.
    """
    if TMA:
        tile = x.load([b, h, start, 0]).reshape(ROWS, COLS)
    else:
        base = x + b.to(tl.int64) * strides[0] + h.to(tl.int64) * strides[1]
        base += start.to(tl.int64) * strides[2]
        row = tl.arange(0, ROWS)
        col = tl.arange(0, COLS)
        pointers = base + row[:, None] * strides[2] + col[None, :]
        inside = (start + row < end)[:, None]
        if COLS != WIDTH:
            inside = inside & (col < WIDTH)[None, :]
        tile = tl.load(pointers, mask=inside, other=0.0)
    return tile


@triton.jit
def store_rows(
    x, strides, b, h, start, end, tile, ROWS: tl.constexpr, COLS: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    """Store ``[ROWS, COLS]`` where :func:`load_rows` with a pointer reads."""
    base = x + b.to(tl.int64) * strides[0] + h.to(tl.int64) * strides[1]
    base += start.to(tl.int64) * strides[2]
    row = tl.arange(0, ROWS)
    col = tl.arange(0, COLS)
    inside = (start + row < end)[:, None]
    if COLS != WIDTH:
        inside = inside & (col < WIDTH)[None, :]
    tl.store(base + row[:, None] * strides[2] + col[None, :], tile.to(x.dtype.element_ty), mask=inside)


@triton.jit
def sequence(
    q_start, k_start, block, N, M, offset, BLOCK: tl.constexpr, PACKED: tl.constexpr, RIGHT: tl.constexpr
):
    """First query and key, sizes, block within the sequence and diagonal of the sequence a program works on.

    Packed sequences have ``N // BLOCK + sequences`` blocks, whatever their lengths, which a launch need not
    know: sequence i owns the blocks from ``start_i // BLOCK + i`` on, at least as many as it has blocks.
    """
    if PACKED:
        index = block * 0
        last = tl.num_programs(1) - N // BLOCK - 1
        while index < last:
            middle = (index + last + 1) // 2
            if tl.load(q_start + middle).to(tl.int32) // BLOCK + middle <= block:
                index = middle
            else:
                last = middle - 1
        q_first = tl.load(q_start + index).to(tl.int32)
        k_first = tl.load(k_start + index).to(tl.int32)
        n = tl.load(q_start + index + 1).to(tl.int32) - q_first
        m = tl.load(k_start + index + 1).to(tl.int32) - k_first
        block -= q_first // BLOCK + index
        if RIGHT:
            offset = m - n
    else:
        q_first, k_first, n, m = N * 0, N * 0, N, M
    return q_first, k_first, n, m, block, offset


@triton.jit
def add_product(total, a, b, TRANSPOSED: tl.constexpr, PRECISION: tl.constexpr):
    """``total + a bᵀ`` of the rows a of queries and b of keys, or its transpose."""
    if TRANSPOSED:
        c = tl.dot(b, tl.trans(a), total, input_precision=PRECISION)
    else:
        c = tl.dot(a, tl.trans(b), total, input_precision=PRECISION)
    return c


@triton.jit
def expand(x, TRANSPOSED: tl.constexpr):
    """A statistic per query as a column, or as a row of transposed tiles."""
    return x[None, :] if TRANSPOSED else x[:, None]


@triton.jit
def pin(x, PIN: tl.constexpr):
    """`x`, which the compiler must have in registers, all of it, at this place and knows nothing of.

    What a warpgroup's product reads from registers or starts from must not be written between the instructions of
    the product: the assembler would then wait after every one of them. The compiler does so where it computes an
    operand as late as possible, or keeps one register for equal elements and copies it.
    """
    if PIN:
        if x.dtype.primitive_bitwidth == 16:
            x = tl.inline_asm_elementwise(
                "mov.b32 $0, $1;", "=r,r", [x], dtype=x.dtype, is_pure=False, pack=2
            )
        else:
            x = tl.inline_asm_elementwise(
                "mov.b32 $0, $1;", "=f,f", [x], dtype=x.dtype, is_pure=False, pack=1
            )
    return x


@triton.jit
def settle(x, PIN: tl.constexpr):
    """The scalar `x`, after every warpgroup's product issued so far: none, before the loop.

    The assembler otherwise takes the zeros that accumulators start from, written before the loop, for part of the
    products that are under way from one iteration to the next, and waits after every product.
    """
    if PIN:
        code: tl.constexpr = "wgmma.wait_group.sync.aligned 0; mov.b32 $0, $1;"
        x = tl.inline_asm_elementwise(code, "=r,r", [x], dtype=tl.int32, is_pure=False, pack=1)
    return x


@triton.jit
def seen(i, m, offset, window, CAUSAL: tl.constexpr):
    """The last key that the queries i see, and the last one before their window."""
    last = i * 0 + m - 1
    if CAUSAL:
        last = tl.minimum(last, i + offset)
    return last, i + offset - window


@triton.jit(do_not_specialize=["b_stride", "h_stride", "row_stride", "col_stride", "H", "rows", "cols"])
def _pack_mask_kernel(
    mask, bits, b_stride, h_stride, row_stride, col_stride, bit_strides, H, rows, cols,
    ROWS: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """Words of a block of rows: bit k of word w is position 32 w + k; zero beyond the mask. A stride of None is 1.

    Programs: (batch rows times heads, blocks of rows, blocks of words).
    """
    b = (tl.program_id(0) // H).to(tl.int64)
    h = (tl.program_id(0) % H).to(tl.int64)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    word = tl.program_id(2) * WORDS + tl.arange(0, WORDS)
    bit = tl.arange(0, 32)
    col = word[:, None] * 32 + bit[None, :]
    row_at = row.to(tl.int64) if row_stride is None else row.to(tl.int64) * row_stride
    col_at = col.to(tl.int64) if col_stride is None else col.to(tl.int64) * col_stride
    pointers = mask + b * b_stride + h * h_stride + row_at[:, None, None] + col_at[None, :, :]
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


@triton.jit
def mask_tile(mask, strides, b, h, i, j, n, m):
    """The tile of a bias ``[B|1, H|1, N|1, M|1]`` (strides 0 along broadcast axes), zero outside.

    Only a row of it, or a column if transposed, where all queries share one: their stride is None.
    """
    base = mask + b.to(tl.int64) * strides[0] + h.to(tl.int64) * strides[1]
    pointers = base + j.to(tl.int64) * strides[3]
    inside = j < m
    if strides[2] is not None:
        pointers = pointers + i.to(tl.int64) * strides[2]
        inside = inside & (i < n)
    return tl.load(pointers, mask=inside, other=0)


@triton.jit
def tanh(x):
    """Accurate near zero too, where 1 - 2 / (e^2x + 1) cancels."""
    size = tl.abs(x)
    far = 1.0 - 2.0 / (tl.exp(2.0 * size) + 1.0)
    y = x * x
    # x P(x²) / Q(x²): the continued fraction of tanh, whose error is below rounding up to 0.6
    near = size * (945.0 + y * (105.0 + y)) / (945.0 + y * (420.0 + 15.0 * y))
    return tl.where(x < 0, -1.0, 1.0) * tl.where(size < 0.25, near, far)


@triton.jit
def scores(
    qk, mask, mask_strides, b, h, i, j, row, col, n, m, last, before, scale, softcap,
    WINDOW: tl.constexpr, MASK: tl.constexpr, SOFTCAP: tl.constexpr, CHECK: tl.constexpr,
):  # fmt: skip
    """Scores from the products of queries and keys, −∞ where masked, and tanh's value under a soft cap.

    In units of log 2, so that their exponentials are powers of two; with a bias in natural units, since a bias near
    the largest number must not be multiplied. MASK is 0 (none), 1 (bits along the second axis of the tile,
    which is at `row`, `col`) or 2 (bias). Where CHECK, queries see the keys up to `last`, with a WINDOW those after
    `before`.
    """
    tau = 0.0
    if SOFTCAP:
        tau = tanh(qk * (scale / softcap))
        s = tau * (softcap if MASK == 2 else softcap * LOG2E)
    else:
        s = qk * (scale if MASK == 2 else scale * LOG2E)
    if MASK == 2:
        s += mask_tile(mask, mask_strides, b, h, i, j, n, m).to(tl.float32)
    elif MASK == 1:
        s = tl.where(allowed(mask, mask_strides, b, h, row, col, s.shape[0], s.shape[1]), s, float("-inf"))
    if CHECK:
        inside = j <= last
        if WINDOW:
            inside = inside & (j > before)
        s = tl.where(inside, s, float("-inf"))
    return s, tau


@triton.jit
def weights(s, shift, lnorm, MASK: tl.constexpr, SPLIT: tl.constexpr):
    """Normalised weights from scores and the saved statistics of the rows (a column or a row).

    SPLIT: the logarithm of the normaliser is kept apart from the shift, beside which it would be rounded: a bias may
    be near the largest number, and float32 scores are worth it.
    """
    if MASK == 2:
        p = tl.exp2((s - shift) * LOG2E + lnorm)
    elif SPLIT:
        p = tl.exp2((s - shift) + lnorm)
    else:
        p = tl.exp2(s - shift)
    return p


@triton.jit
def joint(j, C, CONTEXT: tl.constexpr):
    """Positions among all keys, of which the C of a context are the first; C is None where they do not count."""
    if C is not None and not CONTEXT:
        j += C
    return j


@triton.jit
def kept(seed, b, h, heads, i, j, dropout):
    """1 / (1 − p) where a weight is kept and 0 where it is dropped: a function of seed and position alone."""
    zero = (i + j) * 0
    word, _, _, _ = tl.philox(tl.load(seed), zero + j, zero + i, zero + (b * heads + h), zero)
    # 24 bits: as many as float32 holds below one
    uniform = (word >> 8).to(tl.float32) * 5.9604644775390625e-8
    return tl.where(uniform >= dropout, 1.0 / (1.0 - dropout), 0.0)
