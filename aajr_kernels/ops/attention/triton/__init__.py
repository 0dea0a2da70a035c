"""Attention on Triton kernels; functions and contracts are those of the reference."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ....backends.triton.launch import architecture, launch
from ....backends.triton.replay import operator
from .. import operators
from ..configs import Tile
from ..options import Options
from . import schedule
from .backward import (
    _attention_bwd_bias_kernel,
    _attention_bwd_kv_kernel,
    _attention_bwd_q_kernel,
    _attention_rows_kernel,
    _attention_sum_kernel,
)
from .forward import _attention_fwd_kernel
from .problem import Problem, block_size, descriptors_fit, like, padded_rows, row_dense, rows, stack

__all__ = ["attention_bwd", "attention_fwd"]


def _problem(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, flat: tuple[Any, ...]) -> Problem:
    options = Options(*flat)
    if options.dropout and options.drawn is None:
        raise TypeError("attention: the Triton kernels take the seed of the dropout mask as a tensor.")
    return Problem.of(q, k, v, mask, options)


@operator(operators.ATTENTION_FWD)
def _attention_fwd(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *flat: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Output ``[1+K, B, H, N, V]`` (in memory ``[1+K, B, N, H, V]``), statistics of the softmax, means of tangents.

    The statistics are ``[2, B, H, NP]`` with N padded to NP: shift and -log2 of the normaliser, with a bias or in
    float32, otherwise ``[1, B, H, NP]``: the log2 of the sum of the exponentials; +inf where a query sees nothing.
    The means are ``[K, B, H, NP]``.
    """
    q, k, v = (row_dense(x) for x in (q, k, v))
    p = _problem(q, k, v, mask, flat)
    _, B, H, N, _ = q.shape
    V, K = v.shape[-1], p.tangents
    # heads next to features: the caller's transpose back is then a view
    out = q.new_empty((1 + K, B, N, H, V)).transpose(2, 3)
    stats = q.new_empty((2 if p.split else 1, B, H, p.padded), dtype=torch.float32)
    mu = stats.new_empty((K if p.moves else 0, B, H, p.padded))
    if not p.parts:
        out.zero_()
        stats.fill_(float("inf"))
        mu.zero_()
        return out, stats, mu
    for index in range(min(K - 1, 0), K):
        launch_fwd(p, index, out, stats, mu)
    return out, stats, mu


@operator(operators.ATTENTION_BWD)
def _attention_bwd(
    out_bar: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    out: Tensor,
    stats: Tensor,
    mu: Tensor,
    need_q: bool,
    need_k: bool,
    need_v: bool,
    need_bias: bool,
    need_context_k: bool,
    need_context_v: bool,
    *flat: Any,
) -> operators.Gradients:
    """Gradients of q, k, v, the bias and the context's keys and values, None where not needed."""
    q, k, v, out_bar = (row_dense(x) for x in (q, k, v, out_bar))
    p = _problem(q, k, v, mask, flat)
    q_bar = like(q) if need_q else None
    keys = [KeyBars.of(p, need_k, need_v)]
    if p.context is not None:
        keys.append(KeyBars.of(p.context, need_context_k, need_context_v))
    biases = [_bias_bar(part) for part in p.parts] if need_bias and mask is not None else []
    if 0 in q.shape[1:4] or not p.parts:
        for bar in (q_bar, *(x for one in keys for x in one.bars), *biases):
            if bar is not None:
                bar.zero_()
    else:
        _launch_bwd(p, out_bar, out, stats, mu, q_bar, keys, biases)
    bias_bar = _joint_bias(mask, biases) if need_bias and mask is not None else None
    k_bar, v_bar, context_k_bar, context_v_bar = (*(x for one in keys for x in one.bars), None, None)[:4]
    return q_bar, k_bar, v_bar, bias_bar, context_k_bar, context_v_bar


attention_fwd, attention_bwd = operators.with_options(_attention_fwd, _attention_bwd)


@dataclass(frozen=True)
class KeyBars:
    """Gradients of the keys and values of a problem, None where not needed.

    Attributes:
        kernels: those that compute them.
        bars: of keys and of values, ``[1|1+K, B, HK, M, features]``.
        parts: where the kernels store: in place, or in float32 memory for those of more heads, to be added.
        sums: memory for the primal's gradients, summed over several tangents.
    """

    p: Problem
    kernels: list[str]
    bars: tuple[Tensor | None, ...]
    parts: tuple[Tensor | None, ...]
    sums: tuple[Tensor | None, ...]

    @classmethod
    def of(cls, p: Problem, need_k: bool, need_v: bool) -> KeyBars:
        """Those of a problem, with their memory."""
        kernels = p.key_kernels(need_k, need_v)
        bars = like(p.k) if need_k else None, like(p.v) if need_v else None
        parts = tuple(
            None if bar is None else _parts(p, bar, next(x for x in kernels if name in x))
            for name, bar in zip("kv", bars)
        )
        return cls(p, kernels, bars, parts, tuple(_sum_over_tangents(p, x) for x in parts))

    def add_parts(self) -> None:
        """Add what the heads of a group have."""
        for bar, parts in zip(self.bars, self.parts):
            if bar is not None and parts is not None and parts is not bar:
                _launch_sum(parts, bar)


def _sum_over_tangents(p: Problem, bar: Tensor | None) -> Tensor | None:
    """Memory for the primal's part of a gradient, summed over several tangents in float32; None for fewer."""
    if bar is None or p.tangents < 2:
        return None
    return torch.empty(bar.shape[1:], dtype=torch.float32, device=bar.device)


def _launch_bwd(
    p: Problem,
    out_bar: Tensor,
    out: Tensor,
    stats: Tensor,
    mu: Tensor,
    q_bar: Tensor | None,
    keys: list[KeyBars],
    biases: list[Tensor],
) -> None:
    K = p.tangents
    delta = torch.empty((2, *stats.shape[1:]), dtype=torch.float32, device=stats.device)
    q_sum = _sum_over_tangents(p, q_bar)
    for index in range(min(K - 1, 0), K):
        launch_rows(p, index, out, out_bar, delta)
        whole = Backward(p, index, out_bar, stats, mu, delta)
        for one in keys:
            for kernel in one.kernels:
                replace(whole, p=one.p).launch_kv(kernel, *one.parts, *one.sums)
        if q_bar is not None:
            whole.launch_q(q_bar, q_sum)
        for part, bias_bar in zip(p.parts, biases):
            replace(whole, p=part).launch_bias(bias_bar)
    for one in keys:
        one.add_parts()


def _bias_bar(p: Problem) -> Tensor:
    """Memory for the gradient of the bias of a problem's keys, in float32, in parts that are to be added."""
    assert p.mask is not None
    parts = p.bias_grid(p.mask.shape[1:])[1]
    return padded_rows((parts, *p.mask.shape), torch.float32, p.q.device)


def _joint_bias(mask: Tensor, biases: list[Tensor]) -> Tensor:
    """The gradient of `mask` from those of :func:`_bias_bar`: one after another, or added where all keys share it."""
    totals = [bar[0] if len(bar) == 1 else bar.sum(0) for bar in biases]
    bar = torch.empty(mask.shape, dtype=mask.dtype, device=mask.device)
    if not totals:
        return bar.zero_()
    if mask.shape[-1] == 1:
        return bar.copy_(sum(totals[1:], totals[0]))
    for total, part in zip(totals, bar.split([x.shape[-1] for x in totals], -1)):
        part.copy_(total)
    return bar


def _parts(p: Problem, bar: Tensor, kernel: str) -> Tensor:
    """Where a kernel of keys stores gradients: `bar`, or float32 memory for those of more heads, to be added."""
    heads = p.shared_heads(kernel)
    if heads == bar.shape[2]:
        return bar
    return torch.empty((*bar.shape[:2], heads, *bar.shape[3:]), dtype=torch.float32, device=bar.device)


def _launch_sum(parts: Tensor, bar: Tensor) -> None:
    stacks, B, HK, M, D = bar.shape
    block = 32
    launch(
        _attention_sum_kernel,
        (B * HK, -(-M // block), stacks),
        bar.device,
        parts,
        bar,
        parts.stride(0),
        parts.stride()[1:4],
        bar.stride(0),
        bar.stride()[1:4],
        HK,
        M,
        parts.shape[2] // HK,
        D=D,
        BLOCK_D=block_size(D),
        BLOCK_N=block,
        num_warps=4,
    )


def launch_fwd(p: Problem, index: int, out: Tensor, stats: Tensor, mu: Tensor) -> None:
    tile, arguments, strides, context, constants = _shared(p, "fwd", index, p.q, p.k, p.v)
    launch(
        _attention_fwd_kernel,
        p.grid(tile.m, padded=True),
        p.q.device,
        *arguments,
        *(p.options.starts or (None, None)),
        out[0],
        stack(out, index),
        stats,
        mu[index] if p.moves and index >= 0 else None,
        *strides,
        out.stride()[1:4],
        *p.scalars(),
        *context,
        **constants,
    )


def _shared(
    p: Problem, kernel: str, index: int, *stacks: Tensor
) -> tuple[Tile, tuple[Any, ...], tuple[Any, ...], tuple[Any, ...], dict[str, Any]]:
    """Arguments that kernels have in common.

    Returns:
        The tile; the first arguments (q, k, v, any cotangents, masks) and their strides; the arguments of a context:
        how many keys, keys, values and masks, and their strides; the constants.
    """
    arch, tile, constants = architecture(p.q.device), p.tile(kernel), p.constants(index)
    tensors = [x[0] for x in stacks] + [stack(x, index) for x in stacks]
    context = p.context if kernel in ("fwd", "dq") else None
    before = [] if context is None else [context.k[0], context.v[0]]
    tma = kernel != "bias" and p.options.starts is None and descriptors_fit(arch, *tensors, *before)
    size, width = constants["BLOCK_D"], constants["BLOCK_V"]
    blocks = [(tile.m, size), (tile.n, size), (tile.n, width), (tile.m, width)][: len(stacks)] * 2
    mask, mask_tan, mask_strides = _masks(p, kernel, index)
    arguments = (*(rows(x, block, tma) for x, block in zip(tensors, blocks)), mask, mask_tan)
    of_context: tuple[Any, ...] = (None,) * 8
    if context is not None:
        *masks, strides = _masks(context, kernel, index)
        tiles = [rows(x, block, tma) for x, block in zip(before, blocks[1:3])]
        of_context = (p.before, *tiles, *masks, *(x.stride()[:3] for x in before), strides)
    constants |= {"BLOCK_M": tile.m, "BLOCK_N": tile.n, "num_warps": tile.warps, "num_stages": tile.stages}
    if kernel != "bias":
        constants |= {"TMA": tma, "STAGES": tile.stages, "PIN": p.pinned(kernel)}
    return tile, arguments, (*(x.stride()[1:4] for x in stacks), mask_strides), of_context, constants


def _masks(
    p: Problem, kernel: str, index: int
) -> tuple[Tensor | None, Tensor | None, tuple[int | None, ...]]:
    """The mask, its tangent and its strides, as a kernel takes them."""
    mask, mask_tan, strides = p.masks(index, transposed=kernel in ("dk", "dv", "dkv"))
    if kernel == "dq" and p.mask_kind == 1:
        # fewer registers than words that all threads share
        strides = tuple(0 if i == 2 and s is None else s for i, s in enumerate(strides))
    return mask, mask_tan, strides


def launch_rows(p: Problem, index: int, out: Tensor, out_bar: Tensor, delta: Tensor) -> None:
    B, H, N = p.q.shape[1:4]
    V = out.shape[-1]
    block = 32
    launch(
        _attention_rows_kernel,
        schedule.grid(B, H, -(-p.padded // block)),
        p.q.device,
        out[0],
        stack(out, index),
        out_bar[0],
        stack(out_bar, index),
        delta[0],
        delta[1],
        out.stride()[1:4],
        out_bar.stride()[1:4],
        H,
        N,
        p.padded,
        V=V,
        BLOCK_V=block_size(V),
        TANGENT=index >= 0,
        FIRST=index <= 0,
        BLOCK_M=block,
        num_warps=4,
    )


@dataclass(frozen=True)
class Backward:
    """The launches of one tangent's backward."""

    p: Problem
    index: int
    out_bar: Tensor
    stats: Tensor
    mu: Tensor
    delta: Tensor

    def shared(
        self, kernel: str
    ) -> tuple[Tile, tuple[Any, ...], tuple[Any, ...], tuple[Any, ...], dict[str, Any]]:
        p, index = self.p, self.index
        tile, arguments, strides, context, constants = _shared(p, kernel, index, p.q, p.k, p.v, self.out_bar)
        constants["TANGENT"] = index >= 0
        if kernel != "bias":
            constants["LAST"] = index >= p.tangents - 1
            # where products read shared memory; the interpreter, for tests, does as sm_90 does
            arch = architecture(p.q.device)
            constants["LATE"] = arch in ("sm_90", "interpreter") and p.q.element_size() == 2
        return tile, arguments, strides, context, constants

    def statistics(self) -> tuple[Any, ...]:
        mu = self.mu[self.index] if self.p.moves and self.index >= 0 else None
        return self.stats, mu, self.delta[0], self.delta[1]

    def dropped_before(self) -> int | None:
        """Keys of a context before these, where the mask of dropout counts them."""
        return self.p.before if self.p.options.dropout else None

    def launch_kv(
        self,
        kernel: str,
        k_bar: Tensor | None,
        v_bar: Tensor | None,
        k_sum: Tensor | None,
        v_sum: Tensor | None,
    ) -> None:
        p = self.p
        if "k" not in kernel:
            k_bar = k_sum = None
        if "v" not in kernel:
            v_bar = v_sum = None
        heads = p.shared_heads(kernel)
        tile, arguments, strides, _, constants = self.shared(kernel)
        launch(
            _attention_bwd_kv_kernel,
            schedule.grid(p.k.shape[1], heads, p.blocks(p.k.shape[3], tile.n)),
            p.q.device,
            *arguments,
            *(p.options.starts or (None, None)),
            *((k_bar[0], stack(k_bar, self.index)) if k_bar is not None else (None, None)),
            *((v_bar[0], stack(v_bar, self.index)) if v_bar is not None else (None, None)),
            k_sum,
            v_sum,
            *self.statistics(),
            *strides,
            k_bar.stride()[1:4] if k_bar is not None else (0, 0, 0),
            v_bar.stride()[1:4] if v_bar is not None else (0, 0, 0),
            *p.scalars(),
            self.dropped_before(),
            SHARE=p.q.shape[2] // heads,
            NEED_K=k_bar is not None,
            NEED_V=v_bar is not None,
            LAST_FIRST=p.last_first,
            **constants,
        )

    def launch_q(self, q_bar: Tensor, q_sum: Tensor | None) -> None:
        p = self.p
        tile, arguments, strides, context, constants = self.shared("dq")
        launch(
            _attention_bwd_q_kernel,
            p.grid(tile.m),
            p.q.device,
            *arguments,
            *(p.options.starts or (None, None)),
            q_bar[0],
            stack(q_bar, self.index),
            q_sum,
            *self.statistics(),
            *strides,
            q_bar.stride()[1:4],
            *p.scalars(),
            *context,
            **constants,
        )

    def launch_bias(self, bias_bar: Tensor) -> None:
        p = self.p
        _, arguments, strides, _, constants = self.shared("bias")
        per = [n > 1 for n in bias_bar.shape[2:]]
        for name in ("PACKED", "ALIGN_RIGHT"):
            del constants[name]
        launch(
            _attention_bwd_bias_kernel,
            p.bias_grid(bias_bar.shape[2:]),
            p.q.device,
            *arguments,
            bias_bar[:, 0],
            bias_bar[:, 1 + self.index if bias_bar.shape[1] > 1 and self.index >= 0 else 0],
            *self.statistics(),
            *strides,
            (bias_bar.stride(0), *bias_bar.stride()[2:]),
            p.q.shape[1],
            *p.scalars(),
            self.dropped_before(),
            **dict(zip(("PER_B", "PER_H", "PER_N", "PER_M"), per)),
            **constants,
        )
