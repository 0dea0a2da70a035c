"""Two agents: the game, what its payoffs and gradients reach, the environment, the analysis, and a run of seconds."""

from __future__ import annotations

import copy
import itertools
from collections import Counter

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("transformers")

import aajr_kernels as aajr
from experiments import load
from experiments.base import run_experiment
from experiments.search import best
from experiments.statistics import t_interval
from experiments.store import Store
from experiments.two_agents import evaluation, policies, rank, training
from experiments.two_agents.game import Games, Heads, deal, expected, marginal
from experiments.two_agents.report import COMPARISON

FULL, QUICK = load("two-agents").config(False), load("two-agents").config(True)
GAME = FULL["game"]
RAMP = torch.arange(4.0)


def games_of(number: int, seed: int = 0) -> Games:
    return deal(GAME, number, torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def pair():
    """Policies that listen: after a few updates, with sharper heads."""
    made = policies.from_scratch(GAME, {"width": 16, "layers": 1}, 0)
    with torch.no_grad():
        for policy in made.policies:
            policy.model.lm_head.weight.mul_(10)
    return made


@pytest.fixture(scope="module")
def met(pair):
    """Games, embeddings, honest heads and an ascent in training's way."""
    games = games_of(6)
    x = pair.embed(games)
    with torch.no_grad():
        honest = pair.heads(x)
    return games, x, honest, training.inner(FULL, pair, games, x, honest)


def test_payoffs_of_one_game_by_hand():
    games = Games(torch.tensor([[2, 1, 1]]), torch.tensor([[[1, 2, 0], [0, 1, 3]]]), 0.5)
    torch.testing.assert_close(games.shares()[0], torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.25, 0.75]]))
    table = games.payoffs()[0]
    # A gives the third lot, B the first: A gains a half, B three quarters
    torch.testing.assert_close(table[:, 2, 0], torch.tensor([(0.5 + 0.375) / 1.5, (0.75 + 0.25) / 1.5]))
    torch.testing.assert_close(table.diagonal(dim1=1, dim2=2), torch.zeros(2, 3))
    assert games.optimum().item() == pytest.approx(1.25)
    assert games.unheard().item() == pytest.approx(1.25)  # here each values least what the other wants most


def test_deals_are_within_bounds_and_nobody_values_nothing():
    games = deal({"lots": 2, "counts": 3, "values": 1, "regard": 0.5}, 500, torch.Generator().manual_seed(0))
    assert set(games.counts.unique().tolist()) == {1, 2, 3} and set(games.values.unique().tolist()) == {0, 1}
    assert (games.values.sum(-1) > 0).all() and torch.isfinite(games.shares()).all()
    assert (games.optimum() >= games.unheard() - 1e-6).all() and (games.optimum() >= 0).all()


def test_expected_payoffs_equal_an_enumeration_of_all_plays():
    torch.manual_seed(0)
    games, lots = games_of(3), GAME["lots"]
    a, b = (Heads(torch.randn(3, lots).double(), torch.randn(3, lots, lots).double()) for _ in "AB")
    ask_a, ask_b = a.requests.softmax(-1), b.requests.softmax(-1)
    give_a, give_b = a.gifts.softmax(-1), b.gifts.softmax(-1)
    for table in games.payoffs().double().unbind(1):
        total = torch.zeros(3).double()
        for i, j, g, h in itertools.product(range(lots), repeat=4):  # requests, then gifts
            total += ask_a[:, i] * ask_b[:, j] * give_a[:, j, g] * give_b[:, i, h] * table[:, g, h]
        torch.testing.assert_close(expected(a, b, table), total)


def test_one_forward_over_the_tree_is_one_sequence_per_request(pair, met):
    _, x, (a, _), _ = met
    policy = pair.policies[0]
    own = x[:, : policy.length]
    for request, word in enumerate(policy.words):
        heard = policy.embed(word.reshape(1, 1)).expand(len(x), -1, -1)
        logits = policy.model(inputs_embeds=torch.cat([own, heard], 1)).logits[:, :, policy.words]
        torch.testing.assert_close(a.requests, logits[:, -2], atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(a.gifts[:, request], logits[:, -1], atol=2e-5, rtol=1e-4)


def test_each_observation_is_moved_by_its_owners_payoff_alone(pair, met):
    games, x, (a, b), _ = met
    table_a, table_b = games.payoffs().unbind(1)
    place = (x + 0.3 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1))).requires_grad_()
    (gradient,) = torch.autograd.grad(training.sabotage(pair, games, (a, b))(place).sum(), place)
    length = len(pair.attackable)
    misled_a, misled_b = pair.heads(place)
    (own_a,) = torch.autograd.grad(-expected(misled_a, b, table_a).sum(), place)
    (own_b,) = torch.autograd.grad(-expected(a, misled_b, table_b).sum(), place)
    assert (own_a[:, length:] == 0).all() and (own_b[:, :length] == 0).all()
    torch.testing.assert_close(gradient[:, :length], own_a[:, :length])
    torch.testing.assert_close(gradient[:, length:], own_b[:, length:])
    assert own_a.abs().max() > 1e-4 and own_b.abs().max() > 1e-4


def test_each_ascends_its_own_payoff_alone(pair, met):
    """Without a penalty the gradient of the update at A's weights is that of A's payoff with B held fixed."""
    games, x, _, _ = met
    table_a, _ = games.payoffs().unbind(1)
    mine = copy.deepcopy(pair)
    a, b = mine.heads(x)
    expected(a, b.detach(), table_a).sum().backward()
    assert all(p.grad is None for p in mine.policies[1].parameters())
    assert mine.policies[0].model.lm_head.weight.grad.abs().max() > 0
    # through A's requests B's gift depends on A, and A's gradient knows it
    reached = torch.autograd.grad(
        marginal(b.detach(), mine.heads(x)[0])[:, 0].sum(), mine.policies[0].model.lm_head.weight
    )
    assert reached[0].abs().max() > 0


def test_balls_are_per_agent_and_prompts_stay(pair, met):
    _, x, _, traj = met
    delta = (traj.points - x).unflatten(2, (2, -1))
    norms = delta.flatten(3).norm(dim=-1)  # [steps + 1, games, agents]
    assert norms.max() <= FULL["radius"] * (1 + 1e-5)
    assert norms[-1].min() > 0.9 * FULL["radius"]  # both agents' balls are used up, in every game
    assert (delta[:, :, :, ~pair.attackable] == 0).all()
    lengths = traj.directions.unflatten(2, (2, -1)).flatten(3).norm(dim=-1)
    torch.testing.assert_close(lengths, torch.ones_like(lengths))


def test_penalties_are_those_of_separate_calls(pair, met):
    _, _, _, traj = met
    length, generator = len(pair.attackable), torch.Generator()
    joint, each, apart = [], [], []
    for point, u in zip(traj.points[:-1], traj.directions):
        u_a, u_b = u.clone(), u.clone()
        u_a[:, length:], u_b[:, :length] = 0, 0
        options = dict(metric="fisher", unit="sequence")
        joint.append(aajr.aligned_penalty(pair.composite, point, u, **options))
        sizes = [aajr.aligned_penalty(pair.composite, point, v, **options) for v in (u_a, u_b)]
        each.append(sum(sizes) / 2)
        # without what a request carries over to the other's gift
        for v, own, half in ((u_a, 0, slice(0, length)), (u_b, 1, slice(length, None))):
            q = aajr.aligned_penalty(pair.composite, point, v, metric="fisher", reduction="none")
            apart.append(q[0, :, 1 - own].mean())
            assert v[:, half].abs().max() > 0
    penalty = training.penalty("aajr-joint", pair, traj, 1, generator)
    torch.testing.assert_close(penalty, sum(joint) / len(traj))
    per_agent = training.penalty("aajr-agents", pair, traj, 1, generator)
    torch.testing.assert_close(per_agent, sum(each) / len(traj))
    assert sum(apart) > 1e-4  # the policies are coupled ...
    assert abs(penalty - 2 * per_agent) > 1e-4 * penalty  # ... so that joint is not twice the mean of both
    assert penalty < 4 * per_agent  # ‖J(v_A + v_B)‖² ≤ 2 (‖Jv_A‖² + ‖Jv_B‖²)


def test_global_penalties_move_what_may_be_attacked_alone(pair, met):
    """A derivative in the prompts' directions alone adds nothing to a penalty of the global ones."""
    _, _, _, traj = met
    prompts = (pair.agents(1)[0] < 0).float().reshape(1, -1, 1)

    class Steep:
        policies, attackable = pair.policies, pair.attackable

        @staticmethod
        def composite(z):
            slope = (z * prompts).sum((1, 2)).reshape(-1, 1, 1)
            return pair.composite(z) + (slope - slope.primal if isinstance(z, aajr.Dual) else 0.0) * RAMP

    for method in ("frobenius", "spectral"):
        draws = [torch.Generator().manual_seed(3) for _ in "ab"]
        plain, steep = (
            training.penalty(method, p, traj, 2, draw).item() for p, draw in zip((pair, Steep), draws)
        )
        assert steep == pytest.approx(plain, rel=1e-5) and plain > 0
    u = prompts.expand(6, -1, traj.x.shape[-1]).clone()
    options = dict(metric="fisher", unit="sequence")
    through = aajr.aligned_penalty(Steep.composite, traj.x, u, **options)
    assert through > 10 * aajr.aligned_penalty(pair.composite, traj.x, u, **options)


def test_methods_share_everything_but_the_penalty():
    trained = {}
    for method in training.METHODS:  # a weight of zero leaves no trace of the method
        made = policies.from_scratch(QUICK["game"], QUICK["model"], 0)
        history = training.train(QUICK, made, 0, method, mix=1.0, weight=0.0)
        trained[method] = (history, made.policies.state_dict())
    for history, state in trained.values():
        assert history == trained["none"][0]
        assert all(torch.equal(state[name], value) for name, value in trained["none"][1].items())
    pushed = policies.from_scratch(QUICK["game"], QUICK["model"], 0)
    before = copy.deepcopy(pushed.policies.state_dict())
    training.train(QUICK, pushed, 0, "aajr-joint", mix=1.0, weight=1.0)
    for name, value in pushed.policies.state_dict().items():
        frozen = "embed_tokens" in name
        assert torch.equal(value, before[name]) == frozen
        assert frozen or not torch.equal(value, trained["none"][1][name])


def test_a_run_that_is_not_finite_ends_before_the_update(monkeypatch):
    calls = []

    def penalty(method, pair, *rest):
        calls.append(method)
        return pair.policies[0].model.lm_head.weight.sum() * (float("inf") if len(calls) == 3 else 0.0)

    monkeypatch.setattr(training, "penalty", penalty)
    made = policies.from_scratch(QUICK["game"], QUICK["model"], 0)
    history = training.train(QUICK | {"updates": 4}, made, 0, "frobenius", mix=1.0, weight=1.0)
    assert len(calls) == 3 and history["collapsed"] and not history["finite"] and history["variance"] is None
    assert all(parameter.isfinite().all() for parameter in made.policies.parameters())


def test_history():
    attacked = [0.1] * 10 + [0.5] * 10 + [0.2] * 10
    columns = {"clean": [0.0] * 20 + [0.4] * 10, "attacked": attacked}
    columns |= {"falls": [0.0, 1.0] * 15, "gradient": [1.0] * 29 + [11.0]}
    summary = training.history(columns, True, 0.3)
    assert summary["attacked"] == [0.1, 0.5, 0.2] and summary["falls"] == 0.5
    assert summary["variance"] == pytest.approx(0) and summary["jitter"] == pytest.approx(0)
    assert summary["drop"] == pytest.approx(0.3)  # means of ten: 0.5 down to 0.2
    assert summary["tail"] == pytest.approx(np.quantile(columns["gradient"], 0.99))
    assert not summary["collapsed"] and training.history(columns, True, 0.5)["collapsed"]


def test_attacks_only_lower_payoffs(pair):
    games = games_of(12, 5)
    config = FULL | {"attack": {"steps": 4, "step": [0.25], "restarts": 1}}
    seen = evaluation.clean(pair, games)
    strong = evaluation.robust(config, pair, games, 0)
    tiny = evaluation.robust(config | {"radius": 1e-5}, pair, games, 0)
    assert strong["robust_a"] < seen["payoff_a"] - 1e-3 and strong["robust_b"] < seen["payoff_b"] - 1e-3
    assert strong["robust_joint"] == pytest.approx(strong["robust_a"] + strong["robust_b"])
    # payoffs change by at most their gradient, of norm below 10, times the radius
    assert tiny["robust_joint"] == pytest.approx(seen["joint"], abs=2e-4)
    report = evaluation.stability(FULL, pair, games)
    assert report["kappa"] > 0 and 0 <= report["falls"] <= 1


def test_the_environment_passes_its_own_test_and_plays_as_expected(pair):
    pytest.importorskip("pettingzoo", reason="pettingzoo is not installed: pip install -e '.[experiments]'")
    from pettingzoo.test import parallel_api_test

    from experiments.two_agents.environment import Barter

    games = games_of(24, 2)
    environment = Barter(games)
    parallel_api_test(environment, num_cycles=50)
    first, _ = environment.reset(seed=3)
    again, _ = environment.reset(seed=3)
    assert all(np.array_equal(first[name], again[name]) for name in "AB") and first["A"][-1] == 0
    seen, rewards, ended, _, _ = environment.step({"A": 1, "B": 3})
    assert (
        (seen["A"][-1], seen["B"][-1]) == (4, 2)
        and set(rewards.values()) == {0.0}
        and not any(ended.values())
    )
    _, rewards, ended, _, _ = environment.step({"A": 0, "B": 2})
    table = games.payoffs()[environment._game, :, 0, 2]
    assert [rewards["A"], rewards["B"]] == pytest.approx(table.tolist()) and all(ended.values())
    assert environment.agents == []
    played = evaluation.play(pair, games, 60, 0)
    # 1,440 plays: a normal mean; 4.5 standard errors are passed once in 150,000 draws, and the draw is fixed
    assert abs(played["played"] - played["expected"]) < 4.5 * played["error"] and played["error"] < 0.02


def test_the_adapters_are_apart_and_the_model_is_shared():
    pytest.importorskip("peft", reason="peft is not installed: pip install -e '.[experiments]'")
    setup = QUICK["language_model"]
    made = policies.adapted(setup, setup["game"], 0)
    a, b = made.policies
    assert a.model.lm_head.weight is b.model.lm_head.weight and a.model is not b.model
    trained = {name for name, p in made.policies.named_parameters() if p.requires_grad}
    assert trained and all("lora" in name for name in trained)
    games = deal(setup["game"], 3, torch.Generator().manual_seed(0))
    tokens = made.tokens(games)
    shown = "".join(chr(c) for c, may in zip(tokens[1, 0].tolist(), made.attackable) if may)
    sizes, values = games.counts[1].tolist(), games.values[1, 0].tolist()
    lots = ", ".join(f"{n} {lot} worth {v}" for n, lot, v in zip(sizes, policies.LOTS, values))
    assert shown == f" You have {lots}."
    before = {name: p.detach().clone() for name, p in made.policies.named_parameters()}
    training.train(setup, made, 0, "aajr-agents", mix=1.0, weight=0.1)
    moved = {name for name, p in made.policies.named_parameters() if not torch.equal(p, before[name])}
    assert moved <= trained and {name.split(".")[0] for name in moved} == {"0", "1"}


def judged(joint: float, robust: float, finite: bool = True) -> dict[str, object]:
    return {"finite": finite, "validation": {"joint": joint, "robust_joint": robust}}


def test_the_run_with_the_largest_clean_plus_robust_payoff_is_tested():
    assert best([judged(0.5, 0.1), judged(0.4, 0.3), judged(0.1, 0.5)], rank) == 1
    assert best([judged(0.5, 0.5, False), judged(0.0, 0.0)], rank) == 1


def outcome(method: str, seed: int, robust: float, variance: float | None) -> dict[str, object]:
    row = {
        "model": "scratch",
        "method": method,
        "seed": seed,
        "chosen": True,
        "variance": variance,
        "falls": 0.1,
    }
    return row | {"test": {"robust_joint": robust}}


def test_differences_are_paired_by_seed():
    rows = [outcome("aajr-joint", s, v, 0.01) for s, v in enumerate([0.3, 0.5, 0.1])]
    rows += [outcome("none", s, v, w) for s, v, w in [(2, 0.05, 0.02), (0, 0.2, None), (1, 0.3, 0.03)]]
    rows.append(outcome("none", 0, 9.0, 9.0) | {"chosen": False})
    compare = lambda quantity: COMPARISON.difference(rows, "aajr-joint", "none", quantity)
    assert compare("robust") == pytest.approx(t_interval([0.1, 0.2, 0.05]))
    # a run that broke off has no variance
    assert compare("variance") == pytest.approx(t_interval([-2.0, -1.0]))
    judged = COMPARISON.primaries(rows)
    assert {key[2]: outcome.count for key, outcome in judged.items()} == {
        "variance": 2,
        "falls": 3,
        "robust": 3,
    }
    assert {outcome.verdict for outcome in judged.values()} == {"undecided", "equivalent"}


@pytest.mark.slow
def test_a_small_run_and_its_page(tmp_path):
    pytest.importorskip("pettingzoo", reason="pettingzoo is not installed: pip install -e '.[experiments]'")
    pytest.importorskip("peft", reason="peft is not installed: pip install -e '.[experiments]'")
    experiment = load("two-agents")
    store = Store(tmp_path / "rows.jsonl", "two-agents", QUICK)
    run_experiment(experiment, store, quick=True)
    scratch = [row for row in store.rows if row["model"] == "scratch"]
    spent = Counter((row["method"], row["seed"]) for row in scratch)
    assert set(spent) == {(method, seed) for method in COMPARISON.names for seed in (0, 1)} and set(
        spent.values()
    ) == {2}
    assert Counter(row["method"] for row in scratch if row["chosen"]) == dict.fromkeys(COMPARISON.names, 2)
    assert all(("test" in row) == row["chosen"] for row in scratch)
    page = experiment.report(store.header, store.rows, tmp_path)
    assert "AAJR, per agent − AAJR, joint" in page and "no statistical claim" in page
    assert (tmp_path / "two-agents.png").stat().st_size > 10_000
    broken = [r | {"variance": None, "falls": None, "drop": None, "finite": False} for r in store.rows]
    assert "variance indistinguishable" in experiment.report(store.header, broken, tmp_path)
