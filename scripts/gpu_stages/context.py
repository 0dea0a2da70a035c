"""Stage `context`: device time of attention after a context, beside that of the same keys put together.

Put together, the keys and values of the context have zeros for tangents, as without the argument. Forward and backward,
in an attack (no tangents; gradients of the open positions only) and with a penalty (all tangents and gradients).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import aajr_kernels as aajr
from aajr_kernels import Dual

from .kernels import kernel_times
from .stage import Stage

BATCH, HEADS, KEY_HEADS, HEAD_SIZE, POSITIONS = 4, 32, 8, 128, 2048
#: shares of the positions that are open to the adversary
OPEN = (1 / 4, 1 / 8)


def run(stage: Stage) -> None:
    positions = 16 if stage.dry else POSITIONS
    for part in OPEN:
        for penalty in (False, True):
            name = f"{'penalty' if penalty else 'attack'}, last {part:.1%} of {positions} open"
            times = {}
            for way, put_together in (("context", False), ("put together", True)):
                if stage.left < 4 and not stage.dry:
                    stage.row(f"{name}: {way}", "left out", reason="no time")
                    continue
                try:
                    call = both_passes(stage, positions, round(part * positions), penalty, put_together)
                    by_kernel = kernel_times(stage, call)
                except Exception as error:  # the other calls are timed all the same
                    stage.row(f"{name}: {way}", "failed", reason=f"{type(error).__name__}: {error}"[:400])
                    continue
                times[way] = sum(us * count for us, count in by_kernel.values())
                kernels = {kernel: round(us, 1) for kernel, (us, _) in list(by_kernel.items())[:8]}
                stage.row(f"{name}: {way}", us=round(times[way], 1), kernels=kernels)
            if len(times) == 2:
                ratio = times["context"] / times["put together"]
                stage.row(f"{name}: over put together", ratio=round(ratio, 3))


def both_passes(
    stage: Stage, positions: int, opened: int, penalty: bool, put_together: bool
) -> Callable[[], object]:
    """Forward and backward of a causal call, whose last `opened` positions are queries."""
    heads, key_heads, size = (4, 2, 16) if stage.dry else (HEADS, KEY_HEADS, HEAD_SIZE)
    dtype = torch.float32 if stage.dry else torch.bfloat16
    generator = torch.Generator(stage.device).manual_seed(0)

    def leaf(heads: int, length: int, stacks: int) -> Tensor:
        shape = (stacks, BATCH, length, heads, size)
        x = torch.randn(shape, generator=generator, device=stage.device, dtype=dtype)
        return x.transpose(2, 3).requires_grad_()

    stacks = 2 if penalty else 1
    q, k, v = (leaf(count, opened, stacks) for count in (heads, key_heads, key_heads))
    context = [leaf(key_heads, positions - opened, 1) for _ in range(2)]
    leaves = [q, k, v, *(context if penalty else ())]

    def operand(x: Tensor) -> Dual | Tensor:
        return Dual(x) if penalty else x[0]

    def joined(before: Tensor, own: Tensor) -> Tensor:
        zeros = before.new_zeros(stacks - 1, *before.shape[1:])
        return torch.cat([torch.cat([before, zeros]), own], 3)

    def call() -> object:
        if put_together:
            keys = [operand(joined(*pair)) for pair in zip(context, (k, v))]
            out = aajr.attention(operand(q), *keys, causal="lower_right")
        else:
            before = context[0][0], context[1][0]
            out = aajr.attention(operand(q), operand(k), operand(v), context=before, causal="lower_right")
        stacked = out.stacked if isinstance(out, Dual) else out
        return torch.autograd.grad(stacked, leaves, torch.ones_like(stacked))

    return call
