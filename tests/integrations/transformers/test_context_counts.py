"""The accounting of a shared context, and the same kernel calls where everything may be attacked."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from integrations.transformers.test_context import LENGTH, ROWS, START, batch, family, step
from torch.utils._python_dispatch import TorchDispatchMode

import aajr_kernels as aajr
from aajr_kernels.backends import choice
from aajr_kernels.integrations.transformers import shared_context
from aajr_kernels.training import Attack, Objective, ObjectiveConfig, Penalty, policy_of

pytest.importorskip("transformers")


class _Calls(TorchDispatchMode):
    """Every operator that runs, forward and backward, with the shapes of its tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[Any] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        shapes = tuple(tuple(a.shape) for a in args if isinstance(a, torch.Tensor))
        self.seen[str(func), shapes] += 1
        return func(*args, **(kwargs or {}))


def hidden(model: Any) -> Any:
    return lambda x: model.base_model(inputs_embeds=x, use_cache=False).last_hidden_state


@pytest.mark.parametrize(("fused", "output"), [(False, True), (True, False)])
def test_what_is_skipped_is_what_the_whole_takes_more(fused, output):
    """Flops and skipped ones add up to those of the forwards without a context, which are counted one by one."""
    model = family("llama", fused)
    x, mask, labels = batch()
    forward, rest = hidden(model), LENGTH - START

    def forwards(func: Any, z: torch.Tensor) -> None:
        """Without tangents, at two points; with two directions, at one."""
        func(aajr.Dual(torch.cat([z, -z]).unsqueeze(0)))
        aajr.jvp(func, (z,), (torch.stack([z, 2 * z]),))

    with aajr.coverage() as whole:
        forwards(forward, x)
    with aajr.coverage() as ran:
        context = shared_context(model.base_model, x, mask=mask, output=output)
        forwards(context, context.x)
    assert whole.computed == {} and whole.shares() == {}
    assert ran.computed == {"positions": [ROWS * (START + 3 * rest), ROWS * 3 * LENGTH]}
    # products of the suffix on the context's keys are fewer than in the whole where these have no tangents
    assert ran.flops() + ran.skipped == pytest.approx(whole.flops(), rel=0.03)
    assert ran.shares()["arithmetic"] == pytest.approx(ran.flops() / whole.flops(), rel=0.03)
    assert f"{ran.shares()['positions']:.1%} of the positions" in str(ran)

    with aajr.coverage() as both:
        context = shared_context(model.base_model, x, mask=mask)
        step(context, context.x, model, policy_of(model).head, context.suffix(labels), context.suffix(mask))
    assert both.shares().keys() == {"positions", "tokens", "arithmetic"}
    assert 0.4 < both.shares()["arithmetic"] < 0.8


def test_everything_attackable_is_the_step_without_a_context():
    """Operator by operator, forward and backward, in a loop of one's own and in the objective."""
    model = copy.deepcopy(family("llama", True)).float()  # kernels are for float32
    x, _, labels = batch()
    x = x.float()
    head, everything = policy_of(model).head, torch.ones(ROWS, LENGTH, dtype=torch.bool)
    trained = [p for p in model.parameters() if p.requires_grad]

    def run(func: Any, z: torch.Tensor) -> Counter[Any]:
        with _Calls() as calls:
            _, *terms = step(func, z, model, head, labels, everything)
            torch.autograd.grad(sum(terms), trained, allow_unused=True)
        return calls.seen

    without = run(hidden(model), x)
    context = shared_context(model.base_model, x, mask=everything)
    assert context.start == 0 and run(context, context.x) == without
    if choice.select_backend("norm", x) == "native":
        assert {"aajr.native_attention_fwd.default", "aajr.native_attention_bwd.default"} <= {
            name for name, _ in without
        }

    data = {"input_ids": torch.arange(ROWS * LENGTH).view(ROWS, LENGTH) % 30, "attack_mask": everything}
    config = dict(attack=Attack(radius=0.5, steps=2, step_size=0.3), penalty=Penalty(weight=0.2))
    seen = []
    for share in (False, "auto", True):
        objective = Objective(model, ObjectiveConfig(**config, share_context=share))
        with _Calls() as calls:
            terms = objective(data)
            torch.autograd.grad(terms.total, trained, allow_unused=True)
        seen.append(calls.seen)
    assert seen[0] == seen[1] == seen[2]
