"""A whole step of the method on Hugging Face models, padded, fused and not: against plain PyTorch in float64."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers")

import torch
from assertions import assert_exact
from integrations.transformers.subjects import tiny
from torch.nn import functional as F
from zoo import ENTRIES

import aajr_kernels as aajr
from aajr_kernels.integrations.transformers import fuse
from aajr_kernels.testing import oracle

B, N = 2, 7
PADDED = torch.tensor([[1] * N, [1] * 5 + [0] * 2])
RADIUS, SIZE, STEPS = 0.6, 0.4, 3


def ascent_by_hand(loss, x, keep):
    """Token scope, normalised steps."""
    points, directions, delta = [x], [], torch.zeros_like(x)
    for _ in range(STEPS):
        point = points[-1].clone().requires_grad_()
        (g,) = torch.autograd.grad(loss(point).sum(), point)
        directions.append(torch.where(keep, g / g.norm(dim=-1, keepdim=True), 0.0))
        delta = delta + SIZE * directions[-1]
        delta = delta * (RADIUS / delta.norm(dim=-1, keepdim=True).clamp(min=1e-30)).clamp(max=1.0)
        points.append(x + delta)
    return points, directions


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", ["llama", "gemma", "qwen2", "gpt2"])
def test_ascent_loss_and_penalty(name, fused):
    model = (ENTRIES["gpt2-sdpa"]().model if name == "gpt2" else tiny(name)).double()
    parameters = dict(model.named_parameters())
    ids = torch.randint(model.config.vocab_size, (B, N))
    labels = torch.where(PADDED.bool(), ids.roll(-1, 1), -100)
    x = model.get_input_embeddings()(ids).detach()
    keep = PADDED.bool().unsqueeze(-1)

    def logits(e):
        with oracle.oracle_mode():
            return model(inputs_embeds=e, attention_mask=PADDED).logits

    def by_hand(e):
        terms = F.cross_entropy(logits(e).transpose(1, 2), labels, reduction="none")
        return terms.sum(-1) / (labels >= 0).sum(-1)

    points, directions = ascent_by_hand(by_hand, x, keep)
    with oracle.oracle_mode():
        primal, tangents = oracle.jvp(logits, points[-1], directions[-1].unsqueeze(0))
    penalty = oracle.mean_over_units(oracle.metric_values(primal, tangents, "fisher"), PADDED.bool())
    loss = F.cross_entropy(primal.flatten(0, 1), labels.flatten())
    expected = torch.autograd.grad(loss + 0.2 * penalty, list(parameters.values()), allow_unused=True)

    if fused:
        fuse(model)
    base, head = model.base_model, model.get_output_embeddings()
    hidden = lambda d, mask=PADDED: (
        base(inputs_embeds=d, attention_mask=mask, use_cache=False).last_hidden_state
    )
    with oracle.KeepFloat64(aajr.Dual):
        adversary = aajr.lm_loss(hidden, head=head, labels=labels)
        traj = aajr.ascend(
            adversary, x, radius=RADIUS, steps=STEPS, step_size=SIZE, scope="token", mask=PADDED, module=model
        )
        pen, aux = aajr.trajectory_penalty(
            hidden, x, traj, steps="last", at="end", head=head, labels=labels, mask=PADDED, return_primal=True
        )
        several = [
            aajr.trajectory_penalty(
                hidden, x, traj, head=head, mask=PADDED, inputs={"mask": PADDED}, batch_steps=size
            )[0]
            for size in (1, 3)
        ]
    assert_exact(traj.points, torch.stack(points), "points", tolerance=1e-9)
    assert_exact(traj.directions, torch.stack(directions), "directions", tolerance=1e-8)
    assert_exact(traj.losses[-1], by_hand(points[-1]), "loss of every row", tolerance=1e-9)
    assert_exact(pen, penalty, "penalty", tolerance=1e-7)
    assert_exact(aux.primal, loss, "loss", tolerance=1e-9)
    assert_exact(several[1], several[0], "in one forward")
    assert all(p.grad is None and p.requires_grad for p in parameters.values())
    actual = torch.autograd.grad(aux.primal + 0.2 * pen, list(parameters.values()), allow_unused=True)
    size = torch.cat([g.flatten() for g in expected if g is not None]).norm()
    for key, a, b in zip(parameters, actual, expected):
        assert (a is None) == (b is None), key
        # directions are off by up to 1e-8, and enter squared
        assert a is None or (a - b).norm() <= 1e-7 * size, key


def test_a_training_step_at_the_worst_point_in_float32():
    model = tiny("llama")
    fuse(model)
    ids = torch.randint(model.config.vocab_size, (B, N))
    labels = torch.where(PADDED.bool(), ids.roll(-1, 1), -100)
    head, body = model.get_output_embeddings(), model.base_model
    hidden = lambda x: body(inputs_embeds=x, attention_mask=PADDED).last_hidden_state
    x = model.get_input_embeddings()(ids)
    adversary = aajr.lm_loss(hidden, head=head, labels=labels)
    traj = aajr.ascend(adversary, x, radius=1.0, steps=3, scope="token", mask=PADDED, module=model)
    assert (traj.worst_loss > traj.losses[0]).all()
    penalty, aux = aajr.trajectory_penalty(
        hidden, x, traj, steps="worst", head=head, labels=labels, mask=PADDED, return_primal=True
    )
    with torch.no_grad():
        logits = model(inputs_embeds=traj.worst, attention_mask=PADDED).logits
        expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
    # some twenty operations a layer, each with a few roundings of 6e-8
    assert_exact(aux.primal.detach(), expected, "loss", tolerance=2e-5)
    (aux.primal + 0.1 * penalty).backward()
    assert penalty > 0 and all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())
