"""Attacks inside a model in training: the objective against hooks on the plain model, and what goes with it."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from assertions import assert_exact
from integrations.distributed.processes import needs_gloo
from integrations.trainer.trainers import Rows, adapted_gpt2, arguments, collate, gpt2, quiet
from integrations.transformers.by_hand import ByHand
from torch import Tensor, nn
from training.test_sharing import LENGTH, START, batch, measured, model
from training.tiny_lm import TinyLM, fit_config, sequences, tiny_lm
from training.tiny_lm import quiet as quiet_fit

from aajr_kernels import ascend
from aajr_kernels.testing import oracle
from aajr_kernels.training import (
    KL,
    Attack,
    Constraint,
    Diagnostics,
    Objective,
    ObjectiveConfig,
    Payoff,
    Penalty,
    Targeted,
    fit_agents,
    policy_of,
    randomness,
)
from aajr_kernels.training.config import describe

pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")

CPU = torch.device("cpu")
INSIDE, FIRST, SECOND = "transformer.h.0.attn.c_attn", "transformer.h.0", "transformer.h.1"
ATTACK = Attack(radius=0.5, steps=2, step_size=0.3, at=[INSIDE, 1])
CONFIG = ObjectiveConfig(
    attack=ATTACK,
    penalty=Penalty(weight=0.2, steps="all"),
    adversarial_weight=0.7,
    clean_weight=0.3,
    share_context=False,
)


# -- against hooks ----------------------------------------------------------------------------------------------------


def by_hand(net: nn.Module, data: dict[str, Any], config: ObjectiveConfig, names: tuple[str, ...]) -> Any:
    """Parts and gradients of the objective, with an ascent, losses and a penalty written out in float64."""
    attended, attack = data["attention_mask"].bool(), config.attack
    open_ = data["attack_mask"] & attended
    labels = F.pad(data["labels"][:, 1:], (0, 1), value=-100).masked_fill(~attended, -100)
    parameters = [p for p in net.parameters() if p.requires_grad]
    with oracle.oracle_mode(float64=True):
        x = net.transformer.wte(data["input_ids"])
        func = ByHand(net, names, x, open_, attention_mask=data["attention_mask"])
        units = func.units
        if not attack.relative:
            func.units = units = [torch.ones_like(u) for u in units]

        def sums(delta: Tensor) -> Tensor:
            z = func(delta)
            return (
                F.cross_entropy(z.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="none")
                .reshape(labels.shape)
                .sum(-1)
            )

        count, tokens = (labels != -100).sum(-1), int((labels != -100).sum())
        width = max(func.widths)
        allowed = torch.cat([open_[..., None] & (torch.arange(width) < w) for w in func.widths], 1).double()

        def lengths(v: Tensor) -> Tensor:
            """Norms of every token at every place, or of every place."""
            if attack.scope == "agent":
                whole = v.unflatten(1, (len(names), LENGTH)).flatten(2).norm(dim=-1)
                return whole.repeat_interleave(LENGTH, 1).unsqueeze(-1)
            return v.norm(dim=-1, keepdim=True)

        delta = torch.zeros(*open_.shape[:1], len(names) * LENGTH, width, dtype=torch.float64)
        points, directions, losses = [delta], [], []
        for step in range(attack.steps + 1):
            point = points[-1].clone().requires_grad_()
            values = sums(point) / count
            losses.append(values.detach())
            if step == attack.steps:
                break
            (slope,) = torch.autograd.grad(values.sum(), point)
            slope = slope * allowed
            directions.append(slope / lengths(slope).clamp_min(1e-300))
            moved = points[-1] + attack.step_size * directions[-1]
            points.append(moved * (attack.radius / lengths(moved).clamp_min(1e-300)).clamp(max=1))
        worst = torch.stack(losses).argmax(0)
        at_worst = torch.stack(points)[worst, torch.arange(len(worst))]
        clean, adversarial = sums(delta).sum() / tokens, sums(at_worst).sum() / tokens
        if config.adversarial_loss == KL():
            kept, moved = func(delta).log_softmax(-1), func(at_worst).log_softmax(-1)
            adversarial = (kept.exp() * (kept - moved)).sum(-1)[labels != -100].sum() / tokens
        penalties = []
        for point, along in zip(points, directions):
            tangents = along.unsqueeze(0)
            if config.penalty.per_agent:
                place = torch.arange(len(names)).repeat_interleave(LENGTH)[:, None]
                tangents = torch.stack([along * (place == i) for i in range(len(names))])
            z, z_tan = oracle.jvp(func, point, tangents)
            q = oracle.metric_values(z, z_tan, "fisher")
            included = q * (labels != -100)
            over = q.shape[0] * (tokens if config.unit == "token" else len(count))
            penalties.append(included.sum() / over)
        penalty = torch.stack(penalties).mean()
        total = config.clean_weight * clean + config.adversarial_weight * adversarial
        gradients = torch.autograd.grad(
            total + config.penalty.weight * penalty, parameters, allow_unused=True
        )
    parts = {
        "clean_loss": clean,
        "adversarial_loss": adversarial,
        "penalty": penalty,
        "attack_start": losses[0].mean(),
        "attack_worst": torch.stack(losses).amax(0).mean(),
    }
    return {name: part.detach() for name, part in parts.items()}, [g for g in gradients if g is not None]


@pytest.mark.parametrize(
    ("at", "names", "changes"),
    [
        (-1, (SECOND,), {}),
        (-1, (SECOND,), dict(adversarial_loss=KL(), share_context=True)),
        ([INSIDE, 1], (INSIDE, SECOND), dict(share_context=True)),
        (
            ["embedding", 0],
            ("embedding", FIRST),
            dict(attack=dict(relative=False, radius=0.2, step_size=0.15)),
        ),
        (
            "transformer.h",
            (FIRST, SECOND),
            dict(
                attack=dict(scope="agent", radius=1.5, step_size=0.8),
                penalty=Penalty(weight=0.2, steps="all", per_agent=True, batch_steps=2),
                share_context="auto",
            ),
        ),
    ],
    ids=["layer", "divergence under attack", "several", "embedding too", "places as agents"],
)
def test_losses_penalty_and_gradients(at, names, changes):
    attack = replace(ATTACK, at=at, **changes.get("attack", {}))
    config = replace(CONFIG, **changes | {"attack": attack})
    data = batch(START + 3)
    _, parts, gradients, _ = measured(config, data, model())
    expected, slopes = by_hand(model(), data, config, names)
    assert ("shared" in parts) == (config.share_context is not False)
    assert expected["penalty"] > 1e-4 and expected["attack_worst"] > expected["attack_start"] + 1e-2
    for name, value in expected.items():
        assert float(parts[name]) == pytest.approx(float(value), rel=1e-10), name
    for i, (got, slope) in enumerate(zip(gradients, slopes, strict=True)):
        assert_exact(got, slope, str(i), tolerance=1e-10, floor=1e-4)


@pytest.mark.parametrize(
    "loss",
    [Targeted(1.0, away=0.5), KL(), KL("reference"), Payoff(lambda z, _: z[..., 2].sum(-1))],
    ids=["targeted", "KL from the clean output", "KL from the reference", "payoff"],
)
def test_losses_of_the_adversary(loss):
    """An ascent on what the hooks see."""
    net, reference, data = model(), gpt2(seed=7).double().eval(), batch(START + 3)
    wanted = torch.full_like(data["labels"], -100)
    wanted[:, START + 2 :] = 4
    attack = replace(ATTACK, init="uniform", loss=loss)
    config = replace(CONFIG, attack=attack, penalty=Penalty("none"), share_context="auto")
    policy = replace(policy_of(net), reference=policy_of(reference))
    objective = Objective(net, config, policy=policy)
    ready = objective.prepared(data | {"attack_labels": wanted})
    terms = objective(ready)
    x = net.transformer.wte(data["input_ids"]).detach()
    inputs, open_ = {"attention_mask": data["attention_mask"]}, ready.attackable
    with torch.no_grad():
        func = ByHand(net, (INSIDE, SECOND), x, open_, **inputs)
        start = START if "shared" in terms.parts else 0
        zeros = torch.zeros(len(x), 2 * LENGTH, 48, dtype=torch.float64)
        other = (
            func(zeros)
            if loss == KL()
            else reference(inputs_embeds=reference.transformer.wte(data["input_ids"]), **inputs).logits
        )

    def mean(labels: Tensor, z: Tensor) -> Tensor:
        nll = F.cross_entropy(z.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="none")
        return nll.reshape(labels.shape).sum(-1) / (labels != -100).sum(-1)

    def losses(delta: Tensor) -> Tensor:
        # draws were of the tokens behind the context
        padded = F.pad(delta.unflatten(1, (2, -1)), (0, 0, start, 0)).flatten(1, 2)
        z = func(padded)
        if isinstance(loss, Payoff):
            return z[..., 2].sum(-1)
        if isinstance(loss, Targeted):
            return 0.5 * mean(ready.labels, z) - mean(ready.attack_labels, z)
        learnt = ready.labels != -100
        each = (other.softmax(-1) * (other.log_softmax(-1) - z.log_softmax(-1))).sum(-1)
        return (each * learnt).sum(-1) / learnt.sum(-1)

    open_ = open_[:, start:].repeat(1, 2)
    channels = (torch.arange(48) < torch.tensor([48, 16])[:, None]).repeat_interleave(LENGTH - start, 0)
    options = dict(radius=0.5, steps=2, step_size=0.3, scope="token", init="uniform")
    draws = randomness.generator_for(0, 0, 0, CPU)
    mask = open_.unsqueeze(-1) & channels
    traj = ascend(
        losses,
        zeros.unflatten(1, (2, LENGTH))[:, :, start:].flatten(1, 2),
        mask=mask,
        generator=draws,
        module=net,
        **options,
    )
    assert start == (0 if isinstance(loss, Payoff) else START)
    assert float(terms.parts["attack_start"]) == pytest.approx(float(traj.losses[0].mean()), rel=1e-10)
    assert float(terms.parts["attack_worst"]) == pytest.approx(float(traj.worst_loss.mean()), rel=1e-10)


# -- what goes with it ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "penalty",
    [
        Penalty(weight=0.2, steps="worst"),
        Penalty("cure", weight=0.2, steps="worst"),
    ],
    ids=lambda penalty: penalty.method,
)
def test_rows_that_are_drawn(penalty):
    """Of two rows that are the same, whichever: half of the penalty over a half."""
    data = {name: value[:1].repeat(2, 1) for name, value in batch(START + 3).items()}
    for weight in (0.7, 0.0):
        config = replace(CONFIG, penalty=penalty, adversarial_weight=weight)
        _, whole, expected, _ = measured(config, data, model())
        config = replace(config, penalty=replace(penalty, rows=0.5))
        _, parts, gradients, _ = measured(config, data, model())
        assert (
            float(parts["penalty"]) == pytest.approx(float(whole["penalty"]), rel=1e-9)
            and whole["penalty"] > 0
        )
        for got, slope in zip(gradients, expected, strict=True):
            assert_exact(got, slope, penalty.method, tolerance=1e-9, floor=1e-4)
        if weight:
            loss = float(whole["adversarial_loss"])
            assert float(parts["adversarial_loss"]) == pytest.approx(loss, rel=1e-10)


def test_reports_and_constraints_with_a_context_are_those_without():
    penalty = Constraint(gamma="auto", step_size=0.1, weight=1.0, window=2, follow="validation")
    results = []
    for mode in (False, True):
        config = replace(CONFIG, penalty=penalty, diagnostics=Diagnostics(2, smoothness=True, nearby=0.1))
        objective, reports = Objective(model(), replace(config, share_context=mode)), []
        for step in range(2):
            objective.measure(batch(START + 3), step=step)
            terms = objective(batch(START + 3), step=step, on_report=reports.append)
        assert objective.multiplier.facts["second_order"] > 0 and reports[0].summary()
        results.append(
            ({**objective.multiplier.facts, "loss": float(terms.total.detach())}, reports[0].summary())
        )
    (facts, summary), (shared_facts, shared_summary) = results
    assert shared_facts == pytest.approx(facts, rel=1e-6)
    # a second start is drawn for the tokens behind the context only
    drawn = {name for name in summary if "expansion" in name}
    for values in (summary, shared_summary):
        assert all(values.pop(name) >= 0 for name in drawn)
    assert shared_summary == pytest.approx(summary, rel=1e-6, nan_ok=True)


def test_without_an_attack_the_places_stay_closed():
    config = replace(CONFIG, attack=replace(ATTACK, radius=0.0))
    _, parts, _, _ = measured(config, batch(START + 3), model())
    _, expected, _, _ = measured(replace(config, attack=Attack(radius=0.0)), batch(START + 3), model())
    assert float(parts["clean_loss"]) == float(expected["clean_loss"]) and "penalty" not in parts


def test_places_of_the_policy_and_of_the_attack():
    data = batch(START + 3)
    for at, given, expected in ((None, -1, -1), (0, -1, 0), ("embedding", -1, "embedding")):
        policy = policy_of(model(), at=given)
        _, parts, _, _ = measured(replace(CONFIG, attack=replace(ATTACK, at=at)), data, model(), policy)
        _, same, _, _ = measured(replace(CONFIG, attack=replace(ATTACK, at=expected)), data, model())
        assert float(parts["attack_worst"]) == float(same["attack_worst"])
    assert ATTACK.at == (INSIDE, 1) and describe(ATTACK)["at"] == [INSIDE, 1]
    assert hash(ATTACK) == hash(replace(ATTACK, at=(INSIDE, 1)))


def test_fit_goes_on_bit_by_bit(tmp_path, monkeypatch):
    """With dropout below and above the place, random starts and rows."""
    monkeypatch.setattr("aajr_kernels.training.report._figure", lambda *_: False)
    attack = Attack(radius=0.5, steps=2, init="uniform", at="up")
    penalty = Penalty(weight=0.2, rows=0.5)
    options = dict(attack=attack, penalty=penalty, learning_rate=1e-2, accumulate=2, checkpoint_every=2)
    data, whole, parts = sequences(6), tiny_lm(dropout=0.2), tiny_lm(dropout=0.2)
    expected = quiet_fit(whole, data, fit_config(steps=3, **options))
    for steps in (2, 3):
        result = quiet_fit(parts, data, fit_config(steps=steps, **options), out=tmp_path)
        if steps == 2:
            parts = tiny_lm(seed=9, dropout=0.2)
    assert result.resumed_from == 2
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), parts.parameters(), strict=True))
    assert result.rows[-1]["attack_worst"] == expected.rows[-1]["attack_worst"]
    assert expected.rows[0]["attack_worst"] > expected.rows[0]["attack_start"]


def test_adapters():
    net = adapted_gpt2().double().eval()
    _, parts, gradients, _ = measured(CONFIG, batch(START + 3), net)
    plain = net.get_base_model()
    names = ("transformer.h.0.attn.c_attn", SECOND)
    expected, slopes = by_hand(plain, batch(START + 3), CONFIG, names)
    assert float(parts["penalty"]) == pytest.approx(float(expected["penalty"]), rel=1e-10)
    for got, slope in zip(gradients, slopes, strict=True):
        assert_exact(got, slope, "adapters", tolerance=1e-10, floor=1e-4)


def test_agents_with_adapters_on_one_model():
    """The perturbation is inside the shared model, and updates reach the learner's own adapter only."""
    pytest.importorskip("peft")
    from training.talkers import adapted, config_of, objective, played, team

    net = adapted("buyer", "seller")
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    inside = objective(attack=Attack(radius=0.3, steps=2, step_size=0.2, at=1))
    config = config_of(1, objective=inside, learners=["seller"])
    agents = team(net, "buyer", "seller", loss="cross_entropy")
    result = fit_agents(agents, played(), config, progress=False)
    changed = {name.split(".")[-2] for name, p in net.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {"seller"}
    (row,) = result.rows
    assert row["attack_worst"] > row["attack_start"] and row["penalty"] > 0


def test_trainer(tmp_path):
    pytest.importorskip("accelerate")
    from aajr_kernels.integrations.trainer import AAJRTrainer

    options = dict(train_dataset=Rows(), data_collator=collate, objective=CONFIG)
    net = gpt2().double()
    trainer = quiet(AAJRTrainer, net, arguments(tmp_path), **options)
    inputs = collate([Rows()[0], Rows()[1]])
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, inputs)
    expected = Objective(copy.deepcopy(net), replace(CONFIG, seed=11))(inputs)
    assert float(loss.detach()) == pytest.approx(float(expected.total.detach()), rel=1e-12)
    wrong = replace(CONFIG, attack=replace(ATTACK, at="layers.9"))
    with pytest.raises(ValueError, match=r"must name a module of GPT2LMHeadModel, got 'layers\.9'"):
        quiet(AAJRTrainer, net, arguments(tmp_path), **options | {"objective": wrong})


@needs_gloo
def test_several_processes():
    distributed = torch.distributed
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        config, data = replace(CONFIG, attack=replace(ATTACK, at="up")), sequences(1)[0]
        ours = tiny_lm().double()
        whole = copy.deepcopy(ours)
        wrapped = nn.parallel.DistributedDataParallel(ours)
        for net in (whole, wrapped):
            Objective(net, config)(data).total.backward()
        for a, b in zip(ours.parameters(), whole.parameters(), strict=True):
            assert_exact(a.grad, b.grad, "gradient", tolerance=1e-12, floor=1e-4)
        torch.distributed.fsdp.fully_shard(sharded := tiny_lm())
        with pytest.raises(NotImplementedError, match="up must be in a model whose parameters are whole"):
            Objective(sharded, config)(data)
    finally:
        distributed.destroy_process_group()


# -- bad input --------------------------------------------------------------------------------------------------------


class Odd(TinyLM):
    """Has a layer that returns zeros, or NaN."""

    def __init__(self) -> None:
        super().__init__()
        self.zeros, self.nan = nn.Linear(6, 6), nn.Identity()
        nn.init.zeros_(self.zeros.weight)
        nn.init.zeros_(self.zeros.bias)

    def forward(self, inputs_embeds: Tensor, attention_mask: Any = None) -> Tensor:
        broken = self.nan(inputs_embeds * torch.nan)
        return super().forward(inputs_embeds + self.zeros(inputs_embeds), attention_mask) + 0 * len(broken)


@pytest.mark.parametrize(
    ("attack", "error", "message"),
    [
        (
            dict(at="zeros"),
            ValueError,
            r"other than zeros .* got norms \[0\.0\]: set Attack\(relative=False\)",
        ),
        (dict(at="nan"), ValueError, r"what the attacked places return are \[nan\]: check the embedding"),
        (
            dict(at=["mix", "up"], norm="linf"),
            ValueError,
            r"must be 'l2' at places of several widths \(6, 8\)",
        ),
        (dict(at="upp"), ValueError, "must name a module of Odd, got 'upp'; the nearest names are up"),
    ],
)
def test_places_that_cannot_be_attacked(attack, error, message):
    config = replace(CONFIG, attack=Attack(steps=1, **attack))
    with pytest.raises(error, match=message):
        Objective(Odd(), config)(sequences(1)[0])


@pytest.mark.parametrize(
    ("at", "error", "message"),
    [
        ([], ValueError, "at least one place, got an empty list"),
        (1.5, TypeError, "or a sequence of these, got float"),
        ([True], TypeError, "or a sequence of these, got bool"),
    ],
)
def test_arguments_that_name_no_place(at, error, message):
    with pytest.raises(error, match=message):
        Attack(at=at)


def test_a_place_of_zeros_in_its_own_units():
    config = replace(CONFIG, attack=Attack(steps=1, at="zeros", relative=False))
    parts = Objective(Odd(), config)(sequences(1)[0]).parts
    assert parts["attack_worst"] > parts["attack_start"]
