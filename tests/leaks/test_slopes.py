"""No memory grows with the steps: slopes over 10,000 steps of every kind, over a few hundred in `make test`."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from leaks.slopes import Growth, Meter, Slope, measured
from training.tiny_lm import ATTACK, WIDTH, plain, quiet, sequences, sgd, tiny_lm

import aajr_kernels as aajr
from aajr_kernels import Dual
from aajr_kernels.method.evaluation import EmbeddingAttack, evaluate
from aajr_kernels.training import Objective, ObjectiveConfig, Penalty, policy_of
from common import meter
from common.trust import count as counted

pytestmark = pytest.mark.skipif(not meter._STATM.exists(), reason="this system has no /proc/self/statm")
Step = Callable[[int], object]


def _penalty(model: torch.nn.Module, length: int = 5) -> torch.Tensor:
    x = torch.randn(2, length, WIDTH, requires_grad=True)
    penalty = aajr.aligned_penalty(model, x, torch.randn(2, length, WIDTH), metric="fisher")
    penalty.backward()
    model.zero_grad()
    return penalty.detach()


def penalties() -> Step:
    model = tiny_lm()
    return lambda number: _penalty(model)


def lengths() -> Step:
    """1 to 64 in turn."""
    model = tiny_lm()
    return lambda number: _penalty(model, 1 + number % 64)


def operations() -> Step:
    """Fused ones, of all kinds and of 1 to 64 tokens."""
    weight, head = torch.randn(8, requires_grad=True), torch.randn(11, 8, requires_grad=True)

    def step(number: int) -> None:
        tokens = 1 + number % 64
        x = aajr.rms_norm(Dual(torch.randn(3, 2, tokens, 8, requires_grad=True)), 8, weight)
        heads = aajr.rotary(x.unflatten(-1, (2, 4)).transpose(1, 2), *torch.randn(2, 2, tokens, 4))
        mixed = aajr.attention(heads, heads, heads, causal=True).transpose(1, 2).flatten(-2)
        hidden = aajr.swiglu(mixed, aajr.linear(aajr.gelu(mixed), torch.eye(8), None))
        aajr.lm_head_sensitivity(hidden, head).sum().backward()

    return step


def steps_of_an_optimizer() -> Step:
    model = tiny_lm(dropout=0.1)
    config = ObjectiveConfig(ATTACK, Penalty(weight=0.2), clean_weight=0.3)
    objective, optimizer, batch = Objective(model, config), sgd(model, 1e-3), sequences(1)[0]

    def step(number: int) -> None:
        objective(batch).total.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def evaluations() -> Step:
    model = tiny_lm()
    policy, batch = policy_of(model), {"input_ids": sequences(1)[0], "labels": sequences(1)[0]}
    attack = EmbeddingAttack(radius=0.5, steps=2)
    return lambda number: evaluate(policy, [batch], [attack], module=model)


class Broken(Exception):
    """Raised in the middle of a forward."""


def exceptions() -> Step:
    """Raised in a dual forward, after some layers have run."""
    model = tiny_lm()

    def fail(*_: Any) -> None:
        raise Broken

    model.head.register_forward_hook(fail)

    def step(number: int) -> None:
        with pytest.raises(Broken):
            _penalty(model)

    return step


def threads() -> Step:
    """A new one for every step, and threads of the kernels in it."""
    model = tiny_lm()

    def step(number: int) -> None:
        thread = threading.Thread(target=_penalty, args=(model,))
        thread.start()
        thread.join()

    return step


def compiled() -> Step:
    model = tiny_lm()
    call = torch.compile(lambda x, v: aajr.aligned_penalty(model, x, v, metric="fisher"), backend="aot_eager")
    x, v = torch.randn(2, 2, 5, WIDTH)

    def step(number: int) -> None:
        call(x.requires_grad_(), v).backward()
        model.zero_grad()

    return step


def trainings(steps: int, warm: int) -> Growth:
    """One run of fit, looked at between its steps."""
    watch, batches = Meter(steps, warm), itertools.cycle(sequences(5))

    def data() -> Iterator[torch.Tensor]:
        for _ in range(steps + warm + 2):
            yield next(batches)
            watch.tick()

    quiet(
        tiny_lm(dropout=0.1),
        data(),
        plain(steps=steps + warm + 2, penalty=Penalty(weight=0.2), log_every=100),
    )
    return watch.growth()


STEPS = {
    step.__name__: step
    for step in (
        penalties,
        lengths,
        operations,
        steps_of_an_optimizer,
        evaluations,
        exceptions,
        threads,
        compiled,
    )
}
#: that `make test` takes, of how many steps
QUICK = {"penalties": 128, "operations": 64}


def kinds() -> list[Any]:
    slow = [
        pytest.param(name, 10_000, 2500, id=name, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])
        for name in (*STEPS, "trainings")
    ]
    return [*(pytest.param(name, steps, 64, id=f"{name}, few") for name, steps in QUICK.items()), *slow]


@pytest.mark.filterwarnings("ignore:.*torch._dynamo")
@pytest.mark.parametrize(("name", "steps", "warm"), kinds())
def test_no_memory_grows_with_the_steps(name, steps, warm):
    growth = trainings(steps, warm) if name == "trainings" else measured(STEPS[name](), steps, warm)
    assert not growth.faults()
    if steps == 10_000:
        figures = {
            "resident_bytes_per_step_at_most": max(growth.resident.per_step, 0.0),
            "traced_bytes_per_step_at_most": max(growth.traced.per_step, 0.0),
            "objects_per_step_at_most": max(growth.objects.per_step, 0.0),
        }
        counted("leaks", kinds=1, steps=steps, **figures)


# -- the meter itself -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("leak", "kind"),
    [
        (lambda number: [number], "objects"),
        (lambda number: bytes(4096), "traced"),
        (lambda number: torch.full((4096,), float(number)), "resident"),
    ],
    ids=["a list", "4 KB", "16 KB of a tensor"],
)
def test_a_leak_of_one_thing_per_step_is_seen(leak, kind):
    kept: list[Any] = []
    growth = measured(lambda number: kept.append(leak(number)), 300, 50)
    assert any(fault.startswith(kind) for fault in growth.faults()), growth


def test_a_leak_in_one_of_ten_steps_is_seen():
    kept: list[Any] = []
    growth = measured(lambda number: number % 10 or kept.append([number]), 300, 50)
    assert any(fault.startswith("objects") for fault in growth.faults()), growth


def test_steps_that_keep_nothing_have_no_faults():
    assert not measured(lambda number: torch.randn(1024).sum().item(), 300, 50).faults()


def test_slopes_are_those_of_least_squares():
    slope = Slope.of([0, 1, 2, 3], [5, 7, 9, 11])
    assert slope == Slope(2.0, 0.0) and slope.exceeds(1.9) and not slope.exceeds(2.0)
