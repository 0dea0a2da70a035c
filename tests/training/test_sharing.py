"""A context that the objective shares: the objective without it, and where it is left out."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import pytest
import torch
from integrations.trainer.trainers import gpt2, llama
from torch import nn
from training.tiny_lm import quiet, tiny_lm

from aajr_kernels.method.sharing import start_of
from aajr_kernels.training import (
    Attack,
    Diagnostics,
    FitConfig,
    Objective,
    ObjectiveConfig,
    Penalty,
    Policy,
    policy_of,
)

pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
ROWS, LENGTH, START = 3, 12, 5
ATTACK = Attack(radius=0.5, steps=2, step_size=0.3, relative=True)
CONFIG = ObjectiveConfig(
    attack=ATTACK,
    penalty=Penalty(weight=0.2),
    adversarial_weight=0.7,
    clean_weight=0.3,
)


@functools.cache
def model() -> nn.Module:
    return gpt2().double().eval()


def batch(scored_from: int) -> dict[str, Any]:
    """Rows with different starts and a padded one; `scored_from` says where labels begin."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 30, (ROWS, LENGTH), generator=generator)
    places = torch.arange(LENGTH)
    attended = torch.ones(ROWS, LENGTH, dtype=torch.long)
    attended[1, -2:] = 0
    return {
        "input_ids": ids,
        "attention_mask": attended,
        "labels": ids.masked_fill(places < scored_from, -100),
        "attack_mask": (places >= torch.tensor([START, START + 2, START])[:, None]) & (places < LENGTH - 3),
    }


def measured(config: ObjectiveConfig, data: dict[str, Any], net: nn.Module, policy: Policy | None = None):
    objective = Objective(net, config, policy=policy)
    seen: list[Any] = []
    terms = objective(data, on_report=seen.append)
    trained = [p for p in net.parameters() if p.requires_grad]
    grads = torch.autograd.grad(terms.total, trained, allow_unused=True)
    return objective, terms.parts, [g for g in grads if g is not None], seen


@pytest.mark.parametrize(
    ("changes", "scored_from"),
    [
        ({}, START + 3),
        ({}, 0),  # labels of the context count as without
        (dict(penalty=Penalty(weight=0.2, steps="all", tokens="attention", gamma=0.01)), 0),
        (
            dict(
                attack=replace(ATTACK, scope="sequence"),
                penalty=Penalty(weight=0.2, form="hinge", gamma=0.01),
                adversarial_weight=0.0,
            ),
            0,
        ),
        (dict(penalty=Penalty("none"), clean_weight=0.0), START + 3),
        (dict(diagnostics=Diagnostics(1, smoothness=True)), 0),
    ],
    ids=["suffix", "all", "trajectory", "sequences", "no penalty", "diagnostics"],
)
@pytest.mark.parametrize("head", ["streamed", "logits"])
def test_values_and_gradients_are_those_of_the_whole(changes, scored_from, head):
    net, data, config = model(), batch(scored_from), replace(CONFIG, **changes)
    whole = policy_of(net)
    policy = whole
    if head == "logits":
        from aajr_kernels.integrations.transformers import shared_context

        forward = lambda x, **inputs: net(inputs_embeds=x, use_cache=False, **inputs)
        policy = Policy(forward, whole.embed, context=functools.partial(shared_context, net))
    _, parts, grads, reports = measured(replace(config, share_context=False), data, net, policy)
    objective, ours, partial, seen = measured(replace(config, share_context="auto"), data, net, policy)
    assert objective.sharing.reason is None
    assert float(ours.pop("shared")) == pytest.approx(START / LENGTH)
    assert {k: float(v) for k, v in ours.items()} == pytest.approx(
        {k: float(v) for k, v in parts.items()}, rel=1e-10
    )
    assert len(grads) == len(partial)
    for a, b in zip(partial, grads):
        assert float((a - b).norm()) <= 1e-11 * float(b.norm()) + 1e-14
    assert sum(float(g.norm()) for g in grads) > 0
    for a, b in zip(seen, reports, strict=True):
        assert a.summary() == pytest.approx(b.summary(), rel=1e-6, nan_ok=True)


def test_where_a_context_is_not_shared():
    """An eighth of the sequence for ``auto``; models and arguments that do not go with it, silently, with a reason."""
    data = batch(0)
    few = data | {"attack_mask": torch.arange(LENGTH).expand(ROWS, LENGTH) >= 1}
    for given, policy, config, expected in (
        (few, None, {}, None),
        (data, None, dict(penalty=Penalty(weight=0.2, rows=0.5)), None),
        (
            data | {"token_type_ids": torch.zeros(ROWS, LENGTH, dtype=torch.long)},
            None,
            {},
            "token_type_ids cannot be",
        ),
        (data, replace(policy_of(model()), context=None), {}, "policy must say how a context is shared"),
    ):
        objective, parts, _, _ = measured(replace(CONFIG, **config), given, model(), policy)
        assert "shared" not in parts
        assert objective.sharing.reason is None if expected is None else expected in objective.sharing.reason
    assert "shared" in measured(replace(CONFIG, share_context=True), few, model())[1]
    with pytest.raises(ValueError, match="token_type_ids cannot be split into a context and a suffix"):
        measured(
            replace(CONFIG, share_context=True), data | {"token_type_ids": data["input_ids"] * 0}, model()
        )
    with pytest.raises(ValueError, match="policy must say how a context is shared"):
        Objective(tiny_lm(), replace(CONFIG, share_context=True))(
            {"input_ids": data["input_ids"] % 13, "attack_mask": data["attack_mask"]}
        )


def test_a_batch_that_cannot_be_split_does_not_keep_the_next_from_it():
    """A training that resumes after it does the same as one that was never interrupted."""
    objective, data = Objective(model(), CONFIG), batch(0)
    packed = {name: value for name, value in data.items() if name != "attention_mask"}
    packed["position_ids"] = torch.arange(LENGTH).remainder(7).expand(ROWS, LENGTH)
    assert "shared" not in objective(packed).parts
    assert "packed sequences" in objective.sharing.reason
    assert "shared" in objective(data).parts


def test_where_a_context_ends():
    from aajr_kernels.training import prepared

    device = torch.device("cpu")
    ready = prepared(batch(0), device, True)
    assert start_of(ready) == START
    assert start_of(replace(ready, attackable=None)) == 0
    assert start_of(replace(ready, attackable=torch.zeros_like(ready.attackable))) == 0
    agents = torch.full((ROWS, LENGTH), -1)
    agents[:, 8:] = 0
    assert start_of(replace(ready, agents=agents)) == 8


def test_masks_are_read_once_and_known_of_a_suffix():
    from aajr_kernels.training import prepared

    device = torch.device("cpu")
    data = batch(0)
    agents = torch.zeros(ROWS, LENGTH, dtype=torch.long)
    agents[:, -1] = -1
    ready = prepared(data | {"agents": agents}, device, True)
    part = ready.suffix(START)
    for known in (ready, part, ready.to(device)):
        assert "masks" in vars(known)
        assert torch.equal(replace(known).masks, known.masks) and not bool(known.masks.all((1, 2)).any())
    learnt, attended, attackable = ready.masks
    assert torch.equal(learnt, ready.labels != -100)
    assert torch.equal(attended, data["attention_mask"] != 0)
    assert torch.equal(attackable, (data["attack_mask"] & attended) & (agents >= 0))


def test_bad_values():
    with pytest.raises(ValueError, match="share_context must be one of auto, got 'always'"):
        ObjectiveConfig(share_context="always")
    for penalty in (Penalty("spectral"), Penalty(rows=0.5)):
        with pytest.raises(
            ValueError, match="share_context=True goes with method='aligned' or 'none' and rows=1"
        ):
            ObjectiveConfig(share_context=True, penalty=penalty)


def test_the_report_says_what_was_computed(tmp_path, monkeypatch):
    pytest.importorskip("safetensors")
    monkeypatch.setattr("aajr_kernels.training.report._figure", lambda *_: False)
    net = gpt2()
    config = FitConfig(
        steps=2, objective=replace(CONFIG, penalty=Penalty(weight=0.2, steps="worst", every=2))
    )
    rows = quiet(net, [batch(0)], config, out=tmp_path / "shared").rows
    page = (tmp_path / "shared" / "report.md").read_text()
    assert [row["shared"] for row in rows] == pytest.approx([START / LENGTH] * 2)
    assert "2 had an attack and 1 a penalty." in page and f"{START / LENGTH:.1%} of the positions" in page
    forwards = [2 + 1 + 1 + 1, 2 + 1 + 1 + 1]  # attack, loss at its end, loss or penalty there, clean loss
    for row, count in zip(rows, forwards):
        computed = (START + count * (LENGTH - START)) / (count * LENGTH)
        assert row["computed_positions"] == pytest.approx(computed)
        assert 0 < row["computed_arithmetic"] < 1 and 0 < row["computed_tokens"] < 1
    for name, words in (("tokens", "the tokens in the head"), ("positions", "the positions of these")):
        assert f"{sum(r[f'computed_{name}'] for r in rows) / 2:.1%} of {words}" in page
    slow, fast = rows[1]["seconds"], rows[0]["seconds"]
    assert f"{slow:.3g} seconds, one without {fast:.3g}" in page
    assert f"with every=2 {(slow + fast) / 2 / slow:.2f} of the time" in page
    policy = replace(policy_of(net), context=None)
    quiet(net, [batch(0)], config, policy=policy, out=tmp_path / "whole")
    whole = (tmp_path / "whole" / "report.md").read_text()
    assert "A context was not shared: policy must say" in whole and "of the positions" not in whole


@pytest.mark.parametrize("kind", ["autocast", "checkpointing", "lora"])
def test_ways_of_training(kind):
    """bfloat16 within its rounding, activation checkpointing and adapters exactly."""
    net = llama() if kind == "autocast" else gpt2()
    if kind == "checkpointing":
        net.gradient_checkpointing_enable({"use_reentrant": False})
    if kind == "lora":
        peft = pytest.importorskip("peft")
        adapter = peft.LoraConfig(r=2, target_modules=["c_attn"], task_type="CAUSAL_LM", fan_in_fan_out=True)
        net = peft.get_peft_model(net, adapter)
    net = net.train() if kind == "autocast" else net.double().train()
    results = []
    for share in (False, True):
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
            results.append(measured(replace(CONFIG, share_context=share), batch(0), net))
    (_, parts, grads, _), (_, ours, partial, _) = results
    assert "shared" in ours
    limit = 0.05 if kind == "autocast" else 1e-6
    for name in ("clean_loss", "adversarial_loss", "penalty"):
        assert float(ours[name]) == pytest.approx(float(parts[name]), rel=4 * limit)
    a, b = (torch.cat([g.flatten() for g in some]).double() for some in (partial, grads))
    assert float((a - b).norm()) <= 4 * limit * float(b.norm())
