"""Launches of the streamed head's kernels: what a problem is, its statistics, its cotangents and their products."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ...backends.triton import launch as gpu
from . import triton_counted as counted
from .joint import Forward, Optional
from .products import add_product, product
from .reference import Problem
from .triton_config import ELEMENTWISE, Tile, tile
from .triton_kernels import METRICS, _head_bwd_kernel, _head_fwd_kernel
from .triton_merge import _head_merge_kernel

#: bytes of the cotangents of a chunk of the vocabulary; and its columns
_CHUNK, _LEAST_COLUMNS, _MOST_COLUMNS = 256 << 20, 1024, 16384
#: programs that the forward aims at, and bounds of the shares of the vocabulary
_PROGRAMS, _LEAST_SPLITS, _MOST_SPLITS = 4096, 16, 512
#: tokens and shares of a step of the merging kernel: constants, since another number is another kernel
_MERGED_TOKENS, _MERGED_SHARES = 16, 32
#: tangents that share one tile's primal; more come in groups, which form the primal again
TANGENTS = 7


@dataclass
class DenseProblem(Problem):
    """A problem whose tensors the kernels can read: rows and vectors are dense."""

    def __post_init__(self) -> None:
        self.h, self.weight = _dense_rows(self.h), _dense_rows(self.weight)
        self.bias, self.labels = (None if t is None else t.contiguous() for t in (self.bias, self.labels))
        if self.stacks == 1:  # without tangents only the loss is left, which l2 takes from the vocabulary
            self.metric = "l2"

    @functools.cached_property
    def hidden(self) -> Tensor:
        """``[(1 + K) T, C]``, one matrix for products over all stacks: a view where they follow each other."""
        return self.h.flatten(0, 1)

    @property
    def size(self) -> int:
        return self.weight.shape[1]

    def groups(self, tangents: bool) -> list[tuple[int, int]]:
        """First tangent (counted from 1) and number of tangents of every launch."""
        if not tangents:
            return [(1, 0)]
        return [(k, min(TANGENTS, self.stacks - k)) for k in range(1, self.stacks, TANGENTS)]

    @property
    def most(self) -> int:
        """Stacks of the largest launch of the forward; tiles and products of all launches are those for so many.

        A logit then has the same bits in every launch, and e^(z - peak) of the likeliest word is 1.
        """
        return 1 + (0 if self.metric == "l2" else min(TANGENTS, self.stacks - 1))

    def products(self) -> str:
        """How products of float32 are formed: three of tf32 for one only where the sums of few stacks leave room."""
        offered = gpu.float32_products(self.h)
        return "ieee" if offered == "tf32x3" and self.most > 2 else offered

    def tile(self) -> Tile:
        sizes = tile(gpu.architecture(self.h.device), self.most, self.h.dtype, self.products())
        described = sizes.descriptors and all(_describable(x) for x in (self.hidden, self.weight))
        return replace(sizes, descriptors=described)

    def operands(self, t: Tile) -> tuple[Any, Any]:
        if not t.descriptors:
            return self.hidden, self.weight
        return (
            TensorDescriptor.from_tensor(self.hidden, [t.tokens, t.depth]),
            TensorDescriptor.from_tensor(self.weight, [t.columns, t.depth]),
        )

    def sizes(self, logits: Optional) -> tuple[int, ...]:
        """Sizes and strides as both kernels take them; `logits`: room for whole tiles of them, or None."""
        rows = (self.tokens, self.vocab_size, self.size, self.hidden.shape[0])
        room = (0, 0) if logits is None else logits.shape[1:]
        return *rows, self.hidden.stride(0), self.weight.stride(0), *room

    def constants(self, t: Tile, stacks: int) -> dict[str, Any]:
        return dict(
            METRIC=METRICS[self.metric],
            S=stacks,
            BT=t.tokens,
            BV=t.columns,
            BK=t.depth,
            DESCRIPTOR=t.descriptors,
            EVEN=self.size % t.depth == 0,
            HAS_BIAS=self.bias is not None,
            HAS_SCALE=self.scale != 1.0,
            HAS_SOFTCAP=self.softcap is not None,
            HAS_COUNT=self.count is not None,
            PRECISION=self.products(),
            GROUP=8,
            num_warps=t.warps,
            num_stages=t.stages,
        )

    def add_rows(self, total: Tensor, part: Tensor, weight: Tensor) -> None:
        """``total += part weight``, of the tokens that count."""
        if self.count is None:
            add_product(total, part, weight)
        else:
            counted.add_rows(total, part, weight, self.count, self.tokens)

    def add_weight(self, total: Optional, part: Tensor, hidden: Tensor) -> Tensor:
        """``total + partᵀ hidden`` in float32, in place where there is a total, over the tokens that count."""
        if self.count is not None:
            more = total is not None
            if total is None:
                total = part.new_empty((part.shape[1], hidden.shape[1]), dtype=torch.float32)
            counted.add_weight(total, part, hidden, self.count, self.tokens, more)
        elif total is None:
            total = product(part.t(), hidden)
        else:
            add_product(total, part.t(), hidden)
        return total


def _describable(x: Tensor) -> bool:
    """Whether the copy engine takes the matrix: rows that start at multiples of 16 bytes."""
    row = x.stride(0) * x.element_size()
    return x.numel() > 0 and row % 16 == 0 and x.stride(0) >= x.shape[1] and x.data_ptr() % 16 == 0


def _dense_rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def forward(p: DenseProblem, logits: Optional = None) -> Forward:
    """q, nll and statistics; `logits`, where given, takes the logits before the soft cap, whole tiles of them."""
    k, device = p.stacks - 1, p.h.device
    stats = torch.empty((2 + 4 * k, p.tokens), dtype=torch.float32, device=device)
    nll = None if p.labels is None else stats.new_empty(p.tokens)
    q = stats[2 + 2 * k : 2 + 3 * k]
    if gpu.architecture(device) == "":  # a dry run
        return q.clone(), nll, stats
    if p.metric == "l2":
        stats.zero_()
        torch.linalg.vector_norm(p.h[1:], dim=-1, dtype=torch.float32, out=q).square_()
        if p.beyond is not None:
            q.masked_fill_(p.beyond, 0.0)
    if p.tokens > 0 and (p.metric != "l2" or p.labels is not None):
        for first, count in p.groups(p.metric != "l2"):
            _statistics(p, first, count, stats, nll, logits)
    return q.clone(), nll, stats


def _statistics(
    p: DenseProblem, first: int, count: int, stats: Tensor, nll: Optional, logits: Optional
) -> None:
    t, metric, device = p.tile(), METRICS[p.metric], p.h.device
    blocks, token_blocks = triton.cdiv(p.vocab_size, t.columns), triton.cdiv(p.tokens, t.tokens)
    splits = min(max(_LEAST_SPLITS, triton.cdiv(_PROGRAMS, token_blocks)), _MOST_SPLITS, blocks)
    per_split = triton.cdiv(blocks, splits)
    splits = triton.cdiv(blocks, per_split)
    softmax = 2 if metric >= 2 or nll is not None else 0
    fields = softmax + (metric == 3) + count * (0, 1, 3, 5)[metric]
    partial = stats.new_empty((fields, splits, p.tokens))
    at_label = None if nll is None else torch.zeros_like(nll)  # 0 where a label is ignored
    gpu.launch(
        _head_fwd_kernel,
        (token_blocks * splits,),
        device,
        *p.operands(t),
        p.bias,
        p.labels,
        p.count,
        partial,
        at_label,
        logits,
        *p.sizes(logits),
        first,
        splits,
        per_split,
        p.ignore_index,
        p.scale,
        float(p.softcap or 0.0),
        PARTS=1 if p.softcap is None else 4,
        HAS_LABELS=nll is not None,
        KEEP=logits is not None,
        **p.constants(t, 1 + count),
    )
    gpu.launch(
        _head_merge_kernel,
        (triton.cdiv(p.tokens, _MERGED_TOKENS),),
        device,
        partial,
        p.labels,
        p.count,
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
        HAS_COUNT=p.count is not None,
        BT=_MERGED_TOKENS,
        BS=_MERGED_SHARES,
        num_warps=4,
    )


def backward(
    p: DenseProblem,
    stats: Tensor,
    q_bar: Optional,
    nll_bar: Optional,
    logits: Optional,
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
        h_sum = torch.zeros(p.hidden.shape, dtype=torch.float32, device=p.h.device)
    if not runs and w_bar is not None:
        w_bar.zero_()
    groups = p.groups(tangents)
    width = _chunk_width(p, 1 + groups[0][1])
    scratch = p.h.new_empty(((1 + groups[0][1]) * p.tokens, width)) if runs else p.h
    for start in range(0, p.vocab_size, width) if runs else ():
        columns = slice(start, min(start + width, p.vocab_size))
        rows = None if w_sum is None else w_sum[columns]
        for first, count in groups:
            loss_bar = nll_bar if first == 1 else None
            z_bar = _cotangents(p, stats, q_bar, loss_bar, logits, first, count, columns, scratch, b_bar)
            primal = loss_bar is not None or p.softcap is not None or p.metric != "logits"
            for here, there in _matrices(p.tokens, first, count, primal):
                part, hidden = z_bar[here], p.hidden[there]
                if h_sum is not None:
                    p.add_rows(h_sum[there], part, p.weight[columns])
                if w_bar is not None or rows is not None:
                    rows = p.add_weight(rows, part, hidden)
        if w_bar is not None and w_sum is None and rows is not None:
            w_bar[columns] = rows
    if h_bar is not None and h_sum is not None:
        total = h_sum.view(h_bar.shape)
        if p.metric == "l2" and q_bar is not None:
            states = p.h[1:] if p.beyond is None else p.h[1:].masked_fill(p.beyond.unsqueeze(-1), 0.0)
            total[1:].addcmul_(2.0 * q_bar.unsqueeze(-1), states)
        h_bar.copy_(total)


def _chunk_width(p: DenseProblem, stacks: int) -> int:
    """Columns of the logits whose cotangents are formed at once: bytes of `_CHUNK` or of h, whichever are more."""
    row = stacks * max(p.tokens, 1) * p.h.element_size()
    width = min(max(_CHUNK // row, p.size, _LEAST_COLUMNS), _MOST_COLUMNS) // 128 * 128
    chunks = triton.cdiv(p.vocab_size, width)
    return triton.cdiv(triton.cdiv(p.vocab_size, chunks), 128) * 128  # equal chunks, rows aligned


def _matrices(tokens: int, first: int, count: int, primal: bool) -> list[tuple[slice, slice]]:
    """Rows of a group's cotangents and of h that belong together: the primal's, unless zero, then the tangents'."""
    if first == 1 and primal:
        return [(slice(0, (1 + count) * tokens),) * 2]
    tangents = (slice(tokens, (1 + count) * tokens), slice(first * tokens, (first + count) * tokens))
    return [(slice(0, tokens), slice(0, tokens)), tangents] if primal else [tangents]


def _cotangents(
    p: DenseProblem,
    stats: Tensor,
    q_bar: Optional,
    nll_bar: Optional,
    logits: Optional,
    first: int,
    count: int,
    columns: slice,
    scratch: Tensor,
    b_bar: Optional,
) -> Tensor:
    """Cotangents ``[(1 + count) T, columns]`` in `scratch`; their sums over the tokens are added to `b_bar`."""
    t, width = p.tile() if logits is None else ELEMENTWISE, columns.stop - columns.start
    token_blocks = triton.cdiv(p.tokens, t.tokens)
    b_partial = None
    if b_bar is not None:  # with a count some blocks have nothing to add
        b_partial = (b_bar.new_empty if p.count is None else b_bar.new_zeros)((token_blocks, width))
    gpu.launch(
        _head_bwd_kernel,
        (token_blocks * triton.cdiv(width, t.columns),),
        p.h.device,
        *((p.hidden, p.weight) if logits is not None else p.operands(t)),
        p.bias,
        p.labels,
        p.count,
        stats,
        q_bar,
        nll_bar,
        logits,
        scratch,
        b_partial,
        *p.sizes(logits),
        scratch.stride(0),
        p.stacks,
        first,
        columns.start,
        width,
        p.ignore_index,
        p.scale,
        float(p.softcap or 0.0),
        PARTS=1 if logits is not None else 2 if p.softcap is None else 4,
        HAS_NLL=nll_bar is not None,
        KEPT=logits is not None,
        NEED_BIAS=b_bar is not None,
        **p.constants(t, 1 + count),
    )
    if b_bar is not None and b_partial is not None:
        b_bar[columns] += b_partial.sum(0)
    return scratch[: (1 + count) * p.tokens, :width]
