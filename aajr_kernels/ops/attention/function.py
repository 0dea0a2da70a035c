"""The autograd Function of attention."""

from __future__ import annotations

from typing import Any

import torch

from ...autocast import no_autocast
from ...backends import choice
from ...backends.errors import first_order
from . import reference  # noqa: F401  loaded here because compiled code cannot import it on first use


class AttentionFunction(torch.autograd.Function):
    """q ``[1|1+K, B, H, N, D]``, k, v ``[1|1+K, B, HK, M, D|V]`` and a mask -> ``[1 + K, B, H, N, V]``.

    The options are those of the reference's ``Options`` but the last: (scale, softcap, offset, window, dropout,
    align_right). `drawn` is the dropout mask, bool, or the int64 seed of kernels that draw it; None without. Packed
    sequences come with the int64 offsets of their queries and keys, without gradient. A backend returns the output and
    whatever tensors its own backward wants to see again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: torch.Tensor | None,
        options: tuple[Any, ...],
        backend: str,
        drawn: torch.Tensor | None = None,
        q_start: torch.Tensor | None = None,
        k_start: torch.Tensor | None = None,
    ) -> torch.Tensor:
        ctx.options, ctx.backend = options, backend
        ctx.set_materialize_grads(False)
        module = choice.implementation("attention", backend)
        q, k, v = _dense(q), _dense(k), _dense(v)
        with no_autocast(q.device.type):
            starts = None if q_start is None else (q_start, k_start)
            out, *residuals = module.attention_fwd(q, k, v, mask, _options(module, options, drawn), starts)
        ctx.save_for_backward(drawn, q_start, k_start, q, k, v, mask, out, *residuals)
        return out

    @staticmethod
    @first_order
    def backward(ctx: Any, out_bar: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        if out_bar is None:
            return (None,) * 9
        module = choice.implementation("attention", ctx.backend)
        with no_autocast(out_bar.device.type):
            drawn, q_start, k_start, *saved = ctx.saved_tensors
            grads = module.attention_bwd(
                out_bar,
                *saved,
                options=_options(module, ctx.options, drawn),
                needs=ctx.needs_input_grad[:4],
                starts=None if q_start is None else (q_start, k_start),
            )
        return *grads, None, None, None, None, None


def _dense(x: torch.Tensor) -> torch.Tensor:
    """While torch.compile traces: `x` without gaps between its numbers, its axes in the order that they have.

    A part of a wider projection (GPT-2's queries) has gaps. Inductor closes them when it saves it for the backward, and
    AOTAutograd then takes the new strides for numbers, not for multiples of a length: the next length would fail.
    """
    if not torch.compiler.is_compiling():
        return x
    own = x.clone()  # nothing is left of it in the graph if it is not used
    same = all(a == b for size, a, b in zip(x.shape, x.stride(), own.stride()) if size != 1)
    return x if same else own


def _options(module: Any, options: tuple[Any, ...], drawn: torch.Tensor | None) -> Any:
    if drawn is None:
        return module.Options(*options)
    return module.Options(*options, **{"keep" if drawn.dtype == torch.bool else "seed": drawn})
