"""KL terms that are minimised, to the clean output and to a reference, under attack and as an anchor; plain PyTorch."""

from __future__ import annotations

import copy
import functools
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from assertions import assert_exact
from integrations.trainer.trainers import Rows, collate, gpt2, trained
from integrations.trainer.trainers import rows_of as rows_of_log
from torch import Tensor, nn
from training.test_losses import adapted
from training.test_sharing import START, batch, model
from training.tiny_lm import fit_config, quiet, sequences, tiny_lm, vector

from aajr_kernels import ascend
from aajr_kernels.integrations.transformers import shared_context
from aajr_kernels.testing import oracle
from aajr_kernels.training import (
    KL,
    Attack,
    CrossEntropy,
    Objective,
    ObjectiveConfig,
    Payoff,
    Penalty,
    Policy,
    Targeted,
    policy_of,
)

pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")

ATTACK = Attack(radius=1.0, relative=False, steps=2, step_size=0.6)
PLAIN = ObjectiveConfig(attack=ATTACK, penalty=Penalty("none"), adversarial_weight=0.7, clean_weight=0.3)
CASES = {
    "trades": replace(PLAIN, adversarial_loss=KL()),
    "trades with a penalty": replace(
        PLAIN, adversarial_loss=KL(), penalty=Penalty(weight=0.2, steps="worst")
    ),
    "both": replace(
        *(PLAIN,),
        adversarial_loss=KL(direction="reverse", tokens="attention"),
        anchor_weight=0.4,
        clean_weight=0.0,
    ),
    "reference": replace(PLAIN, adversarial_loss=KL("reference", "symmetric", "attention")),
    "anchor": replace(PLAIN, anchor=KL("reference", "reverse", "attention"), anchor_weight=0.4),
    "no attack": replace(PLAIN, attack=replace(ATTACK, radius=0.0), anchor_weight=0.4),
}
exact = partial(assert_exact, tolerance=1e-10, floor=1e-4)


@functools.cache
def frozen() -> nn.Module:
    return gpt2(seed=7).double().eval()


def divergences(loss: KL, z: Tensor, other: Tensor, masks: dict[str, Tensor]) -> Tensor:
    """The mean over the tokens, of logits; by log-softmax tensors of the vocabulary's size."""
    log_q, log_p = (torch.log_softmax(logits[masks[loss.tokens]], -1) for logits in (z, other))
    forward = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    reverse = (log_q.exp() * (log_q - log_p)).sum(-1).mean()
    return {"forward": forward, "reverse": reverse, "symmetric": forward + reverse}[loss.direction]


def by_hand(config: ObjectiveConfig, net: nn.Module, other: nn.Module, data: dict[str, Any]):
    """Parts and gradients of all parameters of the objective, of one batch, by plain PyTorch but for the ascent."""
    net, other = copy.deepcopy(net), copy.deepcopy(other)
    attended = data["attention_mask"] != 0
    labels = torch.cat([data["labels"][:, 1:], torch.full_like(data["labels"][:, :1], -100)], 1)
    labels = labels.masked_fill(~attended, -100)
    masks = {"loss": labels != -100, "attention": attended}
    call = lambda model, x: (
        model(inputs_embeds=x, attention_mask=data["attention_mask"], use_cache=False).logits
    )
    losses = lambda z: F.cross_entropy(z.transpose(1, 2), labels, reduction="none")
    x = net.get_input_embeddings()(data["input_ids"])
    parts, total = {}, torch.zeros((), dtype=torch.float64)
    z = call(net, x)
    with torch.no_grad():
        reference = call(other, other.get_input_embeddings()(data["input_ids"]))
    clean = losses(z)[masks["loss"]].mean()
    adversarial_weight, clean_weight = config.adversarial_weight, config.clean_weight
    if not config.attack.radius:
        adversarial_weight, clean_weight = 0.0, 1.0
    if adversarial_weight:
        trajectory = ascend(
            lambda x: losses(call(net, x)).sum(-1) / masks["loss"].sum(-1),
            x.detach(),
            **dict(radius=1.0, steps=2, step_size=0.6, scope="token", mask=data["attack_mask"] * attended),
            module=net,
        )
        point = trajectory.worst + (x - x.detach())
        attacked, loss = call(net, point), config.adversarial_loss
        if isinstance(loss, KL):
            value = divergences(loss, attacked, z if loss.to == "clean" else reference, masks)
        else:
            value = losses(attacked)[masks["loss"]].mean()
        parts["adversarial_loss"], total = value, total + adversarial_weight * value
        if config.penalty.method != "none":
            worst = trajectory.worst_steps
            direction = trajectory.directions[worst, torch.arange(len(worst))]
            with oracle.oracle_mode():
                primal, tangents = oracle.jvp(partial(call, net), point, direction.unsqueeze(0))
                q = oracle.metric_values(primal, tangents, "fisher")
                parts["penalty"] = oracle.mean_over_units(q, masks["loss"])
            total = total + config.penalty.weight * parts["penalty"]
    if clean_weight:
        parts["clean_loss"], total = clean, total + clean_weight * clean
    if config.anchor_weight:
        parts["anchor"] = divergences(config.anchor, z, reference, masks)
        total = total + config.anchor_weight * parts["anchor"]
    trained = {name: p for name, p in net.named_parameters() if p.requires_grad}
    return parts, dict(zip(trained, torch.autograd.grad(total, list(trained.values())), strict=True))


def rows_of(data: dict[str, Any], rows: slice) -> dict[str, Any]:
    return {name: value[rows] for name, value in data.items()}


def check(config, net: nn.Module, policy: Policy, other: nn.Module, data: dict[str, Any], is_shared: bool):
    """Micro-batches of one and of two rows against the whole batch by hand."""
    expected, gradients = by_hand(config, net, other, data)
    objective = Objective(net, replace(config, share_context=is_shared and "auto"), policy=policy)
    parts: dict[str, Any] = {}
    micro = [rows_of(data, slice(0, 1)), rows_of(data, slice(1, None))]
    counts, total = objective.counts(micro), 0.0
    for i, part in enumerate(micro):
        terms = objective(part, counts=counts, part=i)
        assert ("shared" in terms.parts) == (is_shared and config.attack.radius > 0)
        total = total + terms.total
        for name, value in terms.parts.items():
            parts[name] = parts.get(name, 0.0) + value
    assert objective.sharing.reason is None
    trained = {name: p for name, p in net.named_parameters() if p.requires_grad}
    ours = dict(zip(trained, torch.autograd.grad(total, list(trained.values())), strict=True))
    names = {"clean_loss", "adversarial_loss", "penalty", "anchor"}
    assert names & parts.keys() == expected.keys()
    for name, value in expected.items():
        exact(parts[name], value.detach(), name)
        assert float(value.detach()) > 1e-4
    for name, value in gradients.items():
        exact(ours[name], value, name)
    assert all(p.grad is None for model in (net, other) for p in model.parameters())


@pytest.mark.parametrize("is_shared", [False, True], ids=["whole", "shared"])
@pytest.mark.parametrize(
    ("case", "head"),
    [*((case, "streamed") for case in CASES), ("both", "logits"), ("reference", "logits")],
    ids=str,
)
def test_values_and_gradients_are_those_of_the_formula(case, head, is_shared):
    net, other = model(), frozen()
    if head == "streamed":
        policy = replace(policy_of(net), reference=policy_of(other))
    else:
        forward = lambda model, x, **inputs: model(inputs_embeds=x, use_cache=False, **inputs)
        policy = Policy(
            partial(forward, net),
            net.get_input_embeddings(),
            context=partial(shared_context, net),
            reference=Policy(partial(forward, other), other.get_input_embeddings()),
        )
    check(CASES[case], net, policy, other, batch(0), is_shared)


@pytest.mark.parametrize(("case", "scored_from"), [("both", 0), ("anchor", START + 3)])
def test_adapters_are_kept_near_the_model_without_them(case, scored_from):
    """Tokens of the context that have no label count as attended ones."""
    pytest.importorskip("peft")
    net = adapted().eval()
    base = copy.deepcopy(net).unload().eval()
    check(CASES[case], net, policy_of(net), base, batch(scored_from), True)


def test_both_sides_have_the_same_dropout_masks():
    net, data = tiny_lm(dropout=0.5).double().train(), sequences(1)[0]
    config = replace(PLAIN, attack=Attack(radius=1e-9, relative=False, steps=1), adversarial_loss=KL())
    torch.manual_seed(3)
    near = Objective(net, config)(data).parts
    assert float(near["adversarial_loss"]) < 1e-14
    torch.manual_seed(3)
    policy = policy_of(net)
    x, labels = net.embedding(data), torch.nn.functional.pad(data[:, 1:], (0, 1), value=-100)
    expected = policy.loss_fn({}, labels, "sum")(x).sum() / (labels != -100).sum()
    exact(near["clean_loss"], expected.detach(), "loss at the clean input, with these masks too")
    before = torch.get_rng_state()
    Objective(net, config)(data)
    assert not torch.equal(before, torch.get_rng_state())


def test_a_training_resumes_bit_by_bit_with_its_reference(tmp_path, monkeypatch):
    pytest.importorskip("safetensors")
    monkeypatch.setattr("aajr_kernels.training.report._figure", lambda *_: False)
    attack = Attack(radius=0.4, steps=2, step_size=0.2, init="uniform", loss=KL())
    options = dict(attack=attack, adversarial_loss=KL(), clean_weight=1.0, anchor_weight=0.5, accumulate=2)

    def trained(steps, folder):
        net, frozen = tiny_lm(dropout=0.2), tiny_lm(5).eval()
        before = vector(frozen)
        policy = replace(policy_of(net), reference=policy_of(frozen))
        config = fit_config(steps=steps, learning_rate=1e-2, checkpoint_every=2, **options)
        rows = quiet(net, sequences(3), config, policy=policy, out=tmp_path / folder).rows
        assert torch.equal(vector(frozen), before) and not frozen.training
        return vector(net), rows

    expected, rows = trained(4, "whole")
    trained(2, "parts")
    ours, again = trained(4, "parts")
    assert torch.equal(ours, expected)
    assert [row["anchor"] for row in again] == [row["anchor"] for row in rows]
    assert all(row["anchor"] > 0 and row["adversarial_loss"] > 0 for row in rows)
    total = [row["clean_loss"] + row["adversarial_loss"] + 0.5 * row["anchor"] for row in rows]
    weighted = [row["weight"] * (row.get("penalty") or 0.0) for row in rows]
    assert [row["loss"] for row in rows] == pytest.approx([a + b for a, b in zip(total, weighted)], rel=1e-5)
    assert "| anchor |" in (tmp_path / "parts" / "report.md").read_text()


def test_the_trainer_takes_them(tmp_path):
    """Micro-batches of unequal lengths in ``transformers.Trainer``: the adapters' gradients are those of one batch."""
    pytest.importorskip("accelerate")
    pytest.importorskip("peft")
    from aajr_kernels.integrations.trainer import AAJRTrainer

    config = replace(CASES["trades with a penalty"], anchor_weight=0.4, seed=11)
    net = adapted()
    for module in net.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # masks depend on the micro-batch
    objective = Objective(copy.deepcopy(net).train(), config)
    terms = objective(collate(list(Rows())))
    terms.total.backward()
    ways = dict(per_device_train_batch_size=1, gradient_accumulation_steps=4, objective=config)
    trainer, (actual,) = trained(AAJRTrainer, net, tmp_path, **ways)
    expected = {name: p.grad for name, p in objective.model.named_parameters() if p.requires_grad}
    assert actual.keys() == expected.keys()
    for name, gradient in actual.items():
        exact(gradient, expected[name], name)
    (row,) = rows_of_log(trainer)
    for part in ("adversarial_loss", "clean_loss", "penalty", "anchor"):
        assert row[part] == pytest.approx(float(terms.parts[part]), rel=1e-6), part
        assert row[part] > 1e-4


BAD = {
    "kind": (
        dict(adversarial_loss=Targeted()),
        TypeError,
        r"adversarial_loss must be CrossEntropy\(\), KL\(\) .* got Targeted",
    ),
    "class": (
        dict(adversarial_loss=KL),
        TypeError,
        r"adversarial_loss must be CrossEntropy\(\), .* got KL: other losses",
    ),
    "name": (
        dict(anchor="reference", anchor_weight=1.0),
        TypeError,
        r"anchor must be KL\('reference'\), got str",
    ),
    "payoff": (
        dict(anchor=Payoff(len), anchor_weight=1.0),
        TypeError,
        r"anchor must be KL\('reference'\), got Payoff",
    ),
    "clean": (dict(anchor=KL()), ValueError, r"anchor must be KL\('reference'\), got KL\(to='clean'"),
    "weight": (
        dict(anchor_weight=-1.0),
        ValueError,
        "anchor_weight must be finite and >= 0 at every step, got -1.0",
    ),
    "constant": (
        dict(adversarial_loss=KL(), clean_weight=0.0),
        ValueError,
        r"clean_weight must be positive with adversarial_loss=KL\(to='clean'.*TRADES has clean_weight=1",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    changes, error, message = BAD[case]
    with pytest.raises(error, match=message):
        replace(PLAIN, **changes)


def test_a_reference_is_missing():
    for changes in (dict(anchor_weight=0.1), dict(adversarial_loss=KL("reference"))):
        with pytest.raises(ValueError, match="policy must have a reference for KL.*policy_of.frozen_model"):
            Objective(tiny_lm(), replace(PLAIN, **changes))
    Objective(tiny_lm(), replace(PLAIN, adversarial_loss=CrossEntropy(), anchor_weight=0.0))
