"""A shared context leaves nothing behind: no memory, no flag, and no gradient that is missing without a word."""

from __future__ import annotations

import contextlib
import copy
import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from integrations.transformers.test_context import START, batch, family
from torch import nn

import aajr_kernels as aajr
from aajr_kernels.integrations.transformers import context as context_module
from aajr_kernels.integrations.transformers import fuse, shared_context
from aajr_kernels.method.attack_state import frozen_parameters

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")


@contextlib.contextmanager
def no_garbage_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@pytest.mark.parametrize("differentiated", [True, False])
@pytest.mark.parametrize("way", ["plain", "fused", "checkpointing"])
def test_nothing_is_alive_after_a_step(way, differentiated):
    """Without the garbage collector: keys, values and their graph are freed with the last reference."""
    model, (x, _, _) = copy.deepcopy(family("llama")), batch()
    if way == "fused":
        fuse(model)
    if way == "checkpointing":
        model.gradient_checkpointing_enable()
        model.train()
    shared_context(model.model, x, start=START)  # the first use compares
    with no_garbage_collection():
        context = shared_context(model.model, x, start=START)
        total = context(aajr.dual(context.x, torch.ones_like(context.x))).stacked.square().sum()
        seen = [weakref.ref(t) for t in (*context._cache.tensors(), context)]
        del context
        if differentiated:
            total.backward()
        del total
        assert [ref() for ref in seen] == [None] * len(seen)


def state_of(model: nn.Module) -> list[Any]:
    config = model.config.to_dict()
    modules = [
        (m.training, len(m._forward_hooks), m.__dict__.get("gradient_checkpointing"), "forward" in m.__dict__)
        for m in model.modules()
    ]
    return [config, model.config._attn_implementation, modules, [p.requires_grad for p in model.parameters()]]


@pytest.mark.parametrize("where", ["context", "suffix", "backward"])
def test_an_exception_leaves_the_model_as_it_was(where):
    model, (x, mask, labels) = copy.deepcopy(family("llama")).train(), batch()
    model.gradient_checkpointing_enable()
    shared_context(model.model, x, mask=mask)
    calls, limit = [0], {"context": 0, "suffix": 1, "backward": 2}[where]

    def fail(module: nn.Module, args: Any) -> None:
        calls[0] += 1
        if calls[0] > limit:
            raise KeyboardInterrupt

    handle = model.model.layers[0].mlp.register_forward_pre_hook(fail)
    before = state_of(model)

    def step() -> Any:
        context = shared_context(model.model, x, mask=mask)
        loss_fn = aajr.lm_loss(context, head=model.lm_head, labels=context.suffix(labels))
        return loss_fn(context.x).sum()

    with pytest.raises(KeyboardInterrupt):
        step().backward()
    assert calls[0] == limit + 1
    assert state_of(model) == before
    handle.remove()
    model.zero_grad()
    total = step()
    total.backward()
    expected = aajr.lm_loss(
        lambda z: model.model(inputs_embeds=z).last_hidden_state, head=model.lm_head, labels=labels
    )(x).sum()
    assert float((total - expected).detach()) == pytest.approx(0.0, abs=1e-5)  # norms in float32


def test_gradients_of_x_are_not_lost():
    """With frozen parameters a context without a graph would only miss the gradient of its own embeddings."""
    model, (x, _, _) = copy.deepcopy(family("llama")).requires_grad_(False), batch()
    leaf = x.clone().requires_grad_()
    with torch.no_grad():
        context = shared_context(model.model, leaf, start=START)
    with pytest.raises(RuntimeError, match="without a graph, under torch.no_grad"):
        context(leaf[:, START:])
    with torch.no_grad():
        context = shared_context(model.model, x, start=START)
    point = x[:, START:].clone().requires_grad_()
    context(point).sum().backward()  # only the suffix is differentiated
    assert point.grad.norm() > 0


def test_a_context_of_an_attack_stays_in_it():
    model, (x, _, _) = copy.deepcopy(family("llama")), batch()
    with frozen_parameters((model,), False):
        context = shared_context(model.model, x, start=START)
        context(context.x)
    with pytest.raises(RuntimeError, match="or inside an attack"):
        context(context.x)


def test_a_second_backward_needs_a_context_of_its_own():
    model, (x, _, _) = copy.deepcopy(family("llama")), batch()
    context = shared_context(model.model, x, start=START)
    context(context.x).sum().backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        context(context.x).sum().backward()


class _OwnCache(transformers.LlamaModel):
    """Wants a cache of its own kind, as code written for one model does."""

    def forward(self, *args: Any, past_key_values: Any = None, **kwargs: Any) -> Any:
        if past_key_values is not None:
            past_key_values["mine"]
        return super().forward(*args, **kwargs)


def test_a_model_that_fails_with_a_cache_is_refused():
    model, (x, _, _) = _OwnCache(copy.deepcopy(family("llama").config)).double(), batch()
    with pytest.raises(aajr.UnsupportedOperation, match="_OwnCache computes the whole, but not a suffix"):
        shared_context(model, x, start=START)


def test_the_check_runs_once_for_a_model(monkeypatch):
    model, (x, _, _) = copy.deepcopy(family("llama")), batch()
    made: list[int] = []
    own = context_module.SharedContext

    class Counted(own):
        def __init__(self, *args: Any) -> None:
            made.append(args[2])
            super().__init__(*args)

    monkeypatch.setattr(context_module, "SharedContext", Counted)
    for _ in range(2):
        shared_context(model.model, x, start=START)
    assert made == [0, 4, START, START]


@pytest.mark.slow
# Dynamo looks at every frame between the graphs, and warns of what it finds
@pytest.mark.filterwarnings("ignore")
def test_a_step_compiled_as_a_whole_does_not_compile_again():
    """The context and the model on its suffix are left out of the graphs, whose number does not grow with the steps."""
    (embedded, mask, labels), graphs, counts = batch(), [], []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    def train(model: nn.Module, x: torch.Tensor) -> None:
        context = shared_context(model.model, x, mask=mask)
        own, open_tokens = context.suffix(labels), context.suffix(mask)
        loss_fn = aajr.lm_loss(context, head=model.lm_head, labels=own)
        options = dict(radius=0.8, steps=2, step_size=0.3, scope="token", mask=open_tokens, module=model)
        traj = aajr.ascend(loss_fn, context.x.detach(), **options)
        options = dict(head=model.lm_head, labels=own, return_primal=True)
        penalty, aux = aajr.trajectory_penalty(context, context.x, traj, **options)
        (aux.primal + 0.1 * penalty).backward()

    torch.compiler.reset()
    eager, traced = (copy.deepcopy(family("llama")) for _ in range(2))
    compiled = torch.compile(train, backend=backend)
    try:
        for _ in range(3):
            for model, call in ((eager, train), (traced, compiled)):
                model.zero_grad()
                call(model, embedded)
                torch.optim.SGD(model.parameters(), lr=0.1).step()
            counts.append(len(graphs))
            for (name, p), q in zip(eager.named_parameters(), traced.parameters(), strict=True):
                torch.testing.assert_close(q, p, rtol=1e-6, atol=1e-8, msg=name)
    finally:
        torch.compiler.reset()
    assert counts[0] and counts[1] == counts[2], counts
