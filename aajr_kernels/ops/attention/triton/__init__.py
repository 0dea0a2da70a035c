"""Attention on Triton kernels; functions and contracts are those of the reference."""

from __future__ import annotations

from dataclasses import dataclass
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
    return Problem(q, k, v, mask, options)


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
    if k.shape[3] == 0:
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
    """Gradients of q, k, v and the bias, None where not needed."""
    q, k, v, out_bar = (row_dense(x) for x in (q, k, v, out_bar))
    p = _problem(q, k, v, mask, flat)
    q_bar = like(q) if need_q else None
    k_bar = like(k) if need_k else None
    v_bar = like(v) if need_v else None
    bias_bar = None
    if need_bias and mask is not None:
        parts = p.bias_grid(mask.shape[1:])[1]
        bias_bar = padded_rows((parts, *mask.shape), torch.float32, q.device)
    if 0 in (*q.shape[1:4], k.shape[3]):
        for bar in (q_bar, k_bar, v_bar, bias_bar):
            if bar is not None:
                bar.zero_()
    else:
        _launch_bwd(p, out_bar, out, stats, mu, q_bar, k_bar, v_bar, bias_bar)
    if bias_bar is None or mask is None:
        return q_bar, k_bar, v_bar, None, None, None
    total = bias_bar[0] if len(bias_bar) == 1 else bias_bar.sum(0)
    mask_bar = torch.empty(mask.shape, dtype=mask.dtype, device=q.device).copy_(total)
    return q_bar, k_bar, v_bar, mask_bar, None, None


attention_fwd, attention_bwd = operators.with_options(_attention_fwd, _attention_bwd)


def _launch_bwd(
    p: Problem,
    out_bar: Tensor,
    out: Tensor,
    stats: Tensor,
    mu: Tensor,
    q_bar: Tensor | None,
    k_bar: Tensor | None,
    v_bar: Tensor | None,
    bias_bar: Tensor | None,
) -> None:
    K = p.tangents
    delta = torch.empty((2, *stats.shape[1:]), dtype=torch.float32, device=stats.device)
    key_kernels = p.key_kernels(k_bar is not None, v_bar is not None)
    k_parts, v_parts = (
        None if bar is None else _parts(p, bar, next(x for x in key_kernels if name in x))
        for name, bar in (("k", k_bar), ("v", v_bar))
    )
    # the primal's gradients are summed over several tangents in float32
    sums = [
        torch.empty(x.shape[1:], dtype=torch.float32, device=x.device) if x is not None and K > 1 else None
        for x in (q_bar, k_parts, v_parts)
    ]
    for index in range(min(K - 1, 0), K):
        launch_rows(p, index, out, out_bar, delta)
        context = Backward(p, index, out_bar, stats, mu, delta)
        for kernel in key_kernels:
            context.launch_kv(kernel, k_parts, v_parts, *sums[1:])
        if q_bar is not None:
            context.launch_q(q_bar, sums[0])
        if bias_bar is not None:
            context.launch_bias(bias_bar)
    for bar, parts in ((k_bar, k_parts), (v_bar, v_parts)):
        if bar is not None and parts is not None and parts is not bar:
            _launch_sum(parts, bar)


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
    tile, arguments, strides, constants = _shared(p, "fwd", index, p.q, p.k, p.v)
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
        **constants,
    )


def _shared(
    p: Problem, kernel: str, index: int, *stacks: Tensor
) -> tuple[Tile, tuple[Any, ...], tuple[Any, ...], dict[str, Any]]:
    """The tile, the first arguments (q, k, v, any cotangents, masks), their strides and the constants of a kernel."""
    arch, tile, constants = architecture(p.q.device), p.tile(kernel), p.constants(index)
    tensors = [x[0] for x in stacks] + [stack(x, index) for x in stacks]
    tma = kernel != "bias" and p.options.starts is None and descriptors_fit(arch, *tensors)
    size, width = constants["BLOCK_D"], constants["BLOCK_V"]
    blocks = [(tile.m, size), (tile.n, size), (tile.n, width), (tile.m, width)][: len(stacks)] * 2
    mask, mask_tan, mask_strides = p.masks(index, transposed=kernel in ("dk", "dv", "dkv"))
    if kernel == "dq" and p.mask_kind == 1:
        # fewer registers than words that all threads share
        mask_strides = tuple(0 if i == 2 and s is None else s for i, s in enumerate(mask_strides))
    arguments = (*(rows(x, block, tma) for x, block in zip(tensors, blocks)), mask, mask_tan)
    constants |= {"BLOCK_M": tile.m, "BLOCK_N": tile.n, "num_warps": tile.warps, "num_stages": tile.stages}
    if kernel != "bias":
        constants |= {"TMA": tma, "STAGES": tile.stages, "PIN": p.pinned(kernel)}
    return tile, arguments, (*(x.stride()[1:4] for x in stacks), mask_strides), constants


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

    def shared(self, kernel: str) -> tuple[Tile, tuple[Any, ...], tuple[Any, ...], dict[str, Any]]:
        p, index = self.p, self.index
        tile, arguments, strides, constants = _shared(p, kernel, index, p.q, p.k, p.v, self.out_bar)
        constants["TANGENT"] = index >= 0
        if kernel != "bias":
            constants["LAST"] = index >= p.tangents - 1
            # where products read shared memory; the interpreter, for tests, does as sm_90 does
            arch = architecture(p.q.device)
            constants["LATE"] = arch in ("sm_90", "interpreter") and p.q.element_size() == 2
        return tile, arguments, strides, constants

    def statistics(self) -> tuple[Any, ...]:
        mu = self.mu[self.index] if self.p.moves and self.index >= 0 else None
        return self.stats, mu, self.delta[0], self.delta[1]

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
        tile, arguments, strides, constants = self.shared(kernel)
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
            SHARE=p.q.shape[2] // heads,
            NEED_K=k_bar is not None,
            NEED_V=v_bar is not None,
            **constants,
        )

    def launch_q(self, q_bar: Tensor, q_sum: Tensor | None) -> None:
        p = self.p
        tile, arguments, strides, constants = self.shared("dq")
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
            **constants,
        )

    def launch_bias(self, bias_bar: Tensor) -> None:
        p = self.p
        _, arguments, strides, constants = self.shared("bias")
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
            **dict(zip(("PER_B", "PER_H", "PER_N", "PER_M"), per)),
            **constants,
        )
