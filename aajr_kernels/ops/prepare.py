"""The one preparation of an op's call: frozen parameters, shards, autocast, backend and coverage, in this order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import sharding
from ..backends import choice, selfcheck
from ..coverage import record, recording

__all__ = ["SHARDS", "prepare"]

#: in place of a backend: the op ran on the shards of DTensors
SHARDS = "shards"


def prepare(
    op: str,
    stacks: tuple[Tensor | None, ...],
    weights: tuple[Tensor | None, ...] = (),
    *,
    flops: Callable[..., float],
    shards: Callable[..., Any] | None = None,
    cast: Callable[..., tuple[Any, ...]] | None = None,
    uncast: Tensor | None = None,
    name: str = "",
    triton_lacks: Callable[..., str | None] | None = None,
    triton_spills: Callable[..., bool] | None = None,
    in_cuda: bool = True,
    kind: Callable[..., tuple[tuple[int, ...], tuple[Any, ...]]],
) -> tuple[str, Any]:
    """Step between the checks of an op and its autograd Function.

    Args:
        op: package under ``ops``.
        stacks: stacked tensors, and tables beside them.
        weights: parameters; without gradient inside ``sharding.frozen_parameters()``.
        flops: from the operands to the forward's multiplications and additions, for :func:`aajr_kernels.coverage`.
        shards: runs the op on the shards, from the weights to its result; None: the op has no rule for DTensors.
        cast: ``autocast_low``, ``autocast_float32`` or None.
        uncast: an operand that keeps its dtype and does not count for the backend.
        name: under which coverage reports the call, `op` by default.
        triton_lacks: from the operands to what the Triton kernels lack for this call, or None.
        triton_spills: from the operands to whether ``auto`` avoids the Triton kernels, which have hundreds of spills in
            an innermost loop.
        in_cuda: as for ``backends.choice.select_backend``.
        kind: from the operands to the sizes and the options that decide on kernels, which ``trial`` beside the op's
            Function takes; for the first-use check of a device's kernels.

    Returns:
        The backend, and the operands as its kernels take them, stacks before weights; or `SHARDS` and the result.

    Raises:
        BackendUnavailable: the backend chosen by name cannot run here, not on these tensors, or failed its first-use
            check.
        UnsupportedOperation: an operand is complex, or a DTensor for which the op has no rule.
    """
    if weights:
        weights = sharding.detach_frozen(*weights)
    operands = (*stacks, *weights)
    if shards is not None and sharding.is_dtensor(*operands, uncast):
        return SHARDS, shards(*weights)
    if cast is not None:
        operands = cast(*operands)
    backend = choice.select_backend(
        op, *operands, triton_lacks=triton_lacks, triton_spills=triton_spills, in_cuda=in_cuda
    )
    if backend in selfcheck.BACKENDS:
        named = backend == choice.current_backend()
        backend = selfcheck.checked_backend(op, name or op, backend, named, operands, kind)
    if recording():
        # lengths may be symbols while torch.compile traces
        record(name or op, backend, 0.0 if torch.compiler.is_compiling() else flops(*operands))
    return backend, operands
