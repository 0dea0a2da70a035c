"""The autograd Function of attention, and the dropout mask that it is given."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from ...autocast import no_autocast
from ...backends import choice
from ...backends.errors import first_order
from ...backends.selfcheck import Draw, Trial
from ...backends.triton.launch import interpreted
from ..autograd import Function
from . import reference  # noqa: F401  loaded here because compiled code cannot import it on first use
from .options import Options

#: the options before `drawn`; those from there on are tensors, which autograd has to see
_Numbers = tuple[float, float | None, int | None, int | None, float, bool]


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    options: Options,
    backend: str,
    sizes: list[tuple[int, int]] | None,
) -> Tensor:
    """Attention of stacks.

    Args:
        q: ``[1|1+K, *batch, H, N, D]``; k and v likewise, and the mask broadcastable to ``[1|1+K, *batch, H, N, M]``.
        mask: None, bool or a bias.
        options: those of the call, but for the dropout mask; a context is ``[1, *batch, HK, C, D|V]``.
        backend: that runs it.
        sizes: queries and keys of every packed sequence; None without.

    Returns:
        ``[1 + K, *batch, H, N, V]``.

    Raises:
        TypeError: k, v or the context has another dtype than q.
    """
    context = options.context
    first, second = context or (None, None)
    for name, x in (("k", k), ("v", v), ("the context's key", first), ("the context's value", second)):
        if x is not None and x.dtype != q.dtype:
            raise TypeError(
                f"attention: {name} must have the dtype of q ({q.dtype}), got {x.dtype}: cast one of them."
            )
    batch = q.shape[1:-3]
    q, k, v = _five_axes(q), _five_axes(k), _five_axes(v)
    if context is not None:
        options = options._replace(context_k=_five_axes(context[0]), context_v=_five_axes(context[1]))
    if mask is not None:
        mask = _mask_five_axes(mask, batch)
    if options.dropout > 0:
        keys = options.context_length + k.shape[-2]
        options = options._replace(drawn=_draw(backend, q, keys, options.dropout, sizes))
    out = AttentionFunction.apply(q, k, v, mask, backend, tuple(options[:6]), *options[6:])
    return out if len(batch) == 1 else out.reshape(out.shape[0], *batch, *out.shape[2:])


class AttentionFunction(Function):
    """q ``[1|1+K, B, H, N, D]``, k, v ``[1|1+K, B, HK, M, D|V]`` and a mask -> ``[1 + K, B, H, N, V]``.

    `Options` come as their numbers and their tensors. A backend returns the output and whatever tensors its own
    backward wants to see again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        backend: str,
        numbers: _Numbers,
        drawn: Tensor | None,
        q_start: Tensor | None,
        k_start: Tensor | None,
        context_k: Tensor | None,
        context_v: Tensor | None,
    ) -> Tensor:
        ctx.backend, ctx.numbers = backend, numbers
        ctx.set_materialize_grads(False)
        if torch.compiler.is_compiling():
            q, k, v = _dense(q), _dense(k), _dense(v)
            context_k, context_v = (x if x is None else _dense(x) for x in (context_k, context_v))
        options = Options(*numbers, drawn, q_start, k_start, context_k, context_v)
        attention_fwd = choice.implementation("attention", backend).attention_fwd
        with no_autocast(q.device.type):
            out, *residuals = attention_fwd(q, k, v, mask, options)
        ctx.save_for_backward(*options[6:], q, k, v, mask, out, *residuals)
        return out

    @staticmethod
    @first_order
    def backward(ctx: Any, out_bar: Tensor | None) -> tuple[Tensor | None, ...]:
        if out_bar is None:
            return (None,) * 11
        numbers: _Numbers = ctx.numbers
        drawn, q_start, k_start, context_k, context_v, *saved = ctx.saved_tensors
        options = Options(*numbers, drawn, q_start, k_start, context_k, context_v)
        of_context = () if options.context is None else ctx.needs_input_grad[9:]
        needs = (*ctx.needs_input_grad[:4], *of_context)
        attention_bwd = choice.implementation("attention", ctx.backend).attention_bwd
        with no_autocast(out_bar.device.type):
            grads = attention_bwd(out_bar, *saved, options, needs)
        return *grads[:4], None, None, None, None, None, *(grads[4:] or (None, None))


def _draw(backend: str, q: Tensor, keys: int, p: float, sizes: list[tuple[int, int]] | None) -> Tensor:
    """The weights that dropout keeps, bool ``[B, H, N, keys]``, or the seed for kernels that draw them."""
    if backend == "triton":
        # on the device: a kernel reads it there, the host does not wait, and a captured graph draws anew
        return torch.randint(1 << 62, (), device=q.device)
    weights = torch.float64 if q.dtype == torch.float64 else torch.float32

    def kept(*shape: int) -> Tensor:
        """As torch's attention written out draws it, in the same order."""
        with torch.no_grad(), no_autocast(q.device.type):
            return torch.dropout(torch.ones(shape, dtype=weights, device=q.device), p, True) != 0

    _, batch, heads, n, _ = q.shape
    if sizes is None:
        return kept(batch, heads, n, keys)
    keep = torch.zeros((1, heads, n, max([0, *(m for _, m in sizes)])), dtype=torch.bool, device=q.device)
    start = 0
    for rows, keys in sizes:
        keep[:, :, start : start + rows, :keys] = kept(1, heads, rows, keys)
        start += rows
    return keep


def _five_axes(x: Tensor) -> Tensor:
    """``[J, *batch, heads, positions, features]`` with one batch axis."""
    axes = x.dim()
    return x if axes == 5 else x.unsqueeze(1) if axes == 4 else x.flatten(1, -4)


def _mask_five_axes(mask: Tensor, batch: tuple[int, ...]) -> Tensor:
    """``[J, ...]``, broadcastable to ``[J, *batch, H, N, M]``, as ``[J, B|1, H|1, N|1, M|1]``."""
    mask = mask.reshape(mask.shape[0], *[1] * (len(batch) + 4 - mask.dim()), *mask.shape[1:])
    if any(n != 1 for n in mask.shape[1:-3]):
        mask = mask.expand(mask.shape[0], *batch, *mask.shape[-3:])
    return mask.reshape(mask.shape[0], math.prod(mask.shape[1:-3]), *mask.shape[-3:])


def _dense(x: Tensor) -> Tensor:
    """For torch.compile: `x` without gaps between its numbers, its axes in the order that they have.

    A part of a wider projection (GPT-2's queries) has gaps. Inductor closes them when it saves it for the backward, and
    AOTAutograd then takes the new strides for numbers, not for multiples of a length: the next length would fail.
    """
    own = x.clone()  # nothing is left of it in the graph if it is not used
    same = all(a == b for size, a, b in zip(x.shape, x.stride(), own.stride()) if size != 1)
    return x if same else own


def kind_of(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, options: Options
) -> tuple[tuple[int, ...], tuple[Any, ...]]:
    """The sizes and features of `trial`, from stacks; the options without the dropout mask."""
    sizes = (*(x.shape[0] for x in (q, k, v)), q.shape[-3] // k.shape[-3], q.shape[-1], v.shape[-1])
    number = options.softcap, options.offset, options.window, options.starts
    present = tuple([x is not None for x in number])
    has_context = options.context is not None
    if mask is None:
        return sizes, (*present, options.dropout > 0, options.align_right, None, (), has_context)
    axes = [n != 1 for n in mask.shape[1:]]
    axes = [False] * (4 - len(axes)) + axes
    spread = (True in axes[:-3], *axes[-3:])
    features = (*present, options.dropout > 0, options.align_right, mask.dtype, spread, has_context)
    return (*sizes, mask.shape[0]), features


def trial(
    draw: Draw,
    name: str,
    dtypes: tuple[torch.dtype | None, ...],
    sizes: tuple[int, ...],
    capped: bool,
    causal: bool,
    windowed: bool,
    packed: bool,
    dropped: bool,
    align_right: bool,
    mask_dtype: torch.dtype | None,
    spread: tuple[bool, ...],
    has_context: bool = False,
    length: int | None = None,
) -> Trial:
    """A small problem for the first-use check.

    Sizes: stacks of q, k, v, query heads of a key head, features of keys and of values, stacks of the mask. `spread`:
    the axes of the mask that are not broadcast. A context has a third of the keys. The dtypes of q, k and v are equal.
    Dropout of packed sequences is left out: their reference takes a mask that no kernel shows.
    """
    *stacks, group, size, width = sizes[:6] or (2, 2, 2, 1, 64, 64)
    batch, heads = 1 if packed else 2, 2 if group < 8 else 1
    dropped = dropped and not packed
    # several tiles on a device; the values that show what dropout keeps are no wider than a tile
    queries, keys = (50, 60) if dropped or interpreted() else (200, 333)
    if length is not None:
        queries = keys = length
    before = keys // 3 if has_context else 0
    after = keys - before
    dtype, shapes = dtypes[0], ((heads * group, queries, size), (heads, after, size), (heads, after, width))
    operands = {n: draw(dtype, count, batch, *s) for n, count, s in zip("qkv", stacks, shapes)}
    device = operands["q"].device
    operands["mask"] = None
    if mask_dtype is not None:
        axes = [n if kept else 1 for n, kept in zip((batch, heads * group, queries, keys), spread)]
        if mask_dtype == torch.bool:
            operands["mask"] = draw(torch.float32, 1, *axes) > -0.5
        else:
            operands["mask"] = draw(mask_dtype, (*sizes[6:], 2)[0], *axes)
    if has_context:
        operands |= {
            f"context_{n}": draw(dtype, 1, batch, heads, before, s) for n, s in zip("kv", (size, width))
        }
    offset = (0 if packed else keys - queries) if causal else None
    options = Options(size**-0.5, 2.0 if capped else None, offset, 20 if windowed else None)
    if packed:
        starts = [
            torch.tensor(x, device=device)
            for x in ([0, queries // 3, queries // 3, queries], [0, keys // 2, 2 * keys // 3, keys])
        ]
        options = options._replace(align_right=align_right, q_start=starts[0], k_start=starts[1])
    seed = torch.tensor(11, device=device)

    @functools.cache
    def kept() -> Tensor:
        """The weights that the kernels keep, bool ``[B, H, N, M]``: with equal scores the values show them."""
        zeros = draw(dtype, 1, batch, heads * group, queries, size).zero_()
        eye = torch.eye(keys, dtype=dtype, device=device).expand(1, batch, heads, keys, keys)
        flat = Options(1.0, dropout=0.4, drawn=seed)
        shown = choice.implementation("attention", "triton").attention_fwd(
            zeros, zeros[:, :, :heads, :1].expand(1, batch, heads, keys, size), eye, None, flat
        )
        weights: Tensor = shown[0][0]
        return weights != 0

    def run(backend: str, *tensors: Tensor | None) -> tuple[Tensor]:
        used = options
        if has_context:
            used = used._replace(context_k=tensors[4], context_v=tensors[5])
        if dropped:
            used = used._replace(dropout=0.4, drawn=seed if backend == "triton" else kept())
        return (AttentionFunction.apply(*tensors[:4], backend, tuple(used[:6]), *used[6:]),)

    return operands, run
