"""Suite `step`: one exact penalty step of a whole model against Hugging Face's plain step and the peers.

A step is forward and backward to every parameter. The plain step's loss is ``hidden.square().mean()``, or the
cross-entropy where there is a head; the penalty is ``l2`` on the hidden states, or ``fisher`` through the head.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from aajr_kernels.integrations.transformers import fuse
from aajr_kernels.method import LMHead, aligned_penalty, normalize
from aajr_kernels.testing import formulas, oracle

from .. import peers
from ..case import Case, Gradients, Run, Selection, Suite, Variant, compiled, draw, portion, step_run
from . import models

VOCABULARY = 32000
DIFFERENCE = 1e-2  # step of the finite differences, along directions of unit length per token
#: (dtype, length) -> largest ratio of the exact fused step to the plain one; the second for libraries held to AVX2
BOUNDS = {("float32", 512): (1.7, 1.9), ("float32", 2048): (1.9, 1.95), ("bfloat16", 2048): (1.8, 1.8)}
GPT2_MORE = 0.1
SHARED, PEAK = 1.1, 2.2
DIRECTIONS = {("float32", 512): 2.6, ("float32", 2048): 2.9}
FINITE, DOUBLE = "finite differences", "double backward"
OTHERS = ("bert", *(f"{model}-{size}" for size in ("tiny", "base") for model in models.ARCHITECTURES))


@dataclass(frozen=True)
class Task:
    """The computation of one variant.

    Attributes:
        kind: ``plain``, ``penalty``, ``both`` (loss and penalty), ``differences``, ``forward mode``, ``double
            backward`` or an installed peer.
        model: a name of :func:`.models.sizes`.
        form: ``sdpa`` or ``eager`` (unmodified), ``compiled`` or ``fused``.
        head: with a head of 32,000 words (or the model's own number), the ``fisher`` metric and the cross-entropy.
        directions: K.
        device: where it runs.
        part: of :data:`.case.PARTS`.
        recompute, checkpoint, offload: as in suite `memory`.
        lora: rank of adapters, which are then all that is trained.
    """

    kind: str
    model: str
    dtype: str
    form: str = "sdpa"
    head: bool = False
    directions: int = 1
    device: str = "cpu"
    part: str = "both"
    recompute: bool = False
    checkpoint: bool = False
    offload: bool = False
    lora: int = 0


def tasks(selection: Selection, **options: Any) -> Callable[..., Task]:
    """Makes tasks of the part and on the device that are selected."""
    return functools.partial(Task, device=selection.device, part=selection.part, **options)


def cases(selection: Selection) -> list[Case]:
    usual = (("float32", 512), ("float32", 2048), ("bfloat16", 2048))
    short = usual[:1]
    makers: dict[str, tuple[Callable[..., Case], tuple[tuple[str, int], ...]]] = {
        "llama": (functools.partial(_ratio, "llama"), usual),
        "gpt2": (functools.partial(_ratio, "gpt2"), usual),
        **{model: (functools.partial(_ratio, model), short) for model in OTHERS},
        "smollm2": (functools.partial(_head, "smollm2"), (("float32", 256),)),
        "head": (functools.partial(_head, "llama"), short),
        "penalty": (_penalty, usual[:2]),
        "memory": (_memory, (("float32", 8192),)),
    }
    cases = []
    for family, (maker, defaults) in makers.items():
        if not selection.wants(family):
            continue
        pairs: Any = defaults
        if selection.dtypes or selection.lengths:
            pairs = selection.grid(*(tuple(dict.fromkeys(part)) for part in zip(*defaults)))
            if not selection.dtypes:
                dtypes = {dtype for dtype, _ in defaults}
                pairs = [pair for pair in pairs if pair[0] == "float32" or len(dtypes) == 1]
            elif not selection.lengths:
                pairs = [pair for pair in pairs if pair in defaults] or pairs
        cases += [maker(dtype, n, selection) for dtype, n in pairs]
    return cases


def held_to_avx2() -> bool:
    """Whether torch has no AVX-512 here, by nature or by ATEN_CPU_CAPABILITY."""
    return torch.backends.cpu.get_cpu_capability() in ("AVX2", "DEFAULT")


def variant(
    name: str,
    task: Task,
    run: Callable[[Task, int], Run] | None = None,
    truth: Callable[[Task, int], Gradients] | None = None,
    **options: Any,
) -> Variant:
    """A variant of the step, or of a step whose `run` and `truth` are given."""
    kind = task.kind if task.kind in ("plain", "both", "adversarial") else "penalty"
    exact = dataclasses.replace(task, kind=kind, form="sdpa")
    exact = dataclasses.replace(exact, recompute=False, checkpoint=False, offload=False)
    options.setdefault("compiled", task.form == "compiled")
    options.setdefault("key", task)
    made = functools.partial(run or make, task), functools.partial(truth or true_gradients, exact)
    return Variant(name, *made, **options)


def step_case(
    family: str,
    model: str,
    dtype: str,
    length: int,
    selection: Selection,
    variants: list[Variant],
    base: tuple[str, ...],
    why: str,
    config: dict[str, Any] | None = None,
    **options: Any,
) -> Case:
    """A case of this suite; `options` are further fields of it."""
    options.setdefault("large", model == "smollm2" or model.endswith("-base"))
    options.setdefault("repeats", 16 if length <= 512 else 10 if length <= 1024 else 8)
    config = {"model": model, "sizes": models.described(model, length), "metric": "l2", **(config or {})}
    where = ("step", family, dtype, length, variants)
    return selection.case(*where, base=base, config=config, gate_length=128, why=why, **options)


def _ratio(model: str, dtype: str, length: int, selection: Selection) -> Case:
    """The exact step against the plain one and the peers."""
    task = tasks(selection, model=model, dtype=dtype)
    bounds = {}
    if selection.bounded and (dtype, length) in BOUNDS and model in ("llama", "gpt2"):
        bounds["ratio"] = BOUNDS[dtype, length][held_to_avx2()] + (GPT2_MORE if model == "gpt2" else 0.0)
    single, own, usual = dtype == "float32", models.architecture(model), model in models.ARCHITECTURES
    fused = task("penalty", form="fused")
    # without instructions for bfloat16 the plain step takes ten times as long as ours
    variants = [variant("plain", task("plain"), rounds=None if single else 2)]
    if single and length <= 512:  # it loses to sdpa everywhere, by more as S grows
        variants.append(variant("plain, eager attention", task("plain", form="eager")))
    compiles = single and usual and length <= 512 and selection.part != "backward"  # it keeps no graph
    if compiles:
        variants.append(variant("plain, compiled", task("plain", form="compiled"), optional=True))
    if single:
        variants.append(variant("exact", task("penalty")))
    variants.append(variant("exact, fused", fused, bounds=bounds, peer=FINITE if single and bounds else None))
    if single:  # useless in low precision
        variants.append(variant(FINITE, task("differences"), exact=False))
    if single and length <= 512:
        # wrong through layer_norm in PyTorch itself: there the error is shown, and the gate does not judge it
        right = own == "llama"
        for name, kind in (("torch.func.jvp", "forward mode"), (DOUBLE, "double backward")):
            variants.append(variant(name, task(kind), rounds=3, optional=True, exact=right))
        if compiles:
            graph = task("penalty", form="compiled")
            variants.append(variant("exact, compiled", graph, optional=True))
            variants.append(
                variant("exact, compiled reference", graph, rounds=3, optional=True, backend="reference")
            )
    variants += [
        variant(p, task(p), exact=False, optional=True, rounds=3)
        for p in (peers.device_peers() if selection.device != "cpu" else ())
    ]
    base = ("plain", *(v.name for v in variants if v.name in ("plain, eager attention", "plain, compiled")))
    why = "exact penalty step ÷ plain step"
    return step_case(model, model, dtype, length, selection, variants, base, why)


def _head(model: str, dtype: str, length: int, selection: Selection) -> Case:
    task = tasks(selection, model=model, dtype=dtype, head=True)
    variants = [
        variant("plain", task("plain")),
        *([variant("exact", task("penalty"))] if model == "smollm2" else []),
        variant("exact, fused", task("penalty", form="fused")),
        variant("loss and penalty, fused", task("both", form="fused")),
        variant(FINITE, task("differences"), exact=False),
    ]
    config = {"metric": "fisher", "V": words(model)}
    family = "head" if model == "llama" else model
    why = f"with a head of {words(model):,} words, fisher"
    return step_case(family, model, dtype, length, selection, variants, ("plain",), why, config, repeats=6)


def words(model: str) -> int:
    """Size of the head's vocabulary."""
    return models.WORDS.get(model, VOCABULARY)


def _penalty(dtype: str, length: int, selection: Selection) -> Case:
    """The loss from the same forward, and more directions, against one penalty."""
    task = tasks(selection, model="llama", dtype=dtype, form="fused")
    bound = DIRECTIONS.get((dtype, length)) if selection.bounded else None
    variants = [
        variant("penalty", task("penalty")),
        variant("loss and penalty", task("both"), bounds={"ratio": SHARED} if bound else {}),
        variant("four directions", task("penalty", directions=4), bounds={"ratio": bound} if bound else {}),
    ]
    why = "with the loss, and with four directions ÷ the penalty along one"
    return step_case("penalty", "llama", dtype, length, selection, variants, ("penalty",), why)


def _memory(dtype: str, length: int, selection: Selection) -> Case:
    task = tasks(selection, model="llama", dtype=dtype)
    bounds = {"peak_ratio": PEAK} if selection.bounded and (dtype, length) == ("float32", 8192) else {}
    variants = [
        variant("plain", task("plain")),
        variant("exact, fused", task("penalty", form="fused"), bounds=bounds),
    ]
    why = "peak memory of the exact step ÷ the plain step's"
    return step_case(
        "memory", "llama", dtype, length, selection, variants, ("plain",), why, timed=False, peak=True
    )


# -- one step ---------------------------------------------------------------------------------------------------------


def problem(task: Task, length: int) -> tuple[nn.Module, nn.Linear | None, Tensor, Tensor, Tensor]:
    """Model, head, embeddings ``[1, S, C]``, unit directions ``[K, 1, S, C]`` and labels ``[1, S]``."""
    hidden, vocab_size = models.sizes(task.model, length).hidden, words(task.model)
    with torch.device(task.device):  # a billion numbers are drawn in no time there
        model = models.build(task.model, task.dtype, length, "eager" if task.form == "eager" else "sdpa")
        head = models.head(hidden, vocab_size, task.dtype) if task.head else None
        x = draw(1, length, hidden, dtype=task.dtype, seed=1)
        v = normalize(draw(task.directions, 1, length, hidden, dtype="float32", seed=2)).to(x.dtype)
    if task.lora:
        model = models.adapted(model, task.lora)
    if task.checkpoint:
        models.checkpoint(model)
    if task.form == "fused":
        fuse(model, recompute=task.recompute)
    labels = torch.randint(vocab_size, (1, length), generator=torch.Generator().manual_seed(3))
    if head is not None:
        head = head.to(task.device).requires_grad_(not task.lora)
    return model.to(task.device), head, x.to(task.device), v.to(task.device), labels.to(task.device)


def exact_problem(task: Task, length: int) -> tuple[nn.Module, nn.Linear | None, Tensor, Tensor, Tensor]:
    """The numbers of :func:`problem` on the CPU, in float64."""
    model, head, *tensors = problem(task, length)
    x, v, labels = (t.cpu() for t in tensors)
    return model.cpu().double(), None if head is None else head.cpu().double(), x.double(), v.double(), labels


def make(
    task: Task,
    length: int,
    context: Callable[..., AbstractContextManager[object]] = nullcontext,
) -> Run:
    """A step, in a context of the parameters, or a part of it."""
    model, head, x, v, labels = problem(task, length)
    parameters = trained(model, head)
    scalar: Callable[..., Tensor] = functools.partial(loss, task, model, head)
    if task.form == "compiled":
        scalar = compiled(scalar)
    if task.part != "both":
        return portion(lambda: scalar(x, v, labels), parameters, None, task.part)
    return step_run(parameters, lambda: scalar(x, v, labels), lambda: context(parameters))


def loss(
    task: Task, model: nn.Module, head: nn.Linear | None, x: Tensor, v: Tensor, labels: Tensor
) -> Tensor:
    """The scalar of one step."""
    hidden, output = models.outputs(model, head)
    if task.kind == "plain":
        return plain_loss(output(x), head, labels)
    if task.kind == "differences":
        y = output(x)
        return size(head, y, (output(x + DIFFERENCE * v[0]) - y) / DIFFERENCE)
    if task.kind in ("forward mode", peers.JVP_FLASH):
        flash = peers.JVPFlashAttention() if task.kind == peers.JVP_FLASH else nullcontext()
        with flash, sdpa_kernel(SDPBackend.MATH):
            return size(head, *torch.func.jvp(output, (x,), (v[0],)))
    if task.kind == "double backward":
        with sdpa_kernel(SDPBackend.MATH):  # no fused attention has a second derivative
            x = x.detach().requires_grad_()
            y = output(x)
            dummy = torch.zeros_like(y, requires_grad=True)
            (pulled,) = torch.autograd.grad(y, x, dummy, create_graph=True)
            (y_tan,) = torch.autograd.grad(pulled, dummy, v[0], create_graph=True)
            return size(head, y, y_tan)
    options: dict[str, Any] = {"metric": "l2"}
    if head is not None:
        options = {"metric": "fisher", "head": LMHead(head.weight)}
    if task.kind == "both":
        options |= {"return_primal": True, **({} if head is None else {"labels": labels})}
    result = aligned_penalty(hidden, x, v if task.directions > 1 else v[0], **options)
    if task.kind == "penalty":
        return result
    penalty, primal = result
    return penalty + (plain_loss(primal, None, labels) if head is None else primal)


def plain_loss(y: Tensor, head: nn.Linear | None, labels: Tensor) -> Tensor:
    """The cross-entropy of logits, or the mean square of hidden states."""
    return y.square().mean() if head is None else models.crossentropy(y, labels)


def trained(model: nn.Module, head: nn.Linear | None) -> list[nn.Parameter]:
    """The parameters that get gradients."""
    parameters = [*model.parameters(), *(head.parameters() if head else ())]
    return [p for p in parameters if p.requires_grad]


def size(head: nn.Linear | None, y: Tensor, y_tan: Tensor) -> Tensor:
    """The metric, averaged over the tokens, from elementary operations."""
    return (y_tan.square().sum(-1) if head is None else formulas.fisher(y, y_tan)).mean()


@functools.lru_cache(maxsize=3)
def true_gradients(task: Task, length: int) -> Gradients:
    """All gradients in float64 on the oracle's layers, for the weights rounded to the dtype."""
    model, head, x, v, labels = exact_problem(task, length)
    _, output = models.outputs(model, head)
    with oracle.oracle_mode():
        total = torch.zeros(())
        if task.kind != "plain":
            total = total + size(head, *oracle.jvp(output, x, v))
        if task.kind != "penalty":
            total = total + plain_loss(output(x), head, labels)
    if task.part == "forward":
        return [total.detach()]
    total.backward()
    return [p.grad for p in trained(model, head)]


SUITE = Suite(
    "step",
    "penalty step of Llama, GPT-2 and BERT models against the plain step",
    ("llama", "gpt2", *OTHERS, "smollm2", "head", "penalty", "memory"),
    cases,
)
