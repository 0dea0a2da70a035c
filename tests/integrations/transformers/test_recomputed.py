"""``fuse(model, recompute=True)``: the same gradients bit by bit, fewer kept bytes; alone and with checkpoints."""

from __future__ import annotations

import re
import warnings

import pytest
import torch
from integrations.transformers.subjects import SUBJECTS
from test_recompute import Kept
from zoo import Subject

import aajr_kernels as aajr
from aajr_kernels.integrations.transformers import fuse

#: biases of norms, kept for the second computation where nothing else needs them
BIAS = re.compile(r"(ln_\w+|LayerNorm|layer_norm)\.bias$")
WIDTH, INNER, LAYERS = 32, {"llama": 48, "gpt2": 128, "bert": 64}, 2


def step(subject: Subject, checkpointed: bool = False) -> tuple[torch.Tensor, list[torch.Tensor], Kept]:
    """Penalty, gradients of everything, and what was kept between forward and backward."""
    v = torch.randn(subject.x.shape, generator=torch.Generator().manual_seed(3))
    x = subject.x.clone().requires_grad_()
    model = subject.model
    if checkpointed:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            model.train().gradient_checkpointing_enable({"use_reentrant": False})
    with Kept() as kept:
        penalty = aajr.aligned_penalty(subject.output, x, v, metric=subject.metric, mask=subject.mask)
    leaves = [x, *(p for p in model.parameters() if p.requires_grad)]
    gradients = torch.autograd.grad(penalty, leaves, allow_unused=True)
    return penalty, [torch.zeros(()) if g is None else g for g in gradients], kept


@pytest.mark.parametrize("name", ["llama-sdpa", "gpt2-sdpa", "bert-sdpa"])
def test_gradients_are_bitwise_equal_and_less_is_kept(name):
    kind = name.partition("-")[0]
    subject = SUBJECTS[name]()
    with fuse(subject.model):
        _, expected, plain = step(subject)
    with fuse(subject.model, recompute=True) as fusion:
        _, gradients, less = step(subject)
        assert any("recomputed" in what for what, _, _ in fusion.rows())
    assert all(torch.equal(a, b) for a, b in zip(gradients, expected))
    rows = 2 * subject.x.shape[0] * subject.x.shape[1]
    # of every layer the results of two norms and of the activation; in BERT that of the norm before the layers, too
    results = LAYERS * (2 * WIDTH + INNER[kind]) + (WIDTH if kind == "bert" else 0)
    biases = sum(p.numel() for name, p in subject.parameters.items() if BIAS.search(name))
    assert plain.bytes - less.bytes == 4 * (rows * results - biases)
    assert not any("forward" in module.__dict__ for module in subject.model.modules())  # undone


def test_with_checkpoints_of_transformers():
    subject = SUBJECTS["llama-sdpa"]()
    with fuse(subject.model):
        _, expected, plain = step(subject)
    with fuse(subject.model, recompute=True):
        _, gradients, kept = step(subject, checkpointed=True)
    assert all(torch.equal(a, b) for a, b in zip(gradients, expected))
    assert kept.bytes < 0.5 * plain.bytes
