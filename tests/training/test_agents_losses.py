"""What an agent minimises: its policy gradient as it is and under attack, its own loss, with its history shared."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F
from training.talkers import adapted, objective, opened, team

import aajr_kernels as aajr
from aajr_kernels.method.dialogue import Dialogue, play
from aajr_kernels.testing import oracle
from aajr_kernels.training import KL, AgentsConfig, Attack, Objective, ObjectiveConfig, Penalty
from aajr_kernels.training.agents import _Run

pytest.importorskip("transformers")
pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # read by peft

PAYOFF = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)


def talk(agents: Any, rounds: int = 1, length: int = 4) -> Dialogue:
    generator = torch.Generator().manual_seed(2)
    return play(agents, opened(("buyer", "seller"), 3), rounds=rounds, length=length, generator=generator)


def weights_of(advantage: str) -> torch.Tensor:
    centred = PAYOFF - 0.5
    return {
        "mean": centred,
        "payoff": PAYOFF,
        "standardised": centred / (PAYOFF.std(correction=0) + 1e-8),
    }[advantage]


def surrogate(model: Any, x: torch.Tensor, dialogue: Dialogue, weights: torch.Tensor) -> torch.Tensor:
    """−A log π of the seller's tokens over their number, from logits of the model itself at embeddings `x`."""
    ids, own = dialogue.ids, dialogue.speakers == 1
    z = model(inputs_embeds=x).logits
    log_p = F.log_softmax(z[:, :-1], -1).gather(-1, ids[:, 1:, None]).squeeze(-1)[:, own[1:]]
    return -(weights[:, None] * log_p).sum() / log_p.numel()


@pytest.mark.parametrize("advantage", ["mean", "payoff", "standardised"])
def test_the_loss_of_a_payoff_is_the_policy_gradient(advantage):
    model = adapted("buyer", "seller")
    agents = team(model, "buyer", "seller")
    dialogue = talk(agents)
    config = AgentsConfig(1, objective(attack=Attack(radius=0.0)), advantage=advantage)
    run = _Run(agents, lambda *_: dialogue, config)
    with agents["seller"].acting():
        batch = run.objectives["seller"].prepared(dialogue.batch("seller"))
        terms, more = run.terms(0, agents["seller"], run.objectives["seller"], batch, PAYOFF)
        x = agents["seller"].policy.embed(dialogue.ids)
        expected = surrogate(model, x, dialogue, weights_of(advantage))
    torch.testing.assert_close(terms.total, expected, rtol=1e-10, atol=1e-12)
    assert more == {"payoff": 0.5}


@pytest.mark.parametrize("clean", [0.0, 0.5])
@pytest.mark.parametrize("steps", ["worst", "last"])
def test_both_weights_count_beside_a_payoff(clean, steps):
    """c · L(x) + a · L(x + δ*) and its gradients, by the ascent written out and the model called by hand."""
    model = adapted("buyer", "seller")
    agents = team(model, "buyer", "seller")
    dialogue, radius, size = talk(agents), 0.003, 0.002
    penalty = Penalty(weight=0.05, steps=steps)
    attack = Attack(radius=radius, steps=2, step_size=size, relative=False)
    config = objective(attack=attack, clean_weight=clean, adversarial_weight=2.0, penalty=penalty)
    seller = agents["seller"]
    weights = weights_of("payoff")
    with seller.acting(), oracle.KeepFloat64(aajr.Dual):
        own = Objective(model, config, policy=seller.policy)
        terms = own(dialogue.batch("seller"), row_weights=weights)
        terms.total.backward()
        actual = [p.grad.clone() for p in seller.parameters()]
        model.zero_grad()
        added = own.penalty(dialogue.batch("seller"), row_weights=weights)
        added.total.backward()  # of the penalty, which has tests of its own
        of_penalty = [p.grad.clone() for p in seller.parameters()]
        model.zero_grad()

        x = seller.policy.embed(dialogue.ids)
        moved = (dialogue.speakers == 0)[:, None].double()
        delta, points = torch.zeros_like(x), []
        for _ in range(3):
            at = delta.clone().requires_grad_()
            z = F.log_softmax(model(inputs_embeds=x + at).logits[:, :-1], -1)
            kept = (dialogue.speakers == 1)[1:].double()
            log_p = z.gather(-1, dialogue.ids[:, 1:, None]).squeeze(-1) * kept
            by_row = -weights * log_p.sum(-1) / kept.sum()
            points.append((by_row.detach(), delta))
            (slope,) = torch.autograd.grad(by_row.sum(), at)
            slope = slope * moved
            delta = delta + size * slope / slope.norm(dim=-1, keepdim=True).clamp(min=1e-300)
            delta = delta * (radius / delta.norm(dim=-1, keepdim=True).clamp(min=1e-300)).clamp(max=1)
        # a larger loss in every row, or they would not be attacked
        losses = torch.stack([loss for loss, _ in points])
        worst = torch.stack([delta for _, delta in points])[losses.argmax(0), torch.arange(3)]
        assert bool((losses.amax(0) > losses[0]).all())
        by_hand = clean * surrogate(model, x, dialogue, weights)
        by_hand = by_hand + 2.0 * surrogate(model, x + worst, dialogue, weights)
        by_hand.backward()
    torch.testing.assert_close(terms.total, by_hand + added.total, rtol=1e-10, atol=1e-12)
    assert bool(added.total > 0)
    for p, g, more in zip(seller.parameters(), actual, of_penalty):
        torch.testing.assert_close(g, p.grad + more, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_an_anchor_keeps_an_agent_near_the_base_model(direction):
    """KL of its tokens to the model without adapters, beside the policy gradient; it reaches the own adapter only."""
    model = adapted("buyer", "seller")
    agents = team(model, "buyer", "seller")
    seller, dialogue = agents["seller"], talk(agents)
    anchored = dict(anchor=KL("reference", direction), anchor_weight=0.3)
    run = _Run(agents, lambda *_: dialogue, AgentsConfig(1, objective(attack=Attack(radius=0.0), **anchored)))
    with seller.acting(), oracle.KeepFloat64(aajr.Dual):
        own = run.objectives["seller"]
        terms, _ = run.terms(0, seller, own, own.prepared(dialogue.batch("seller")), PAYOFF)
        terms.total.backward()
        actual = [p.grad.clone() for p in seller.parameters()]
        others = [p.grad for name, p in model.named_parameters() if "seller" not in name]
        model.zero_grad()
        said = (dialogue.speakers == 1)[1:]
        logits = lambda: F.log_softmax(model(input_ids=dialogue.ids).logits[:, :-1][:, said], -1)
        with torch.no_grad(), model.disable_adapter():
            reference = logits()
        pair = (logits(), reference) if direction == "reverse" else (reference, logits())
        kl = (pair[0].exp() * (pair[0] - pair[1])).sum(-1).mean()
        x = seller.policy.embed(dialogue.ids)
        (surrogate(model, x, dialogue, weights_of("mean")) + 0.3 * kl).backward()
    assert float(kl.detach()) > 1e-6
    torch.testing.assert_close(terms.parts["anchor"], kl.detach(), rtol=1e-10, atol=0)
    assert all(grad is None for grad in others)
    for p, g in zip(seller.parameters(), actual, strict=True):
        torch.testing.assert_close(g, p.grad, rtol=1e-8, atol=1e-13)


@pytest.mark.parametrize("learns", ["loss", "payoff"])
def test_the_history_of_a_turn_is_shared_context(learns):
    """What comes before the first turn of another is computed once: the same losses, penalties and gradients."""
    results = []
    for share in (True, False):
        model = adapted("buyer", "seller")
        agents = team(model, "buyer", "seller", **({"loss": "cross_entropy"} if learns == "loss" else {}))
        dialogue = talk(agents, rounds=2, length=3)
        config = AgentsConfig(1, objective(share_context=share, clean_weight=0.5), order="together")
        run = _Run(agents, lambda *_, d=dialogue: d, config)
        own = run.objectives["buyer"]
        with agents["buyer"].acting(), oracle.KeepFloat64(aajr.Dual):
            payoff = None if learns == "loss" else PAYOFF
            batch = own.prepared(dialogue.batch("buyer"))
            terms, _ = run.terms(0, agents["buyer"], own, batch, payoff)
            terms.total.backward()
        assert ("shared" in terms.parts) == share
        results.append((terms, [p.grad for p in agents["buyer"].parameters()]))
    (one, gradients), (other, theirs) = results
    torch.testing.assert_close(one.total, other.total, rtol=1e-10, atol=0)
    for part in ("clean_loss", "adversarial_loss", "penalty"):
        torch.testing.assert_close(one.parts[part], other.parts[part], rtol=1e-10, atol=0)
    assert float(one.parts["penalty"]) > 0
    for g, h in zip(gradients, theirs):
        torch.testing.assert_close(g, h, rtol=1e-9, atol=1e-14)


def test_a_function_is_the_loss():
    """Its value and gradient, with the penalty of the objective beside it."""
    model = adapted("buyer", "seller")

    def squares(agent: Any, batch: Any) -> torch.Tensor:
        losses = agent.policy.loss_fn(batch.inputs, batch.labels, "mean")(batch.embedded(agent.policy))
        return losses.square().mean()

    agents = team(model, "buyer", "seller", loss=squares)
    seller, dialogue = agents["seller"], talk(agents)
    run = _Run(agents, lambda *_: dialogue, AgentsConfig(1, objective(), clip_norm=None))
    own = run.objectives["seller"]
    with seller.acting():
        terms, more = run.terms(0, seller, own, own.prepared(dialogue.batch("seller")), None)
        terms.total.backward()
        actual = [p.grad.clone() for p in seller.parameters()]
        model.zero_grad()
        penalty = own.penalty(dialogue.batch("seller"))
        z = model(input_ids=dialogue.ids).logits[:, :-1].transpose(1, 2)
        said = (dialogue.speakers == 1)[1:]
        losses = F.cross_entropy(z, dialogue.ids[:, 1:], reduction="none")[:, said].mean(-1)
        (losses.square().mean() + penalty.total).backward()
    assert more == {"own_loss": pytest.approx(float(losses.detach().square().mean()), rel=1e-10)}
    for p, g in zip(seller.parameters(), actual):
        torch.testing.assert_close(g, p.grad, rtol=1e-8, atol=1e-12)


def test_rows_have_one_weight_each():
    model = adapted("buyer", "seller")
    agents = team(model, "buyer", "seller")
    batch = talk(agents).batch("seller")
    with pytest.raises(ValueError, match=r"row_weights must be one number per row, shape \(3,\), got \(2,\)"):
        Objective(model, objective())(batch, row_weights=torch.ones(2))
    with pytest.raises(ValueError, match="weight must be a number where no loss"):
        Objective(model, ObjectiveConfig())(batch, row_weights=torch.ones(3))
