"""The autograd Function of the streamed head."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...autocast import no_autocast
from ...backends import capture, choice
from ...backends.errors import first_order
from ...backends.selfcheck import Draw, Trial, cotangent
from ...torch_private import assert_async
from ..autograd import Function
from . import reference  # noqa: F401  loaded here because compiled code cannot import it on first use
from .joint import Expected

#: kinds of calls that got other cotangents than expected; of as many as the limit all are tried again
_UNEXPECTED: set[tuple[Any, ...]] = set()
_LIMIT = 4096
_CHANGED = (
    "lm_head_sensitivity: a replayed CUDA graph got other cotangents than its warm-up: capture it again with the "
    "penalty_weight that it runs with, or without one"
)


class HeadFunction(Function):
    """Hidden states ``[1 + K, T, C]`` to q ``[K, T]`` and, with labels, nll ``[T]``."""

    @staticmethod
    def forward(
        ctx: Any,
        h: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor | None,
        count: Tensor | None,
        metric: str,
        scale: float,
        softcap: float | None,
        ignore_index: int,
        backend: str,
        expected: Expected | None,
    ) -> tuple[Tensor, Tensor | None]:
        ctx.set_materialize_grads(False)
        ctx.options, ctx.backend, ctx.ready = (metric, scale, softcap, ignore_index), backend, None
        arguments = (h, weight, bias, labels, count, metric, scale, softcap, ignore_index)
        kernels = choice.implementation("head", backend)
        joint = None
        with no_autocast(h.device.type):
            ctx.kind = (h.device, h.dtype, h.shape, weight.shape, metric, labels is None)
            usable = hasattr(kernels, "head_joint") and not _is_unexpected(ctx.kind)
            if expected is not None and usable and any(ctx.needs_input_grad[:3]):
                joint = kernels.head_joint(*arguments, expected, *ctx.needs_input_grad[:3])
            if joint is None:
                q, nll, stats = kernels.head_fwd(*arguments)
            else:
                (q, nll, stats), ctx.ready = joint
        ctx.save_for_backward(h, weight, bias, labels, count, stats)
        return q, nll

    @staticmethod
    @first_order
    def backward(ctx: Any, q_bar: Tensor | None, nll_bar: Tensor | None) -> tuple[Tensor | None, ...]:
        if q_bar is None and nll_bar is None:
            return (None,) * 11
        ready, ctx.ready = ctx.ready, None  # handed out once, since it is scaled in place
        if ready is not None:
            factor = common_factor((q_bar, nll_bar), ready[:2])
            if factor is not None:
                unscaled = isinstance(factor, float) and factor == 1.0
                gradients = (g if g is None or unscaled else g.mul_(factor) for g in ready[2:])
                return (*gradients, *(None,) * 8)
        h, weight, bias, labels, count, stats = ctx.saved_tensors
        if ready is not None:
            if len(_UNEXPECTED) >= _LIMIT:
                _UNEXPECTED.clear()
            _UNEXPECTED.add(ctx.kind)
        with no_autocast(h.device.type):
            h_bar, weight_bar, bias_bar = choice.implementation("head", ctx.backend).head_bwd(
                h, weight, bias, labels, count, *ctx.options, q_bar, nll_bar, stats, *ctx.needs_input_grad[:3]
            )
        if bias_bar is not None:
            bias_bar = bias_bar.to(bias.dtype)
        return (h_bar, weight_bar, bias_bar, *(None,) * 8)


def _is_unexpected(kind: tuple[Any, ...]) -> bool:
    """Whether a call takes two passes: on a device from the first time on, so that a CUDA graph finds them loaded.

    Not while torch.compile traces: a look-up would make every length a graph of its own.
    """
    if torch.compiler.is_compiling():
        return False
    device: torch.device = kind[0]
    return kind in _UNEXPECTED and (device.type == "cuda" or capture.reads_no_value(device))


def common_factor(
    got: tuple[Tensor | None, ...], expected: tuple[Tensor | None, ...]
) -> float | Tensor | None:
    """The number c with got = c expected up to the rounding of a few operations, or None; None stands for zeros.

    While a CUDA graph is captured it stays on the device, ``[1]``, and every replay asserts that there is one.
    """
    present = [(g, e) for g, e in zip(got, expected) if g is not None or e is not None]
    actual = torch.cat([_or_zeros(g, e) for g, e in present]).double()
    target = torch.cat([_or_zeros(e, g) for g, e in present]).double()
    largest = target.abs().argmax().unsqueeze(0)
    divisor = target.gather(0, largest)
    factor = torch.where(divisor == 0, 1.0, actual.gather(0, largest) / divisor)
    scaled = factor * target
    same = ((actual - scaled).abs() <= 2.0**-21 * scaled.abs()).all() & factor.isfinite()  # false for NaN
    if capture.reads_no_value(same.device):
        assert_async(same, _CHANGED)
        return factor.float()  # with an axis: in a scalar torch would round it to the dtype of the gradients
    if same.is_meta:  # nothing is computed
        return 1.0
    number, proportional = torch.cat([factor, same.double()]).tolist()  # the one wait for the device
    return number if proportional else None


def _or_zeros(t: Tensor | None, like: Tensor | None) -> Tensor:
    return (torch.zeros_like(like) if t is None and like is not None else t).flatten()  # type: ignore[union-attr]


def trial(
    draw: Draw,
    name: str,
    dtypes: tuple[torch.dtype | None, ...],
    sizes: tuple[int, ...],
    metric: str,
    biased: bool,
    labelled: bool,
    scaled: bool,
    capped: bool,
    joint: bool,
    counts: bool,
    length: int = 37,
) -> Trial:
    """A small problem for the first-use check; sizes: stacks, hidden features. The dtypes are equal."""
    stacks, size = sizes or (2, 128)
    # with tokens that do not count: a whole block of them at least
    dtype, tokens, vocab_size = dtypes[0], length + 128 * counts, max(301, 8 * length + 5)
    operands = {
        "hidden": draw(dtype, stacks, tokens, size),
        "weight": draw(dtype, vocab_size, size) * size**-0.5,
    }
    operands["bias"] = draw(dtype if biased else None, vocab_size)
    labels = torch.arange(tokens, device=operands["hidden"].device) if labelled else None
    options = metric, 0.5 if scaled else 1.0, 3.0 if capped else None, 3  # the label 3 is ignored
    count = None
    if counts:
        count = torch.tensor(length, dtype=torch.int32, device=operands["hidden"].device)

    def expected(q: Tensor, at: slice | Tensor) -> tuple[Tensor, Tensor | None]:
        shapes = (stacks - 1, tokens), (tokens,)
        q_bar, nll_bar = (cotangent(torch.Size(s), q.device).to(q.dtype)[..., at] for s in shapes)
        return q_bar, nll_bar if labelled else None

    def run(backend: str, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        results: tuple[Tensor | None, ...] = HeadFunction.apply(
            *tensors, labels, count, *options, backend, expected if joint else None
        )
        return results

    return operands, run
