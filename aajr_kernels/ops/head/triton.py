"""The streamed head on GPUs: tiles of logits in registers; contracts are those of :mod:`.reference`.

Forms of the passes (K = 1, C hidden, V words; bf16 at 600 TFLOP/s and 3 TB/s, where a plain head forms 3 products
and moves some 16 bytes per token and word):

- *Forward*: a fused kernel, 2 products (logits, their tangents) and no traffic but statistics per token and share of
  the vocabulary, merged by a second kernel in a fixed order. Logits written out by a library's product would cost
  16 bytes per token and word at the least, as much time as a product with C = 1600.
- *Backward* over blocks of columns: a fused kernel forms the tile again (2 products) and writes the cotangents in the
  dtype of the inputs; cuBLAS takes the other 4 products from there, with float32 sums. A block gives its rows of the
  weight's gradient whole, so that only the gradient of h, linear in the tokens, is summed in memory. 8 products.
- *Joint* (the cotangents are expected): over blocks of tokens, the float32 logits of a block are kept between the two
  halves: 6 products, for 8 bytes per token, word and stack and for the weight's gradient, which is then summed in
  float32 once per block of tokens. Pays from C of about 1000 on, and with large blocks.

Memory beside the results: cotangents of a block of columns take `_CHUNK` bytes or as many as h, the sum of h's gradient
4 bytes an element, statistics at most 512 shares of a few numbers per token; the joint form adds the float32 sum of the
weight's gradient and logits of `_KEPT_LEAST` to `_KEPT_MOST` bytes. Never tokens times vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from ...backends.triton.replay import operator
from . import operators
from .joint import Expected, Forward, Joint, Optional, blockwise
from .triton_launch import TANGENTS, DenseProblem, backward, forward

#: bytes of the logits kept by the joint form: with the sum of the weight's gradient, 8 per element of the weight
#: within these bounds, so that the sum is read and written every C tokens at most
_KEPT_LEAST, _KEPT_MOST = 256 << 20, 2 << 30
#: hidden size from which keeping the logits is cheaper than forming them again; float32 products are slower
_JOINT_SIZE = {torch.float32: 128}
_JOINT_SIZE_LOW = 1024


@operator(operators.HEAD_FWD)
def head_fwd(*operands: Any) -> Forward:
    return forward(DenseProblem(*operands))


@operator(operators.HEAD_BWD)
def head_bwd(*args: Any) -> tuple[Optional, Optional, Optional]:
    """As the reference's; the cotangent of the bias in float32."""
    p = DenseProblem(*args[:8])
    q_bar, nll_bar, stats, need_h, need_weight, need_bias = args[8:]
    h_bar = torch.empty(p.h.shape, dtype=p.h.dtype, device=p.h.device) if need_h else None
    w_bar = torch.empty(p.weight.shape, dtype=p.h.dtype, device=p.h.device) if need_weight else None
    b_bar = torch.zeros(p.vocab_size, dtype=torch.float32, device=p.h.device) if need_bias else None
    backward(p, stats, q_bar, nll_bar, None, h_bar, w_bar, None, b_bar)
    return h_bar, w_bar, b_bar


def head_joint(*args: Any) -> Joint | None:
    """Forward and backward of blocks of tokens, whose logits are kept in between: 6 products instead of 8 for K = 1.

    Args:
        args: as for the joint form on CPUs.

    Returns:
        As on CPUs; None where it would not pay or cannot be used: metric l2, float16, few hidden units, many tangents.
    """
    p = DenseProblem(*args[:8])
    expected: Expected = args[8]
    need_h, need_weight, need_bias = args[9:]
    dtype, device = p.h.dtype, p.h.device
    step = _tokens_of_a_block(p.stacks, p.tokens, p.weight, need_weight)
    # float16 gradients are scaled against underflow; here they would be formed before the scale is known
    if (
        p.metric == "l2"
        or dtype == torch.float16
        or p.size < _JOINT_SIZE.get(dtype, _JOINT_SIZE_LOW)
        or p.stacks - 1 > TANGENTS
        or step == 0
    ):
        return None
    whole_tiles = (p.stacks, triton.cdiv(step, 128) * 128, triton.cdiv(p.vocab_size, 128) * 128)
    logits = torch.empty(whole_tiles, dtype=torch.float32, device=device)
    h_bar = torch.empty(p.h.shape, dtype=dtype, device=device) if need_h else None
    w_bar, w_sum = None, None
    if need_weight and (step >= p.tokens or dtype == torch.float32):
        w_bar = torch.empty(p.weight.shape, dtype=dtype, device=device)
    if need_weight and step < p.tokens:
        w_sum = torch.zeros(p.weight.shape, dtype=torch.float32, device=device)
    b_bar = torch.zeros(p.vocab_size, dtype=torch.float32, device=device) if need_bias else None

    def block_backward(block: Any, rows: slice, stats: Tensor, q_bar: Optional, nll_bar: Optional) -> None:
        part = None if h_bar is None else h_bar[:, rows]
        backward(block, stats, q_bar, nll_bar, logits, part, w_bar, w_sum, b_bar)

    results, bars = blockwise(p, step, expected, lambda block: forward(block, logits), block_backward)
    if w_sum is not None:
        w_bar = w_sum.to(dtype)
    return results, (*bars, h_bar, w_bar, b_bar)


def _tokens_of_a_block(stacks: int, tokens: int, weight: Tensor, need_weight: bool) -> int:
    """Tokens whose logits are kept at once, equal blocks; 0 where the memory holds too few."""
    budget = _KEPT_LEAST
    if need_weight:
        budget = min(max(budget, 8 * weight.numel()), _KEPT_MOST)
    step = budget // (4 * stacks * triton.cdiv(weight.shape[0], 128) * 128) // 128 * 128
    if tokens == 0 or step == 0:
        return 0
    blocks = triton.cdiv(tokens, step)
    return min(triton.cdiv(triton.cdiv(tokens, blocks), 128) * 128, tokens)
