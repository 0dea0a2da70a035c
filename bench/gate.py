"""The correctness gate: no speed is reported of a variant whose gradients are wrong."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from aajr_kernels import coverage, use_backend
from aajr_kernels.backends import choice

from .case import LIMITS, Case, Gradients, Variant

#: largest error of one tensor relative to its own size, as a multiple of that of all together
ONE_TENSOR = 10.0
#: tensors much smaller than the typical one are the rest of terms that cancel; errors count against this share
FLOOR = 1e-2


@dataclass
class Verdict:
    """The results of the gate.

    Attributes:
        errors: variant -> relative error of its gradients.
        ops: variant -> our ops that ran, by backend.
        failures: one sentence per variant whose gradients are wrong; any makes the case red.
        left_out: optional variant -> why it cannot run.
        broken: variant -> the length at which it ran out of memory.
    """

    errors: dict[str, float] = field(default_factory=dict)
    ops: dict[str, dict[str, str]] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    broken: dict[str, str] = field(default_factory=dict)


_judged: dict[Any, tuple[float, float, dict[str, str]]] = {}


def check(case: Case) -> Verdict:
    """Compare the gradients of every variant with float64, at the case's length or a smaller one."""
    verdict, length = Verdict(), min(case.length, case.gate_length)
    truth = functools.cache(lambda function: function(length))
    limit = LIMITS[case.dtype]
    for variant in case.variants:
        key = (case.suite, case.dtype, length, variant.backend or choice.current_backend(), variant.key)
        try:
            if variant.key is None or key not in _judged:
                _judged[key] = _judge(variant, length, truth)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            if out_of_memory(error):
                verdict.broken[variant.name] = f"out of memory at the gate, length {length}"
            elif variant.optional:
                verdict.left_out[variant.name] = reason
            else:
                verdict.failures.append(f"{variant.name} raised {reason}")
            continue
        total, worst, verdict.ops[variant.name] = _judged[key]
        verdict.errors[variant.name] = total
        if variant.exact and not (total <= limit and worst <= ONE_TENSOR * limit):
            verdict.failures.append(
                f"{variant.name}: the gradients are wrong by {total:.1e} together (limit {limit:.0e}) and {worst:.1e} "
                f"in the worst tensor (limit {ONE_TENSOR * limit:.0e}), against float64 at length {length}"
            )
    return verdict


def out_of_memory(error: BaseException) -> bool:
    """Whether this is how torch, CUDA or Python say so."""
    text = str(error).lower()
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, RuntimeError)
        and any(words in text for words in ("out of memory", "allocate memory"))
    )


def _judge(
    variant: Variant, length: int, truth: Callable[[Callable[[int], Gradients]], Gradients]
) -> tuple[float, float, dict[str, str]]:
    """Both errors of :func:`errors`, and the backends of our ops."""
    with on_backend(variant), coverage() as recorded:
        gradients = variant.make(length).call()
    ops = {op: backend for op, backend in sorted(recorded.entries) if backend in choice.BACKENDS}
    return *errors(gradients, truth(variant.truth)), ops


def on_backend(variant: Variant) -> contextlib.AbstractContextManager[object]:
    """The backend of a variant, or the one in use."""
    return contextlib.nullcontext() if variant.backend is None else use_backend(variant.backend)


def errors(gradients: Gradients, exact: Gradients) -> tuple[float, float]:
    """Relative error of all tensors together, and the largest of a single one; infinite where they do not match."""
    if len(gradients) != len(exact):
        return math.inf, math.inf
    got, want = [], []
    for a, b in zip(gradients, exact):
        like = a if b is None else b
        if like is not None:
            zero = torch.zeros_like(like, dtype=torch.float64)
            got.append((zero if a is None else a.detach().double()).cpu())
            want.append((zero if b is None else b).cpu())
    if any(a.shape != b.shape for a, b in zip(got, want)):
        return math.inf, math.inf
    off = [torch.linalg.vector_norm(a - b).item() for a, b in zip(got, want)]
    size = [torch.linalg.vector_norm(b).item() for b in want]
    numbers = sum(b.numel() for b in want)
    whole = math.hypot(*size)
    if not all(map(math.isfinite, off)) or whole == 0:
        return math.inf, math.inf
    typical = [whole * math.sqrt(b.numel() / numbers) for b in want]
    single = (e / max(s, FLOOR * t) for e, s, t in zip(off, size, typical) if t)
    return math.hypot(*off) / whole, max(single)
