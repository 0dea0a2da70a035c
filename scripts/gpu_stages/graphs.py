"""Stage `graphs`: whole steps captured by ``aajr.graphed``, replayed on other inputs and compared with the steps.

A penalty step, an attack with the penalty at its end, and attention of packed sequences. On the CPU, without graphs,
the step is compared with itself.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import aajr_kernels as aajr
from aajr_kernels.testing.budgets import norm
from bench.suites import method, step

from .kernels import shrink
from .stage import Stage

LENGTH, ROUNDS, CLOSE = 128, 6, 1e-3
#: of the inputs, the parameters that get gradients, and the inputs of the second run
Case = tuple[Callable[..., Any], list[Any], tuple[Tensor, ...], tuple[Tensor, ...]]


def run(stage: Stage) -> None:
    if stage.dry:
        shrink()
    for name, make in {"penalty": _penalty, "ascent and penalty": _ascent, "packed": _packed}.items():
        try:
            stage.row(name, **compared(stage, *make(stage)))
        except Exception as error:  # the other steps are captured all the same
            stage.row(name, "failed", reason=f"{type(error).__name__}: {error}"[:600])


def compared(
    stage: Stage,
    call: Callable[..., Any],
    parameters: list[Any],
    first: tuple[Tensor, ...],
    second: tuple[Tensor, ...],
) -> dict[str, Any]:
    """Facts of a row: the largest relative error of a replay, whether all is equal, milliseconds of both."""
    module = torch.nn.ParameterList(parameters)
    replay: Callable[..., Any] = call if stage.dry else aajr.graphed(call, first, module=module)
    errors: list[float] = []
    equal = True
    for inputs in (first, second):
        outcomes = []
        for one in (replay, call):
            for p in parameters:
                p.grad = None
            results = one(*inputs)
            outcomes.append([results.detach().clone(), *(p.grad.clone() for p in parameters)])
        errors += [norm(a - b) / max(norm(b), 1e-6) for a, b in zip(*outcomes)]
        equal &= all(torch.equal(a, b) for a, b in zip(*outcomes))
    times = {name: 1e3 * _seconds(stage, one, second) for name, one in (("eager", call), ("replay", replay))}
    worst = max(errors)
    facts = {"error": worst, "equal": equal, "eager_ms": times["eager"], "wall_ms": times["replay"]}
    return {"state": "passed" if worst <= CLOSE else "failed", **facts}


def _seconds(stage: Stage, call: Callable[..., Any], inputs: tuple[Tensor, ...]) -> float:
    walls = []
    for _ in range(1 if stage.dry else ROUNDS):
        stage.wait()
        start = time.perf_counter()
        call(*inputs)
        stage.wait()
        walls.append(time.perf_counter() - start)
    return min(walls)


def _with_gradients(scalar: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def call(*inputs: Tensor) -> Tensor:
        result = scalar(*inputs)
        result.backward()
        return result

    return call


def _model(stage: Stage) -> tuple[step.Task, Any, Any, Tensor, Tensor, Tensor]:
    model, dtype = ("llama-tiny", "float32") if stage.dry else ("llama-1b", "bfloat16")
    task = step.Task("penalty", model, dtype, "fused", head=True, device=stage.device)
    return task, *step.problem(task, 8 if stage.dry else LENGTH)


def _penalty(stage: Stage) -> Case:
    task, model, head, x, v, labels = _model(stage)
    call = _with_gradients(functools.partial(step.loss, task, model, head))
    return call, _used(model, head), (x, v, labels), (x.flip(1), v.flip(2), labels)


def _ascent(stage: Stage) -> Case:
    task, model, head, x, _, labels = _model(stage)
    call = _with_gradients(functools.partial(method.our_step, task, model, head))
    return call, _used(model, head), (x, labels), (x.flip(1), labels.flip(1))


def _used(model: Any, head: Any) -> list[Any]:
    """Parameters but the embedding, which gets no gradient."""
    return [p for p in step.trained(model, head) if p is not model.embed_tokens.weight]


def _packed(stage: Stage) -> Case:
    """The graph is of all lengths: other offsets are other sequences."""
    length, dtype = (12, torch.float32) if stage.dry else (1000, torch.bfloat16)
    q = torch.nn.Parameter(torch.randn(2, 4, length, 64, device=stage.device, dtype=dtype))
    offsets = [torch.tensor([0, a, length // 2, length], device=stage.device) for a in (1, length // 3)]

    def scalar(offsets: Tensor) -> Tensor:
        out = aajr.attention(*(aajr.Dual(q),) * 3, causal=True, cu_seqlens=offsets)
        stacked: Tensor = out.stacked  # type: ignore[union-attr]
        return stacked.float().square().sum()

    return _with_gradients(scalar), [q], (offsets[0],), (offsets[1],)
