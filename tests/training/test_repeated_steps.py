"""Whole trainings are bitwise equal over 20 runs: parameters of a fused Llama after three steps of fit."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from backends.repeats import RUNS
from ops.suite import Target
from training.tiny_lm import ATTACK, fit_config, quiet, vector

from aajr_kernels.training import Penalty
from common.trust import count as counted

pytest.importorskip("transformers")
from integrations.transformers.subjects import tiny

from aajr_kernels.integrations.transformers import fuse

STEPS, ROWS, LENGTH, START = 3, 2, 12, 5
#: several tangents at once behind a context that is shared; and random directions with dropout
CONFIGS: dict[str, dict[str, Any]] = {
    "shared context": dict(
        penalty=Penalty(weight=0.2, steps="all", batch_steps=2), share_context=True, clean_weight=0.3
    ),
    "three tangents": dict(penalty=Penalty("random", weight=0.2, samples=3), clean_weight=0.3),
}


def batches() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(5)
    open_to_attack = (torch.arange(LENGTH) >= START).expand(ROWS, LENGTH)
    draws = [torch.randint(3, 97, (ROWS, LENGTH), generator=generator) for _ in range(STEPS)]
    return [{"input_ids": ids, "labels": ids, "attack_mask": open_to_attack} for ids in draws]


def trained(config: dict[str, Any]) -> torch.Tensor:
    model = tiny("llama", attention_dropout=0.0 if "share_context" in config else 0.2)
    with fuse(model):
        quiet(model.train(), batches(), fit_config(steps=STEPS, attack=ATTACK, learning_rate=1e-2, **config))
    return vector(model)


def runs() -> list[Any]:
    """In `make test` the native kernels on one thread, three times each."""
    every = itertools.product(("native", "reference"), CONFIGS, (1, 2))
    slow = [pytest.param(*one, RUNS, marks=[pytest.mark.slow, pytest.mark.timeout(1200)]) for one in every]
    return [*(("native", name, 1, 3) for name in CONFIGS), *slow]


@pytest.mark.parametrize(("backend", "name", "number", "runs"), runs())
def test_parameters_after_three_steps_are_bitwise_equal(backend, name, number, runs, threads):
    target = Target(backend)
    if reason := target.why_not("attention"):
        pytest.skip(reason)
    threads(number)
    with target.active():
        first = trained(CONFIGS[name])
        assert not torch.equal(first, vector(tiny("llama"))) and first.isfinite().all()
        for _ in range(runs - 1):
            assert torch.equal(trained(CONFIGS[name]), first)
    if runs == RUNS:
        counted("trainings", trainings=runs, steps=STEPS * runs)
