"""Suite `method`: a training step of the method against the adversarial step that a user pays anyway.

Both attack the embeddings with three normalised steps per token, and train on the cross-entropy at the last point,
through a head of 32,000 words. The method's step adds the ``fisher`` penalty along the last direction, at that same
point. The adversarial step is written in plain PyTorch, on the unmodified model, eager and compiled; the faster one
counts. Part of the penalty's price comes back: the ascent runs on its kernels (`lm_loss`), and the loss comes from its
forward.

Families: ``step`` trains all parameters, ``lora`` adapters of PEFT on queries and values with everything else frozen;
``checkpoint`` and ``lora-checkpoint`` the same with Hugging Face's activation checkpointing of every layer. In
``context`` the last quarter of 2,048 tokens may be attacked and is learnt, in ``context-eighth`` the last eighth, in
``context-open`` all; what comes before runs once per step (`shared_context`) or at every point. In ``lazy`` four steps
train on the loss of the clean input, and on every k-th of them on the penalty with k times its weight; between there is
no attack. In ``hidden`` the attack adds to what the first of four layers returns, in plain PyTorch by a hook; ours runs
that layer once per step (`policy_of(model, at=)`). All variants of a family have the same input and weights, and so the
same sum of gradients.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aajr_kernels.integrations.transformers import shared_context
from aajr_kernels.integrations.transformers.places import Places
from aajr_kernels.method import LMHead, ascend, lm_loss, trajectory_penalty
from aajr_kernels.method.trajectory import Trajectory
from aajr_kernels.testing import oracle

from ..case import DTYPES, Case, Gradients, Run, Selection, Suite, compiled, step_run
from ..roofline import MethodStep, Work
from . import models, step

STEPS, RADIUS, LENGTH = 3, 1.0, 0.5
WEIGHT = 0.1  # of the penalty
BOUND = 1.3
RANK = 8
FAMILIES = ("step", "checkpoint", "lora", "lora-checkpoint")
OURS, USUAL, HOOK = "adversarial, our kernels", "adversarial", "adversarial, hook"
#: family -> one in so many tokens is open; the step with a shared context over: without, and both adversarial steps
CONTEXTS: dict[str, tuple[int, tuple[float, ...]]] = {
    "context": (4, (0.57, 0.79, 0.50)),
    "context-eighth": (8, (0.43, 0.60, 0.34)),
    "context-open": (1, (1.05,)),
}
#: the layer to whose output the attack of family hidden adds, and the largest ratio to a hook's
LAYER, BOUND_HIDDEN = 0, 1.1
#: variant of family lazy -> the penalty is computed on every so manieth of four steps
LAZY, CYCLE = {"every step": 1, "every 2nd step": 2, "every 4th step": 4}, 4


def cases(selection: Selection) -> list[Case]:
    pairs = selection.grid(("float32",), (512,))
    long = selection.grid(("float32",), (2048,))
    return [
        *(_case(f, *pair, selection) for f in FAMILIES if selection.wants(f) for pair in pairs),
        *(_context(f, *pair, selection) for f in CONTEXTS if selection.wants(f) for pair in long),
        *(_lazy(*pair, selection) for pair in pairs if selection.wants("lazy")),
        *(_hidden(*pair, selection) for pair in pairs if selection.wants("hidden")),
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
            (USUAL, "adversarial", "sdpa", {}),
            ("adversarial, compiled", "adversarial", "compiled", {"optional": True}),
            (OURS, "adversarial", "fused", {}),
            ("with penalty", "penalty", "fused", {"bounds": bounds}),
        )
    ]
    if family != "step":
        del variants[1]
    return selection.case(
        *("method", family, dtype, length, variants),
        base=tuple(v.name for v in variants if v.name in (USUAL, "adversarial, compiled")),
        config=_config(
            length,
            trained=f"LoRA of rank {RANK} on q, v" if "lora" in family else "everything",
            checkpointing="checkpoint" in family,
        ),
        gate_length=512,  # code compiled for the gate serves the timing
        repeats=6,
        why="ascent, loss and penalty ÷ ascent and loss",
    )


def _context(family: str, dtype: str, length: int, selection: Selection) -> Case:
    """A context that a step computes once, against one that every point computes."""
    part, limits = CONTEXTS[family]
    task = functools.partial(step.Task, model="llama", dtype=dtype, head=True, device=selection.device)
    bounds = {}
    if selection.bounded and (dtype, length) == ("float32", 2048):
        bounds = dict(zip(("ratio", f"over {OURS}", f"over {USUAL}"), limits))
        bounds |= {"peak_ratio": 1.0} if part > 1 else {}
    variants = [
        step.variant(
            name,
            task(kind, form=form),
            functools.partial(make, open_part=part),
            functools.partial(true_gradients, open_part=part),
            bounds=bounds if kind == "shared" else {},
            key=(kind, form, part),
            work=_work(kind, form, length, part) if dtype == "bfloat16" else (),
        )
        for name, kind, form in (
            ("with penalty", "penalty", "fused"),
            ("with penalty, shared context", "shared", "fused"),
            (OURS, "adversarial", "fused"),
            (USUAL, "adversarial", "sdpa"),
        )
    ]
    if part == 1:
        del variants[2:]
    return selection.case(
        *("method", family, dtype, length, variants),
        base=("with penalty",),
        config=_config(length, trained="everything", open=f"1/{part}"),
        gate_length=64,
        repeats=5,
        peak="peak_ratio" in bounds,
        why="the context once per step ÷ at every point" if part > 1 else "no context, asked for ÷ not",
    )


def _hidden(dtype: str, length: int, selection: Selection) -> Case:
    """An attack inside the model, ours against a hook."""
    task = functools.partial(step.Task, model="llama", dtype=dtype, head=True, device=selection.device)
    bounded = selection.bounded and (dtype, length) == ("float32", 512)
    variants = [
        step.variant(
            name,
            task(kind, form=form),
            functools.partial(_hidden_step, is_ours=is_ours),
            functools.partial(true_gradients, layer=LAYER),
            bounds={"ratio": BOUND_HIDDEN} if bounded and is_ours and kind == "adversarial" else {},
            key=("hidden", kind, form, is_ours),
        )
        for name, kind, form, is_ours in (
            (HOOK, "adversarial", "sdpa", False),
            ("adversarial, places", "adversarial", "sdpa", True),
            ("adversarial, places, fused", "adversarial", "fused", True),
            ("with penalty, places, fused", "penalty", "fused", True),
        )
    ]
    return selection.case(
        *("method", "hidden", dtype, length, variants),
        base=(HOOK,),
        config=_config(length, trained="everything", layer=LAYER),
        gate_length=64,
        repeats=6,
        why="an attack inside the model by places ÷ by a hook in plain PyTorch",
    )


def _work(kind: str, form: str, length: int, part: int) -> tuple[Work, ...]:
    """Kernels of a variant of :func:`_context`, at the rates that the roofline model has, for bfloat16."""
    sizes = models.sizes("llama", length)
    counted = MethodStep(
        sizes, step.words("llama"), length, length // part, STEPS, DTYPES["bfloat16"].itemsize
    )
    if kind == "adversarial":
        return tuple(counted.adversarial() if form == "fused" else counted.usual())
    return tuple(counted.penalty(shared=kind == "shared"))


def _lazy(dtype: str, length: int, selection: Selection) -> Case:
    """The penalty on every k-th step, against every step."""
    task = step.Task("penalty", "llama", dtype, "fused", head=True, device=selection.device)
    variants = [
        step.variant(name, task, functools.partial(_steps, every=k), _true_steps, key=("lazy", k))
        for name, k in LAZY.items()
    ]
    return selection.case(
        *("method", "lazy", dtype, length, variants),
        base=("every step",),
        config=_config(length, trained="everything", loss="clean", cycle=CYCLE),
        gate_length=64,
        repeats=5,
        why="the penalty on every k-th step with k times its weight ÷ on every step",
    )


def _steps(task: step.Task, length: int, every: int) -> Run:
    """Four steps without their updates: the gradients add up."""
    model, head, x, _, labels = step.problem(task, length)
    assert head is not None
    parameters, hidden = step.trained(model, head), models.outputs(model, head)[0]
    loss, description = lm_loss(hidden, head=head, labels=labels), LMHead(head.weight)

    def call() -> Gradients:
        for number in range(1, CYCLE + 1):
            total = loss(x).sum()
            if number % every == 0:
                trajectory = _ascent(model, head, loss, x, None)
                penalty, _ = trajectory_penalty(
                    hidden, x, trajectory, steps="last", at="end", head=description
                )
                total = total + every * WEIGHT * penalty
            total.backward()
        return [p.grad for p in parameters]

    return dataclasses.replace(step_run(parameters, x.sum), call=call)


@functools.lru_cache(maxsize=1)
def _true_steps(task: step.Task, length: int) -> Gradients:
    """All gradients of the four steps in float64 on the oracle's layers: those of one, four times."""
    model, head, x, _, labels = step.exact_problem(task, length)
    assert head is not None
    loss = plain_loss(model, head, labels)
    with oracle.oracle_mode():
        points, directions = plain_ascent(loss, x)
        pair = oracle.jvp(models.outputs(model, head)[1], points[-1], directions[-1].unsqueeze(0))
        (CYCLE * (loss(x) + WEIGHT * step.size(head, *pair))).backward()
    return [p.grad for p in step.trained(model, head)]


def _config(length: int, **more: Any) -> dict[str, Any]:
    return {
        "model": "llama",
        "sizes": models.described("llama", length),
        "metric": "fisher",
        "V": step.words("llama"),
        "steps": STEPS,
        "radius": RADIUS,
        "step_size": LENGTH,
        "scope": "token",
        "weight": WEIGHT,
        **more,
    }


def make(task: step.Task, length: int, open_part: int | None = None) -> Run:
    """A step with its gradients in ``.grad``; the last of `open_part` parts of the tokens are attacked and learnt.

    None: all tokens, without a mask.
    """
    model, head, x, _, labels = step.problem(task, length)
    assert head is not None
    parameters = step.trained(model, head)
    mask, labels = opened(labels, open_part)
    loss = plain_loss(model, head, labels)
    if task.form == "compiled":
        loss = compiled(loss)

    def adversarial() -> Tensor:
        with without_gradients(parameters):
            points, _ = plain_ascent(loss, x, mask)
        return loss(points[-1])

    ours = functools.partial(our_step, task, model, head, x, labels, mask)
    return step_run(parameters, ours if task.form == "fused" else adversarial)


def _hidden_step(task: step.Task, length: int, is_ours: bool) -> Run:
    """A step whose attack adds to what a layer returns, in the units of its output."""
    model, head, x, _, labels = step.problem(task, length)
    assert head is not None
    parameters = step.trained(model, head)
    if not is_ours:
        loss, zeros = hooked(model, LAYER, plain_loss(model, head, labels), x), torch.zeros_like(x)

        def by_hook() -> Tensor:
            with without_gradients(parameters):
                points, _ = plain_ascent(loss, zeros)
            return loss(points[-1])

        return step_run(parameters, by_hook)
    places = Places(model, LAYER)
    hidden = models.outputs(model, head)[0]

    def ours() -> Tensor:
        opened = places(x, hidden, relative=False)
        return trained_at(task, (model, head), opened, opened.x, labels, None)

    return step_run(parameters, ours)


def hooked(model: nn.Module, layer: int, loss: Callable[[Tensor], Tensor], x: Tensor) -> Callable[..., Any]:
    """`loss` of `x` as a function of what is added to the output of a layer of a Llama."""
    module: Any = model.layers[layer]  # type: ignore[index]

    def at(delta: Tensor) -> Tensor:
        def add(module: nn.Module, arguments: Any, output: Any) -> Any:
            is_tuple = isinstance(output, tuple)
            return (output[0] + delta, *output[1:]) if is_tuple else output + delta

        handle = module.register_forward_hook(add)
        try:
            return loss(x)
        finally:
            handle.remove()

    return at


def opened(labels: Tensor, part: int | None) -> tuple[Tensor | None, Tensor]:
    """Mask of the last 1/part of the tokens, None for all, and the labels without the others."""
    if part is None:
        return None, labels
    length = labels.shape[-1]
    mask = torch.arange(length, device=labels.device).expand_as(labels) >= length - length // part
    return mask, labels.where(mask, -100)


def our_step(
    task: step.Task, model: nn.Module, head: nn.Linear, x: Tensor, labels: Tensor, mask: Tensor | None
) -> Tensor:
    """The scalar of a step on our kernels."""
    hidden, _ = models.outputs(model, head)
    if task.kind == "shared":
        assert mask is not None
        hidden = context = shared_context(model, x, mask=mask)
        x, labels, mask = context.x, context.suffix(labels), context.suffix(mask)
    return trained_at(task, (model, head), hidden, x, labels, mask)


def trained_at(
    task: step.Task,
    modules: tuple[nn.Module, nn.Linear],
    hidden: Callable[[Any], Any],
    x: Tensor,
    labels: Tensor,
    mask: Tensor | None,
) -> Tensor:
    """Attack, and loss or loss and penalty at its last point, of a function of `x`."""
    model, head = modules
    loss = lm_loss(hidden, head=head, labels=labels)
    trajectory = _ascent(model, head, loss, x, mask)
    if task.kind == "adversarial":
        return loss(trajectory.points[-1]).sum()
    options: dict[str, Any] = {"penalty_weight": WEIGHT, "return_primal": True, "mask": mask}
    options |= {"head": LMHead(head.weight), "labels": labels}
    penalty, aux = trajectory_penalty(hidden, x, trajectory, steps="last", at="end", **options)
    total: Tensor = aux.primal + WEIGHT * penalty
    return total


def _ascent(model: nn.Module, head: nn.Linear, loss: Any, x: Tensor, mask: Tensor | None) -> Trajectory:
    options: dict[str, Any] = {"radius": RADIUS, "steps": STEPS, "step_size": LENGTH, "scope": "token"}
    return ascend(loss, x, **options, mask=mask, module=(model, head), evaluate_last=False)


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


def plain_ascent(
    loss: Callable[[Tensor], Tensor], x: Tensor, mask: Tensor | None = None
) -> tuple[list[Tensor], list[Tensor]]:
    """Points and unit directions of projected gradient ascent on the tokens of `mask`, written out."""
    delta, points, directions = torch.zeros_like(x), [x], []
    for _ in range(STEPS):
        point = points[-1].detach().requires_grad_()
        (g,) = torch.autograd.grad(loss(point), point)
        if mask is not None:
            g = g * mask.unsqueeze(-1)
        directions.append(F.normalize(g, dim=-1, eps=torch.finfo(g.dtype).tiny))
        delta = delta + LENGTH * directions[-1]
        delta = delta * (RADIUS / delta.norm(dim=-1, keepdim=True)).clamp(max=1.0)
        points.append(x + delta)
    return points, directions


@functools.lru_cache(maxsize=2)
def true_gradients(
    task: step.Task, length: int, open_part: int | None = None, layer: int | None = None
) -> Gradients:
    """All gradients in float64 on the oracle's layers, for weights rounded to the dtype."""
    model, head, x, _, labels = step.exact_problem(task, length)
    assert head is not None
    mask, labels = opened(labels, open_part)
    loss, logits = plain_loss(model, head, labels), models.outputs(model, head)[1]
    start = x
    if layer is not None:
        loss, logits = (hooked(model, layer, func, x) for func in (loss, logits))
        start = torch.zeros_like(x)
    with oracle.oracle_mode():
        points, directions = plain_ascent(loss, start, mask)
        total = loss(points[-1])
        if task.kind == "penalty":
            pair = oracle.jvp(logits, points[-1], directions[-1].unsqueeze(0))
            total = total + WEIGHT * step.size(
                head, *(y[..., -(length // (open_part or 1)) :, :] for y in pair)
            )
    total.backward()
    return [p.grad for p in step.trained(model, head)]


SUITE = Suite(
    "method",
    "adversarial training step with the penalty against without",
    (*FAMILIES, *CONTEXTS, "lazy", "hidden"),
    cases,
    parts=False,
)
