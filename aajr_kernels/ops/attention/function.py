"""The autograd Function of attention."""

from __future__ import annotations

from typing import Any

import torch

from ... import runtime
from . import reference  # noqa: F401  loaded here because compiled code cannot import it on first use


class AttentionFunction(torch.autograd.Function):
    """q ``[1|1+K, B, H, N, D]``, k, v ``[1|1+K, B, HK, M, D|V]`` and a mask -> ``[1 + K, B, H, N, V]``.

    The options are those of the reference's ``Options``: (scale, softcap, offset, window, dropout, seed). A backend
    returns the output and whatever tensors its own backward wants to see again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: torch.Tensor | None,
        options: tuple[float, float | None, int | None, int | None, float, int],
        backend: str,
    ) -> torch.Tensor:
        ctx.options, ctx.backend = options, backend
        ctx.set_materialize_grads(False)
        module = runtime.implementation("attention", backend)
        with runtime.no_autocast(q.device.type):
            out, *residuals = module.attention_fwd(q, k, v, mask, module.Options(*options))
        ctx.save_for_backward(q, k, v, mask, out, *residuals)
        return out

    @staticmethod
    @runtime.first_order
    def backward(ctx: Any, out_bar: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        if out_bar is None:
            return None, None, None, None, None, None
        module = runtime.implementation("attention", ctx.backend)
        with runtime.no_autocast(out_bar.device.type):
            grads = module.attention_bwd(
                out_bar,
                *ctx.saved_tensors,
                options=module.Options(*ctx.options),
                needs=ctx.needs_input_grad[:4],
            )
        return *grads, None, None
