"""Agents with adapters on one base, and with models of their own: whose gradients, dialogues, updates, resume."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from integrations.transformers.subjects import tiny
from training.talkers import NAMES, TWO, adapted, config_of, objective, of_tokens, opened, played, team

from aajr_kernels.integrations.transformers import adapter_agent
from aajr_kernels.method.agents import Agent, Agents
from aajr_kernels.method.dialogue import Dialogue, play, positions, sampled
from aajr_kernels.training import (
    AgentsConfig,
    Attack,
    Constraint,
    Diagnostics,
    Experience,
    Linear,
    Penalty,
    fit_agents,
    policy_of,
)
from aajr_kernels.training.agents import _Run

pytest.importorskip("transformers")
pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # read by peft


# -- dialogues ------------------------------------------------------------------------------------------------------
def test_a_view_has_own_labels_and_the_turns_of_others_as_observations():
    ids = torch.arange(10, 18).reshape(2, 4)
    dialogue = (
        Dialogue.opened(("a", "b", "c"), {"b": torch.tensor([[1], [2]])}, torch.tensor([[5], [6]]))
        .said("a", ids)
        .said("b", ids + 10, torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]))
        .said("c", ids + 20)
        .said("b", ids)
        .said("a", ids)
    )
    batch = dialogue.batch("b")
    assert batch["input_ids"][0].tolist() == [
        1,
        5,
        *range(10, 14),
        *range(20, 24),
        *range(30, 34),
        *range(10, 14),
    ]
    assert batch["labels"][1].tolist() == [*6 * [-100], 24, 25, -100, -100, *4 * [-100], *range(14, 18)]
    assert batch["attention_mask"][1].tolist() == [*8 * [1], 0, 0, *8 * [1]]
    assert batch["attack_mask"][1].tolist() == [0, 0, *4 * [1], *4 * [0], *4 * [1], *4 * [0]]
    assert batch["agents"][0].tolist() == [-1, -1, *4 * [0], *4 * [-1], *4 * [2], *4 * [-1]]
    assert batch["position_ids"][1].tolist() == [*range(8), 7, 7, *range(8, 16)]
    only_c = dialogue.batch("b", observed=["c"])
    assert only_c["attack_mask"][0].tolist() == [*10 * [0], *4 * [1], *4 * [0]]
    first = Dialogue.opened(("a", "b")).said("a", ids).said("b", ids)  # what b said came after all of a's
    assert torch.equal(first.batch("a")["input_ids"], ids) and not first.batch("a")["attack_mask"].any()
    assert "position_ids" not in first.batch("a")


def test_padding_within_a_view_changes_no_loss():
    """The tokens of a row with a padded turn have the losses that they have without the padding."""
    model = tiny("llama").double()
    policy = policy_of(model)
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randint(4, 60, (1, 4), generator=generator) for _ in range(2))
    kept = torch.tensor([[1, 1, 0, 0]])

    def losses(dialogue: Dialogue) -> torch.Tensor:
        batch = dialogue.batch("b")
        labels = torch.cat([batch.pop("labels")[:, 1:], torch.tensor([[-100]])], 1)
        more = {name: batch[name] for name in ("attention_mask", "position_ids") if name in batch}
        return policy.loss_fn(more, labels, "sum")(policy.embed(batch["input_ids"]))

    start = Dialogue.opened(("a", "b"), None, first)
    padded = losses(start.said("b", second, kept).said("a", first).said("b", second))
    whole = losses(start.said("b", second[:, :2]).said("a", first).said("b", second))
    # the first label after the padding is predicted from a padding token in the shifted labels, of neither
    torch.testing.assert_close(padded, whole, rtol=1e-12, atol=0)


def test_generate_says_what_greedy_sampling_says():
    model = adapted("buyer")
    agent = adapter_agent(model, "buyer", generate={"do_sample": False})
    ids = torch.randint(4, 60, (2, 7), generator=torch.Generator().manual_seed(3))
    attended = torch.tensor([[True] * 7, [True, True, False, False, True, True, False]])
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad(), agent.acting():
        by_generate, mask = agent.speak(agent, ids, attended, 5, generator)
        by_sampling, _ = sampled(agent, ids, attended, 5, generator, temperature=0)
    assert torch.equal(by_generate, by_sampling) and mask.all()


def test_an_end_ends_a_turn():
    model = adapted("buyer")
    agent = adapter_agent(model, "buyer")
    ids = torch.randint(4, 60, (16, 4), generator=torch.Generator().manual_seed(3))
    attended, generator = torch.ones_like(ids, dtype=torch.bool), torch.Generator().manual_seed(0)
    with torch.no_grad(), agent.acting():
        free, _ = sampled(agent, ids, attended, 6, torch.Generator().manual_seed(0))
        end = int(free[0, 1])
        said, mask = sampled(agent, ids, attended, 6, generator, end=end)
        model.generation_config.eos_token_id = end
        generated, generated_mask = agent.speak(agent, ids, attended, 6, generator)
    for row, kept in [*zip(said, mask), *zip(generated, generated_mask)]:
        length = int(kept.sum())
        assert kept[:length].all() and end not in row[: length - 1].tolist()
        assert length == len(row) or row[length - 1] == end
    assert mask[0].sum() == 2


# -- whose gradients ------------------------------------------------------------------------------------------------
def test_gradients_reach_the_own_adapter_only():
    model = adapted("buyer", "seller")
    agents = team(model, "buyer", "seller", loss="cross_entropy")
    dialogue = played()(agents, torch.Generator().manual_seed(0))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    run = _Run(agents, lambda *_: dialogue, AgentsConfig(2, objective(), order="together", clip_norm=None))
    reached: dict[str, Any] = {}
    for name in ("buyer", "seller"):
        with agents[name].acting():
            terms = run.objectives[name](dialogue.batch(name))
            terms.total.backward()
        reached[name] = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
        assert reached[name] and all(f".{name}." in key for key in reached[name])
        assert all(float(g.abs().max()) > 0 for g in reached[name].values())
        model.zero_grad()
    assert flags == {name: p.requires_grad for name, p in model.named_parameters()}
    # the same as of a model that has this adapter and no other
    for name, gradients in reached.items():
        single = adapted("buyer", "seller")
        single.set_adapter(name)
        single.delete_adapter("seller" if name == "buyer" else "buyer")
        own = run.objectives[name]
        alone = type(own)(single, own.config)
        alone(dialogue.batch(name)).total.backward()
        theirs = {key: p.grad for key, p in single.named_parameters() if p.grad is not None}
        assert set(theirs) == set(gradients)
        for key in theirs:
            torch.testing.assert_close(gradients[key], theirs[key], rtol=1e-10, atol=1e-14)
    rows = run.step(0)
    assert [row["agent"] for row in rows] == ["buyer", "seller"]
    moved = {key for key, p in model.named_parameters() if not torch.equal(p, before[key])}
    assert moved == {key for key in before if "lora" in key}


def test_an_adapter_may_be_called_as_a_part_of_the_model():
    model = adapted("layers", "self_attn")
    for name in ("layers", "self_attn"):
        agent = adapter_agent(model, name, loss="cross_entropy")
        own = {id(p) for p in agent.parameters()}
        named = [key for key, p in model.named_parameters() if id(p) in own]
        assert len(named) == 8 and all(key.endswith(f".{name}.weight") for key in named)
    assert model.active_adapter == "layers"


def test_observations_of_each_agent_have_a_ball_and_a_tangent():
    model = adapted(*NAMES)
    agents = team(model, *NAMES, loss="cross_entropy")
    dialogue = played()(agents, torch.Generator().manual_seed(0))
    attack = Attack(radius=0.3, steps=2, step_size=0.2, scope="agent")
    config = objective(
        attack=attack, penalty=Penalty(weight=0.1, steps="last", per_agent=True, unit="sequence")
    )
    run = _Run(agents, lambda *_: dialogue, AgentsConfig(1, config))
    with agents["judge"].acting():
        each = run.objectives["judge"](dialogue.batch("judge")).parts["penalty"]
        one = run.objectives["judge"](dialogue.batch("judge", observed=["buyer"])).parts["penalty"]
    assert float(each) > 0 and float(one) > 0 and float(each) != pytest.approx(float(one))


# -- training -------------------------------------------------------------------------------------------------------
def test_three_agents_talk_for_three_rounds_and_learn_in_turn():
    model = adapted(*NAMES)
    agents = team(model, *NAMES, payoff=lambda dialogue: dialogue.ids.double().mean(-1))  # differs among rows
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    result = fit_agents(agents, played(rounds=3, length=2), config_of(3), progress=False)
    assert [row["agent"] for row in result.rows] == list(NAMES)
    assert all(row["gradient_norm"] > 0 for row in result.rows)
    assert all({"adversarial_loss", "payoff", "attack_worst", "penalty"} <= set(row) for row in result.rows)
    assert model.active_adapter == "buyer"
    changed = {key.split(".")[-2] for key, p in model.named_parameters() if not torch.equal(p, before[key])}
    assert changed == set(NAMES)


def test_a_payoff_is_learnt():
    """Two models are paid for tokens of the lower half of the vocabulary, which is half of what they say at first."""
    half = tiny("llama").config.vocab_size // 2
    paid = lambda dialogue: (dialogue.ids[:, dialogue.speakers >= 0] < half).double().mean(-1)
    agents = Agents([Agent(name, policy_of(m), m, paid) for name in ("a", "b") for m in [tiny("llama")]])
    options = dict(order="together", learning_rate=0.01, advantage="standardised")
    config = config_of(12, objective=objective(attack=Attack(radius=0.0)), **options)
    many = lambda team, generator: play(team, opened(team.names, 32), rounds=1, length=3, generator=generator)
    result = fit_agents(agents, many, config, progress=False)
    payoffs = [row["payoff"] for row in result.rows if row["agent"] == "a"]
    assert sum(payoffs[-3:]) / 3 > sum(payoffs[:3]) / 3 + 0.2, payoffs


def test_self_play_of_one_model():
    """One model plays both sides: what the opponent says is observed, what the learner says is learnt."""
    model = tiny("llama").double()
    policy = policy_of(model)
    own = Agent("self", policy, model, lambda dialogue: dialogue.ids.double().mean(-1))
    agents = Agents([Agent("other", policy, model, own_parameters=list), own])
    before = [p.detach().clone() for p in model.parameters()]
    result = fit_agents(agents, played(), config_of(2, learners=["self"]), progress=False)
    assert [row["agent"] for row in result.rows] == ["self"] * 2
    assert all(p.requires_grad and not torch.equal(p, old) for p, old in zip(model.parameters(), before))


def test_updates_in_a_row_have_schedules_of_their_own():
    """Of two learners in turn, each has its penalty at every second update of its own."""
    agents = team(adapted("seller", "buyer"), "seller", "buyer", loss="cross_entropy")
    every = objective(penalty=Penalty(weight=0.05, steps="last", every=2))
    config = config_of(6, objective=every, updates=2, learning_rate=Linear(1.0, 0.0, steps=4))
    rates: list[float] = []
    run = _Run(agents, played(), config)
    rows = []
    for step in range(6):
        rows += run.step(step)
        rates.append(run.optimizers[rows[-1]["agent"]].param_groups[0]["lr"])
    assert [row["agent"] for row in rows] == ["seller"] * 2 + ["buyer"] * 2 + ["seller"] * 2
    assert ["penalty" in row for row in rows] == [False, True] * 3
    assert rates == [1.0, 0.75, 1.0, 0.75, 0.5, 0.25]


def test_who_is_observed_and_an_objective_of_each():
    agents = team(adapted(*NAMES), *NAMES, loss="cross_entropy")
    unattacked = objective(attack=Attack(radius=0.0))
    each = {"buyer": unattacked, "seller": objective(), "judge": objective()}
    config = config_of(3, objective=each, observed=["seller"])
    run = _Run(agents, played(), config)
    dialogue = played()(agents, torch.Generator().manual_seed(0))
    for name in ("buyer", "judge"):
        expected, actual = dialogue.batch(name, observed=["seller"]), run.experience(name, dialogue).batch
        assert all(torch.equal(actual[key], entry) for key, entry in expected.items())
    assert "attack_worst" not in run.step(0)[0] and run.step(2)[0]["attack_worst"] > 0
    with pytest.raises(ValueError, match="what agent 'seller' learns must depend on something"):
        run.step(1)  # observes no one but itself


OBJECTIVES = {  # each with a state of its own in a checkpoint
    "payoff": ("alternate", dict(payoff=of_tokens(4)), {}),
    "loss": (
        "together",
        dict(loss="cross_entropy"),
        dict(
            attack=Attack(radius=0.3, steps=1, scope="agent", init="uniform"),
            penalty=Constraint(gamma=0.1, window=2, per_agent=True),
            clean_weight=0.5,
        ),
    ),
}


@pytest.mark.parametrize("learns", OBJECTIVES)
def test_an_interrupted_training_ends_with_the_same_bits(tmp_path, learns):
    order, wanted, options = OBJECTIVES[learns]
    short = played(length=1)

    def made() -> tuple[Any, Agents]:
        model = adapted("buyer", "seller", dropout=0.2)
        return model, team(model, "buyer", "seller", **wanted)

    (straight, agents), (_, others) = made(), made()
    config = config_of(3, order=order, objective=objective(**options))
    whole = fit_agents(agents, short, config, out=tmp_path / "straight", progress=False)

    class Stop(Exception):
        pass

    def stop(row: Any) -> None:
        if row["step"] == 2:
            raise Stop

    with pytest.raises(Stop):
        fit_agents(others, short, config, out=tmp_path / "broken", progress=False, on_step=stop)
    again, third = made()
    torch.manual_seed(99)
    resumed = fit_agents(third, short, config, out=tmp_path / "broken", progress=False)
    assert resumed.resumed_from == 1
    for (name, p), q in zip(straight.named_parameters(), again.parameters()):
        assert torch.equal(p, q), name
    multipliers = {row.get("multiplier") for row in whole.rows}
    assert multipliers == {None} if learns == "payoff" else len(multipliers) > 2
    drop = lambda rows: [{k: v for k, v in row.items() if k != "seconds"} for row in rows]
    assert drop(resumed.rows) == drop(whole.rows)
    assert json.loads((tmp_path / "broken" / "config.json").read_text())["steps"] == config.steps
    with pytest.raises(ValueError, match="out must be a folder without checkpoints"):
        fit_agents(third, short, config, out=tmp_path / "broken", progress=False, resume=False)


@pytest.mark.parametrize("learns", ["loss", "payoff"])
def test_a_constraint_finds_its_weight(learns):
    model = adapted("buyer", "seller")
    by_row = lambda dialogue: dialogue.ids.double().mean(-1)
    options = {"loss": dict(loss="cross_entropy"), "payoff": dict(payoff=by_row)}[learns]
    agents = team(model, "buyer", "seller", **options)
    weight = {} if learns == "loss" else {"weight": 0.01}  # no loss to be a share of
    constraint = Constraint(gamma=0.1, quantile=0.9, window=4, **weight)
    result = fit_agents(
        agents, played(), config_of(4, objective=objective(penalty=constraint)), progress=False
    )
    # λ that is a share of the loss is found by each agent's first step; a number is there from the start
    expected = [learns == "payoff"] * 2 + [True] * 2
    assert ["violation" in row for row in result.rows] == expected
    assert all(row["multiplier"] > 0 for row in result.rows[2:])


def test_an_experience_brings_its_own_batch_and_payoff():
    model = adapted("buyer", "seller")
    agents = team(model, "buyer", "seller")
    dialogue = played()(agents, torch.Generator().manual_seed(0))
    experience = {
        name: Experience(dialogue.batch(name), torch.tensor([1.0, 0.0], dtype=torch.float64))
        for name in agents.names
    }
    result = fit_agents(agents, lambda *_: experience, config_of(2), progress=False)
    assert [row["payoff"] for row in result.rows] == [0.5, 0.5]


# -- bad input ------------------------------------------------------------------------------------------------------
def test_bad_input_has_one_sentence():
    model = adapted("buyer", "seller")
    with pytest.raises(ValueError, match=r"adapter must be one of buyer, seller, got 'judge': add it with"):
        adapter_agent(model, "judge")
    with pytest.raises(TypeError, match="model must be a PEFT model"):
        adapter_agent(tiny("llama"), "buyer")
    silent = Agents([adapter_agent(model, "buyer"), adapter_agent(model, "seller")])
    with pytest.raises(ValueError, match="agent 'buyer' must have a loss or a payoff"):
        fit_agents(silent, played(), config_of(1), progress=False)
    agents = team(model, "buyer", "seller")
    with pytest.raises(ValueError, match="name must be one of buyer, seller, got 'x'"):
        agents["x"]
    with pytest.raises(ValueError, match="agents must have parameters of their own"):
        Agents([adapter_agent(model, "buyer"), adapter_agent(model, "buyer", name="twin")])
    with pytest.raises(ValueError, match="each with a name of its own"):
        Agents([adapter_agent(model, "buyer"), adapter_agent(model, "buyer")])
    with pytest.raises(ValueError, match="must have a loss or a payoff, got both"):
        adapter_agent(model, "buyer", loss="cross_entropy", payoff=of_tokens(3))
    ends = lambda a, g: opened(("other", "buyer")).said("other", TWO).said("buyer", TWO)
    wrong = Agents([adapter_agent(model, "buyer", payoff=lambda d: d.ids.double())])
    with pytest.raises(ValueError, match="payoff of agent 'buyer' must be one number per row"):
        fit_agents(
            wrong,
            lambda a, g: play(a, opened(("buyer",)), rounds=1, length=2, generator=g),
            config_of(1),
            progress=False,
        )
    with pytest.raises(ValueError, match="must have said something"):
        fit_agents(
            agents,
            lambda a, g: opened(a.names).said("seller", torch.ones(2, 2).long()),
            config_of(1),
            progress=False,
        )
    with pytest.raises(ValueError, match="what agent 'buyer' learns must depend on something"):
        fit_agents(agents, played(rounds=1), config_of(1), progress=False)  # it speaks first
    for loss, got in ((lambda agent, batch: 1.0, "float"), (lambda a, b: torch.ones(()), "without a grad")):
        with pytest.raises(ValueError, match=f"loss of agent 'buyer' must return a number .*{got}"):
            fit_agents(team(model, "buyer", loss=loss), ends, config_of(1), progress=False)
    alone = lambda a, g: opened(("other", "buyer"), 1).said("other", TWO[:1]).said("buyer", TWO[:1])
    for advantage in ("mean", "standardised"):
        with pytest.raises(ValueError, match="'buyer' must have at least 2, got 1: play more at a time"):
            fit_agents(team(model, "buyer"), alone, config_of(1, advantage=advantage), progress=False)
    for learners in ([], ["buyer", "buyer"]):
        with pytest.raises(ValueError, match="learners must be names of agents, each once"):
            fit_agents(agents, played(), config_of(1, learners=learners), progress=False)
    with pytest.raises(
        ValueError, match="objective must have an entry for every learner, got none for 'sell"
    ):
        fit_agents(agents, played(), config_of(1, objective={"buyer": objective()}), progress=False)
    with pytest.raises(TypeError, match="play must return a Dialogue or an Experience"):
        fit_agents(agents, lambda a, g: {}, config_of(1), progress=False)
    with pytest.raises(ValueError, match="weight must be a number where no loss"):
        fit_agents(agents, played(), config_of(1, objective=objective(penalty=Penalty())), progress=False)
    with pytest.raises(ValueError, match="observed must name other agents"):
        opened(("a", "b")).said("a", torch.ones(2, 2).long()).batch("a", observed=["a"])
    with pytest.raises(ValueError, match="diagnostics"):
        config_of(1, objective=objective(diagnostics=Diagnostics(every=1)))
    with pytest.raises(ValueError, match="see a token"):
        play(agents, Dialogue.opened(("buyer", "seller")), rounds=1, length=2, generator=torch.Generator())


def test_positions_count_what_is_attended_to():
    assert positions(torch.tensor([[0, 1, 1, 0, 1]]).bool()).tolist() == [[0, 0, 1, 1, 2]]
