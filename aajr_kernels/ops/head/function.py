"""The autograd Function of the streamed head."""

from __future__ import annotations

from typing import Any

import torch

from ... import runtime
from . import reference  # noqa: F401  loaded here because compiled code cannot import it on first use


class HeadFunction(torch.autograd.Function):
    """Hidden states ``[1 + K, T, C]`` to q ``[K, T]`` and, with labels, nll ``[T]``."""

    @staticmethod
    def forward(
        ctx: Any,
        h: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        labels: torch.Tensor | None,
        metric: str,
        scale: float,
        softcap: float | None,
        ignore_index: int,
        backend: str,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        ctx.set_materialize_grads(False)
        ctx.options, ctx.backend = (metric, scale, softcap, ignore_index), backend
        with runtime.no_autocast(h.device.type):
            q, nll, stats = runtime.implementation("head", backend).head_fwd(
                h, weight, bias, labels, metric, scale, softcap, ignore_index
            )
        ctx.save_for_backward(h, weight, bias, labels, stats)
        return q, nll

    @staticmethod
    @runtime.first_order
    def backward(
        ctx: Any, q_bar: torch.Tensor | None, nll_bar: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        if q_bar is None and nll_bar is None:
            return (None,) * 9
        h, weight, bias, labels, stats = ctx.saved_tensors
        with runtime.no_autocast(h.device.type):
            h_bar, weight_bar, bias_bar = runtime.implementation("head", ctx.backend).head_bwd(
                q_bar, nll_bar, h, weight, bias, labels, stats, *ctx.options, *ctx.needs_input_grad[:3]
            )
        if bias_bar is not None:
            bias_bar = bias_bar.to(bias.dtype)
        return h_bar, weight_bar, bias_bar, None, None, None, None, None, None
