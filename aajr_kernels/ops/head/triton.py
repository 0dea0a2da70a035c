"""The streamed head on GPUs: tiles of logits in registers; contracts are those of :mod:`.reference`.

What is chosen, and why (K = 1, C hidden, V words; bf16 at 600 TFLOP/s and 3 TB/s, where a plain head forms 3 products
and moves some 16 bytes per token and word):

- *Forward*: a fused kernel, 2 products (logits, their tangents) and no traffic but statistics per token and share of
  the vocabulary, merged by a second kernel in a fixed order. Logits written out by a library's product would cost
  16 bytes per token and word at the least, as much time as a product with C = 1600.
- *Backward* over blocks of words: a fused kernel forms the tile again (2 products) and writes the cotangents in the
  dtype of the inputs; cuBLAS takes the other 4 products from there, with float32 sums. A block of words gives its rows
  of the weight's gradient whole, so that only the gradient of h, linear in the tokens, is summed in memory. 8 products.
- *Joint* (the cotangents are expected): over blocks of tokens, the float32 logits of a block are kept between the two
  halves: 6 products, for 8 bytes per token, word and stack and for the weight's gradient, which is then summed in
  float32 once per block of tokens. Pays from C of about 1000 on, and with large blocks.

Memory beside the results: cotangents of a block of words take `_CHUNK` bytes or as many as h, the sum of h's gradient
4 bytes an element, statistics at most 512 shares of a few numbers per token; the joint form adds the float32 sum of the
weight's gradient and logits of `_KEPT_LEAST` to `_KEPT_MOST` bytes. Never tokens times vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton

from ...backends.triton.launch import operator
from . import operators
from .triton_launch import TANGENTS, Optional, backward, forward, problem

#: bytes of the logits kept by the joint form: with the sum of the weight's gradient, 8 per element of the weight
#: within these bounds, so that the sum is read and written every C tokens at most
_KEPT_LEAST, _KEPT_MOST = 256 << 20, 2 << 30
#: hidden size from which keeping the logits is cheaper than forming them again; float32 products are slower
_JOINT_SIZE = {torch.float32: 128}
_JOINT_SIZE_LOW = 1024
#: configurations of the joint form whose two passes are loaded too
_LOADED: set[tuple[Any, ...]] = set()


def head_fwd(
    h: torch.Tensor,
    weight: torch.Tensor,
    bias: Optional,
    labels: Optional,
    metric: str,
    scale: float,
    softcap: float | None,
    ignore_index: int,
) -> tuple[torch.Tensor, Optional, torch.Tensor]:
    """q ``[K, T]``, nll ``[T]`` or None, and statistics ``[1 + 4K, T]``; float32."""
    q, nll, stats = _head_fwd(h, weight, bias, labels, metric, scale, softcap, ignore_index)
    return q, nll, stats


@operator(operators.HEAD_FWD)
def _head_fwd(*operands: Any) -> tuple[torch.Tensor, Optional, torch.Tensor]:
    return forward(problem(*operands))


def head_bwd(
    q_bar: Optional,
    nll_bar: Optional,
    h: torch.Tensor,
    weight: torch.Tensor,
    bias: Optional,
    labels: Optional,
    stats: torch.Tensor,
    metric: str,
    scale: float,
    softcap: float | None,
    ignore_index: int,
    need_h: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Optional, Optional, Optional]:
    """Cotangents of h ``[1 + K, T, C]``, weight ``[V, C]`` and bias ``[V]`` (float32); None where not needed."""
    operands = (h, weight, bias, labels, metric, scale, softcap, ignore_index)
    h_bar, w_bar, b_bar = _head_bwd(*operands, q_bar, nll_bar, stats, need_h, need_weight, need_bias)
    return h_bar, w_bar, b_bar


@operator(operators.HEAD_BWD)
def _head_bwd(*args: Any) -> tuple[Optional, Optional, Optional]:
    h, weight, *_ = args
    q_bar, nll_bar, stats, need_h, need_weight, need_bias = args[8:]
    h_bar = torch.empty(h.shape, dtype=h.dtype, device=h.device) if need_h else None
    w_bar = torch.empty(weight.shape, dtype=h.dtype, device=h.device) if need_weight else None
    b_bar = torch.zeros(weight.shape[0], dtype=torch.float32, device=h.device) if need_bias else None
    backward(problem(*args[:8]), stats, q_bar, nll_bar, None, h_bar, w_bar, None, b_bar)
    return h_bar, w_bar, b_bar


def head_joint(
    h: torch.Tensor,
    weight: torch.Tensor,
    bias: Optional,
    labels: Optional,
    metric: str,
    scale: float,
    softcap: float | None,
    ignore_index: int,
    expected: Callable[[torch.Tensor, slice], tuple[Optional, Optional]],
    need_h: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[tuple[torch.Tensor, Optional, torch.Tensor], tuple[Optional, ...]] | None:
    """Forward and backward of blocks of tokens, whose logits are kept in between: 6 products instead of 8 for K = 1.

    Args:
        expected: from q ``[K, t]`` of the tokens of a slice to the cotangents of q and nll.

    Returns:
        What `head_fwd` returns, and ``(q_bar, nll_bar, h_bar, weight_bar, bias_bar)``; None where it would not pay or
        cannot be used: metric l2, float16, few hidden units, many tangents, a CUDA graph that is being captured (the
        backward compares what arrives with what was expected, on the host).
    """
    stacks, tokens, size = h.shape
    step = _tokens_of_a_block(stacks, tokens, weight, need_weight)
    least = _JOINT_SIZE.get(h.dtype, _JOINT_SIZE_LOW)
    capturing = h.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    # float16 gradients are scaled against underflow; here they would be formed before the scale is known
    if (
        metric == "l2"
        or h.dtype == torch.float16
        or size < least
        or stacks - 1 > TANGENTS
        or step == 0
        or capturing
    ):
        return None
    device, vocab_size = h.device, weight.shape[0]
    room = (stacks, triton.cdiv(step, 128) * 128, triton.cdiv(vocab_size, 128) * 128)  # whole tiles
    kept = torch.empty(room, dtype=torch.float32, device=device)
    h_bar = torch.empty(h.shape, dtype=h.dtype, device=device) if need_h else None
    w_bar, w_sum = None, None
    if need_weight and (step >= tokens or h.dtype == torch.float32):
        w_bar = torch.empty(weight.shape, dtype=h.dtype, device=device)
    if need_weight and step < tokens:
        w_sum = torch.zeros(weight.shape, dtype=torch.float32, device=device)
    b_bar = torch.zeros(vocab_size, dtype=torch.float32, device=device) if need_bias else None
    results, cotangents = [], []
    for start in range(0, tokens, step):
        rows = slice(start, min(start + step, tokens))
        here = None if labels is None else labels[rows]
        p = problem(h[:, rows], weight, bias, here, metric, scale, softcap, ignore_index)
        results.append(forward(p, kept))
        cotangents.append(expected(results[-1][0], rows))
        if start == 0 and _may_be_captured(device):
            operands = (h, weight, bias, labels, metric, scale, softcap, ignore_index)
            _load_two_passes(*operands, *cotangents[0], need_bias)
        part = None if h_bar is None else h_bar[:, rows]
        backward(p, results[-1][2], *cotangents[-1], kept, part, w_bar, w_sum, b_bar)
    q, nll, stats = (_joined([r[i] for r in results]) for i in range(3))
    bars = (_joined([bar[i] for bar in cotangents]) for i in range(2))
    if w_sum is not None:
        w_bar = w_sum.to(h.dtype)
    assert q is not None and stats is not None
    return (q, nll, stats), (*bars, h_bar, w_bar, b_bar)


def _may_be_captured(device: torch.device) -> bool:
    return device.type == "cuda"


def _load_two_passes(
    h: torch.Tensor,
    weight: torch.Tensor,
    bias: Optional,
    labels: Optional,
    metric: str,
    scale: float,
    softcap: float | None,
    ignore_index: int,
    q_bar: Optional,
    nll_bar: Optional,
    need_bias: bool,
) -> None:
    """Run the two passes once on a few tokens.

    A CUDA graph may load no kernel while it is captured, and takes the two passes, of which the steps before that
    warm a model up would have seen nothing.
    """
    present = tuple(x is None for x in (bias, labels, softcap, q_bar, nll_bar))
    key = (h.device, h.dtype, h.shape[0], weight.shape, metric, *present, need_bias)
    if key in _LOADED:
        return
    few = slice(0, min(h.shape[1], 128))
    q_bar, nll_bar = (None if x is None else x[..., few] for x in (q_bar, nll_bar))
    p = problem(
        h[:, few], weight, bias, None if labels is None else labels[few], metric, scale, softcap, ignore_index
    )
    h_bar = torch.empty(h[:, few].shape, dtype=h.dtype, device=h.device)
    b_bar = torch.zeros(len(weight), dtype=torch.float32, device=h.device) if need_bias else None
    backward(p, forward(p)[2], q_bar, nll_bar, None, h_bar, None, None, b_bar)
    _LOADED.add(key)


def _tokens_of_a_block(stacks: int, tokens: int, weight: torch.Tensor, need_weight: bool) -> int:
    """Tokens whose logits are kept at once, equal blocks; 0 where the memory holds too few."""
    budget = _KEPT_LEAST
    if need_weight:
        budget = min(max(budget, 8 * weight.numel()), _KEPT_MOST)
    step = budget // (4 * stacks * triton.cdiv(weight.shape[0], 128) * 128) // 128 * 128
    if tokens == 0 or step == 0:
        return 0
    blocks = triton.cdiv(tokens, step)
    return min(triton.cdiv(triton.cdiv(tokens, blocks), 128) * 128, tokens)


def _joined(parts: list[Any]) -> Optional:
    """The blocks along the tokens, None if they are."""
    present = [part for part in parts if part is not None]
    return torch.cat(present, -1) if present else None
