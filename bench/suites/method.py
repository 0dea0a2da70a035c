"""Suite `method`: a training step of the method against the adversarial step that a user pays anyway.

Both attack the embeddings with three normalised steps per token, and train on the cross-entropy at the last point,
through a head of 32,000 words. The method's step adds the ``fisher`` penalty along the last direction, at that same
point. The adversarial step is written in plain PyTorch, on the unmodified model, eager and compiled; the faster one
counts. Part of the penalty's price comes back: the ascent runs on its kernels (`lm_loss`), and the loss comes from its
forward.

Families: ``step`` trains all parameters, ``lora`` adapters of PEFT on queries and values with everything else frozen;
``checkpoint`` and ``lora-checkpoint`` the same with Hugging Face's activation checkpointing of every layer.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aajr_kernels.method import LMHead, ascend, lm_loss, trajectory_penalty
from aajr_kernels.testing import oracle

from ..case import Case, Gradients, Run, Selection, Suite, compiled, step_run
from . import models, step

STEPS, RADIUS, LENGTH = 3, 1.0, 0.5
WEIGHT = 0.1  # of the penalty
BOUND = 1.3
RANK = 8
FAMILIES = ("step", "checkpoint", "lora", "lora-checkpoint")


def cases(selection: Selection) -> list[Case]:
    pairs = selection.grid(("float32",), (512,))
    return [
        _case(f, dtype, length, selection) for f in FAMILIES if selection.wants(f) for dtype, length in pairs
    ]


def _case(family: str, dtype: str, length: int, selection: Selection) -> Case:
    task = functools.partial(
        step.Task,
        model="llama",
        dtype=dtype,
        head=True,
        device=selection.device,
        checkpoint="checkpoint" in family,
        lora=RANK if "lora" in family else 0,
    )
    bounded = selection.bounded and (family, dtype, length) == ("step", "float32", 512)
    bounds = {"ratio": BOUND} if bounded else {}
    variants = [
        step.variant(name, task(kind, form=form), make, true_gradients, **options)
        for name, kind, form, options in (
            ("adversarial", "adversarial", "sdpa", {}),
            ("adversarial, compiled", "adversarial", "compiled", {"optional": True}),
            ("adversarial, our kernels", "adversarial", "fused", {}),
            ("with penalty", "penalty", "fused", {"bounds": bounds}),
        )
    ]
    if family != "step":
        del variants[1]
    return selection.case(
        *("method", family, dtype, length, variants),
        base=tuple(v.name for v in variants if v.name in ("adversarial", "adversarial, compiled")),
        config={
            "model": "llama",
            "sizes": models.described("llama", length),
            "metric": "fisher",
            "V": step.words("llama"),
            "steps": STEPS,
            "radius": RADIUS,
            "step_size": LENGTH,
            "scope": "token",
            "weight": WEIGHT,
            "trained": f"LoRA of rank {RANK} on q, v" if "lora" in family else "everything",
            "checkpointing": "checkpoint" in family,
        },
        gate_length=512,  # code compiled for the gate serves the timing
        repeats=6,
        why="ascent, loss and penalty ÷ ascent and loss",
    )


def make(task: step.Task, length: int) -> Run:
    """A step with its gradients in ``.grad``."""
    model, head, x, _, labels = step.problem(task, length)
    assert head is not None
    parameters = step.trained(model, head)
    loss = plain_loss(model, head, labels)
    if task.form == "compiled":
        loss = compiled(loss)

    def adversarial() -> Tensor:
        with without_gradients(parameters):
            points, _ = plain_ascent(loss, x)
        return loss(points[-1])

    ours = functools.partial(our_step, task, model, head, x, labels)
    return step_run(parameters, ours if task.form == "fused" else adversarial)


def our_step(task: step.Task, model: nn.Module, head: nn.Linear, x: Tensor, labels: Tensor) -> Tensor:
    """The scalar of a step on our kernels."""
    hidden, _ = models.outputs(model, head)
    loss = lm_loss(hidden, head=head, labels=labels)
    options: dict[str, Any] = {"radius": RADIUS, "steps": STEPS, "step_size": LENGTH, "scope": "token"}
    trajectory = ascend(loss, x, **options, module=(model, head), evaluate_last=False)
    if task.kind != "penalty":
        return loss(trajectory.points[-1]).sum()
    options = {"steps": "last", "at": "end", "return_primal": True, "penalty_weight": WEIGHT}
    penalty, aux = trajectory_penalty(
        hidden, x, trajectory, head=LMHead(head.weight), labels=labels, **options
    )
    total: Tensor = aux.primal + WEIGHT * penalty
    return total


# -- plain PyTorch ----------------------------------------------------------------------------------------------------


def plain_loss(model: nn.Module, head: nn.Linear, labels: Tensor) -> Callable[[Tensor], Tensor]:
    """The cross-entropy in plain PyTorch."""
    _, logits = models.outputs(model, head)
    return lambda x: models.crossentropy(logits(x), labels)


@contextlib.contextmanager
def without_gradients(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Compiled code would compute the gradients of all weights in the attack too."""
    for p in parameters:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in parameters:
            p.requires_grad_(True)


def plain_ascent(loss: Callable[[Tensor], Tensor], x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Points and unit directions of projected gradient ascent, written out."""
    delta, points, directions = torch.zeros_like(x), [x], []
    for _ in range(STEPS):
        point = points[-1].detach().requires_grad_()
        (g,) = torch.autograd.grad(loss(point), point)
        directions.append(F.normalize(g, dim=-1, eps=0.0))
        delta = delta + LENGTH * directions[-1]
        delta = delta * (RADIUS / delta.norm(dim=-1, keepdim=True)).clamp(max=1.0)
        points.append(x + delta)
    return points, directions


@functools.lru_cache(maxsize=2)
def true_gradients(task: step.Task, length: int) -> Gradients:
    """All gradients in float64 on the oracle's layers, for weights rounded to the dtype."""
    model, head, x, _, labels = step.exact_problem(task, length)
    assert head is not None
    loss = plain_loss(model, head, labels)
    with oracle.oracle_mode():
        points, directions = plain_ascent(loss, x)
        total = loss(points[-1])
        if task.kind == "penalty":
            pair = oracle.jvp(models.outputs(model, head)[1], points[-1], directions[-1].unsqueeze(0))
            total = total + WEIGHT * step.size(head, *pair)
    total.backward()
    return [p.grad for p in step.trained(model, head)]


SUITE = Suite(
    "method", "adversarial training step with the penalty against without", FAMILIES, cases, parts=False
)
