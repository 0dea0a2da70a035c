"""Launches of the streamed head's kernels: what a problem is, its statistics, its cotangents and their products."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from ...backends.triton import launch as gpu
from .triton_config import ELEMENTWISE, Tile, tile
from .triton_kernels import METRICS, _head_bwd_kernel, _head_fwd_kernel
from .triton_merge import _head_merge_kernel
from .triton_products import add_product, product

#: bytes of the cotangents of a block of words; and its words
_CHUNK, _LEAST_WORDS, _MOST_WORDS = 256 << 20, 1024, 16384
#: programs wanted of the forward, and bounds of the shares of the vocabulary
_PROGRAMS, _LEAST_SPLITS, _MOST_SPLITS = 4096, 16, 512
#: tokens and shares of a step of the merging kernel: constants, since another number is another kernel
_MERGED_TOKENS, _MERGED_SHARES = 16, 32
#: tangents that share one tile's primal; more come in groups, which form the primal again
TANGENTS = 7

Optional = torch.Tensor | None


@dataclass
class Problem:
    """Hidden states as a matrix ``[(1 + K) T, C]``, the weight ``[V, C]`` and what turns their product into logits."""

    h: torch.Tensor
    weight: torch.Tensor
    bias: Optional
    labels: Optional
    metric: str
    scale: float
    softcap: float | None
    ignore_index: int
    stacks: int
    tokens: int

    @property
    def words(self) -> int:
        return self.weight.shape[0]

    @property
    def size(self) -> int:
        return self.weight.shape[1]

    def groups(self, tangents: bool) -> list[tuple[int, int]]:
        """First tangent (counted from 1) and number of tangents of every launch."""
        if not tangents:
            return [(1, 0)]
        return [(k, min(TANGENTS, self.stacks - k)) for k in range(1, self.stacks, TANGENTS)]

    def tile(self, stacks: int) -> Tile:
        chosen = tile(gpu.architecture(self.h.device), stacks, self.h.dtype, gpu.float32_products(self.h))
        described = chosen.descriptors and all(_describable(x) for x in (self.h, self.weight))
        return replace(chosen, descriptors=described)

    def operands(self, t: Tile) -> tuple[Any, Any]:
        if not t.descriptors:
            return self.h, self.weight
        return (
            TensorDescriptor.from_tensor(self.h, [t.tokens, t.depth]),
            TensorDescriptor.from_tensor(self.weight, [t.words, t.depth]),
        )

    def constants(self, t: Tile) -> dict[str, Any]:
        return dict(
            BT=t.tokens,
            BV=t.words,
            BK=t.depth,
            DESCRIPTOR=t.descriptors,
            EVEN=self.size % t.depth == 0,
            HAS_BIAS=self.bias is not None,
            HAS_SOFTCAP=self.softcap is not None,
            PRECISION=gpu.float32_products(self.h),
            GROUP=8,
            num_warps=t.warps,
            num_stages=t.stages,
        )


def _describable(x: torch.Tensor) -> bool:
    """Whether the copy engine takes the matrix: rows that start at multiples of 16 bytes."""
    row = x.stride(0) * x.element_size()
    return x.numel() > 0 and row % 16 == 0 and x.stride(0) >= x.shape[1] and x.data_ptr() % 16 == 0


def _dense_rows(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def problem(
    h: torch.Tensor,
    weight: torch.Tensor,
    bias: Optional,
    labels: Optional,
    metric: str,
    scale: float,
    softcap: float | None,
    ignore_index: int,
) -> Problem:
    stacks, tokens, _ = h.shape
    h = _dense_rows(h)
    return Problem(
        h.flatten(0, 1),  # one matrix for products over all stacks: a view where they follow each other
        _dense_rows(weight),
        None if bias is None else bias.contiguous(),
        None if labels is None else labels.contiguous(),
        metric
        if stacks > 1
        else "l2",  # without tangents only the loss is left, which l2 takes from the vocabulary
        scale,
        softcap,
        ignore_index,
        stacks,
        tokens,
    )


def forward(p: Problem, kept: Optional = None) -> tuple[torch.Tensor, Optional, torch.Tensor]:
    """q, nll and statistics; `kept`, where given, takes the logits before the soft cap, whole tiles of them."""
    k, device = p.stacks - 1, p.h.device
    stats = torch.empty((1 + 4 * k, p.tokens), dtype=torch.float32, device=device)
    nll = None if p.labels is None else stats.new_empty(p.tokens)
    q = stats[1 + 2 * k : 1 + 3 * k]
    if gpu.architecture(device) == "":  # a dry run
        return q.clone(), nll, stats
    if p.metric == "l2":
        stats.zero_()
        torch.linalg.vector_norm(p.h[p.tokens :], dim=-1, dtype=torch.float32, out=q.view(-1)).square_()
    if p.tokens > 0 and (p.metric != "l2" or p.labels is not None):
        for first, count in p.groups(p.metric != "l2"):
            _statistics(p, first, count, stats, nll, kept)
    return q.clone(), nll, stats


def _statistics(
    p: Problem, first: int, count: int, stats: torch.Tensor, nll: Optional, kept: Optional
) -> None:
    t, metric, device = p.tile(1 + count), METRICS[p.metric], p.h.device
    blocks, token_blocks = triton.cdiv(p.words, t.words), triton.cdiv(p.tokens, t.tokens)
    splits = min(max(_LEAST_SPLITS, triton.cdiv(_PROGRAMS, token_blocks)), _MOST_SPLITS, blocks)
    per_split = triton.cdiv(blocks, splits)
    splits = triton.cdiv(blocks, per_split)
    softmax = 2 if metric >= 2 or nll is not None else 0
    fields = softmax + (metric == 3) + count * (0, 1, 3, 5)[metric]
    partial = stats.new_empty((fields, splits, p.tokens))
    at_label = None if nll is None else torch.zeros_like(nll)  # 0 where a label is ignored
    sizes = (p.tokens, p.words, p.size, p.h.shape[0], p.h.stride(0), p.weight.stride(0))
    gpu.launch(
        _head_fwd_kernel,
        (token_blocks * splits,),
        device,
        *p.operands(t),
        p.bias,
        p.labels,
        partial,
        at_label,
        kept,
        *sizes,
        *(0, 0) if kept is None else kept.shape[1:],
        first,
        splits,
        per_split,
        p.ignore_index,
        p.scale,
        float(p.softcap or 0.0),
        METRIC=metric,
        S=1 + count,
        PARTS=1 if p.softcap is None else 4,
        HAS_LABELS=nll is not None,
        KEEP=kept is not None,
        **p.constants(t),
    )
    gpu.launch(
        _head_merge_kernel,
        (triton.cdiv(p.tokens, _MERGED_TOKENS),),
        device,
        partial,
        p.labels,
        at_label,
        stats,
        nll,
        p.tokens,
        splits,
        p.ignore_index,
        p.stacks,
        first,
        METRIC=metric,
        K=count,
        HAS_LABELS=nll is not None,
        BT=_MERGED_TOKENS,
        BS=_MERGED_SHARES,
        num_warps=4,
    )


def backward(
    p: Problem,
    stats: torch.Tensor,
    q_bar: Optional,
    nll_bar: Optional,
    kept: Optional,
    h_bar: Optional,
    w_bar: Optional,
    w_sum: Optional,
    b_bar: Optional,
) -> None:
    """Writes `h_bar` and `w_bar`, or adds to `w_sum` ``[V, C]``, and adds to `b_bar` ``[V]``; both sums float32."""
    if gpu.architecture(p.h.device) == "":  # a dry run
        return
    q_bar, nll_bar = (None if bar is None else bar.float().contiguous() for bar in (q_bar, nll_bar))
    tangents = q_bar is not None and p.metric != "l2"
    runs = p.tokens > 0 and (tangents or nll_bar is not None)
    h_sum = None
    if h_bar is not None:
        h_sum = torch.zeros(p.h.shape, dtype=torch.float32, device=p.h.device)
    if not runs and w_bar is not None:
        w_bar.zero_()
    groups = p.groups(tangents)
    width = _words_of_a_chunk(p, 1 + groups[0][1])
    scratch = p.h.new_empty(((1 + groups[0][1]) * p.tokens, width)) if runs else p.h
    for start in range(0, p.words, width) if runs else ():
        words = slice(start, min(start + width, p.words))
        rows = None if w_sum is None else w_sum[words]
        for first, count in groups:
            loss_bar = nll_bar if first == 1 else None
            z_bar = _cotangents(p, stats, q_bar, loss_bar, kept, first, count, words, scratch, b_bar)
            primal = loss_bar is not None or p.softcap is not None or p.metric != "logits"
            for here, there in _matrices(p.tokens, first, count, primal):
                part, hidden = z_bar[here], p.h[there]
                if h_sum is not None:
                    add_product(h_sum[there], part, p.weight[words])
                if rows is not None:
                    add_product(rows, part.t(), hidden)
                elif w_bar is not None:
                    rows = product(part.t(), hidden)
        if w_bar is not None and w_sum is None and rows is not None:
            w_bar[words] = rows
    if h_bar is not None and h_sum is not None:
        total = h_sum.view(h_bar.shape)
        if p.metric == "l2" and q_bar is not None:
            total[1:].addcmul_(2.0 * q_bar.unsqueeze(-1), p.h[p.tokens :].view(total[1:].shape))
        h_bar.copy_(total)


def _words_of_a_chunk(p: Problem, stacks: int) -> int:
    """Words whose cotangents are formed at once: the bytes of `_CHUNK` or of h, whichever are more."""
    row = stacks * max(p.tokens, 1) * p.h.element_size()
    width = min(max(_CHUNK // row, p.size, _LEAST_WORDS), _MOST_WORDS) // 128 * 128
    chunks = triton.cdiv(p.words, width)
    return triton.cdiv(triton.cdiv(p.words, chunks), 128) * 128  # equal chunks, rows aligned


def _matrices(tokens: int, first: int, count: int, primal: bool) -> list[tuple[slice, slice]]:
    """Rows of a group's cotangents and of h that belong together: the primal's, unless zero, then the tangents'."""
    if first == 1 and primal:
        return [(slice(0, (1 + count) * tokens),) * 2]
    tangents = (slice(tokens, (1 + count) * tokens), slice(first * tokens, (first + count) * tokens))
    return [(slice(0, tokens), slice(0, tokens)), tangents] if primal else [tangents]


def _cotangents(
    p: Problem,
    stats: torch.Tensor,
    q_bar: Optional,
    nll_bar: Optional,
    kept: Optional,
    first: int,
    count: int,
    words: slice,
    scratch: torch.Tensor,
    b_bar: Optional,
) -> torch.Tensor:
    """Cotangents ``[(1 + count) T, words]`` in `scratch`; their sums over the tokens are added to `b_bar`."""
    t, number = p.tile(1 + count) if kept is None else ELEMENTWISE, words.stop - words.start
    token_blocks = triton.cdiv(p.tokens, t.tokens)
    b_partial = None if b_bar is None else b_bar.new_empty((token_blocks, number))
    gpu.launch(
        _head_bwd_kernel,
        (token_blocks * triton.cdiv(number, t.words),),
        p.h.device,
        *((p.h, p.weight) if kept is not None else p.operands(t)),
        p.bias,
        p.labels,
        stats,
        q_bar,
        nll_bar,
        kept,
        scratch,
        b_partial,
        p.tokens,
        p.words,
        p.size,
        p.h.shape[0],
        p.h.stride(0),
        p.weight.stride(0),
        *(0, 0) if kept is None else kept.shape[1:],
        scratch.stride(0),
        p.stacks,
        first,
        words.start,
        number,
        p.ignore_index,
        p.scale,
        float(p.softcap or 0.0),
        METRIC=METRICS[p.metric],
        S=1 + count,
        PARTS=1 if kept is not None else 2 if p.softcap is None else 4,
        HAS_NLL=nll_bar is not None,
        KEPT=kept is not None,
        NEED_BIAS=b_bar is not None,
        **p.constants(t),
    )
    if b_bar is not None and b_partial is not None:
        b_bar[words] += b_partial.sum(0)
    return scratch[: (1 + count) * p.tokens, :number]
