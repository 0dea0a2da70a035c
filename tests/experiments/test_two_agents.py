"""Two agents: the game, what its payoffs and gradients reach, the environment, the analysis, and a run of seconds."""

from __future__ import annotations

import copy
import itertools
import math

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("transformers")

from experiments import load
from experiments.base import run_experiment
from experiments.statistics import t_interval
from experiments.store import Store
from experiments.two_agents import evaluation, policies, training
from experiments.two_agents.game import Games, Heads, deal, expected, marginal
from experiments.two_agents.report import COMPARISON, away, chosen, matching, settings, with_choice

FULL, QUICK = load("two-agents").config(False), load("two-agents").config(True)
GAME = FULL["game"]


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


def jacobians(pair, point):
    """Of the log-probabilities of both gifts in what may be attacked, ``[n, 2 · lots, entries]``, by autograd."""
    rows = torch.autograd.functional.jacobian(lambda x: pair.composite(x).sum(0).flatten(), point)
    return (rows * (pair.agents(1)[0] >= 0).float().reshape(-1, 1)).flatten(2).transpose(0, 1)


def test_units_are_the_sensitivities_along_the_joint_direction_and_along_the_steepest(pair, met):
    _, _, _, traj = met
    aligned, spectral = [], []
    for point, u in zip(traj.points[:-1], traj.directions):
        rows, p = jacobians(pair, point), pair.composite(point).detach().exp().flatten(1)
        # the Fisher metric of log-probabilities is their p; their slopes have mean 0 under p already
        scaled = rows * p.sqrt().unsqueeze(-1)
        aligned.append((scaled @ u.flatten(1).unsqueeze(-1)).norm(dim=(1, 2)))
        spectral.append(torch.linalg.matrix_norm(scaled, 2))
    for method, by_hand, iterations in (("aligned", aligned, 1), ("spectral", spectral, 30)):
        expected = torch.cat(by_hand)
        hinge, roots = training.measure(method, pair, traj, iterations, 0.5)
        torch.testing.assert_close(roots, expected, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(hinge, (roots - 0.5).relu().mean())
        assert hinge > 0 and not roots.requires_grad and hinge.requires_grad
    # u has norm 1 per agent, √2 in all
    assert (torch.cat(aligned) <= 2**0.5 * torch.cat(spectral) * (1 + 1e-4)).all()
    # one power iteration from the direction never exceeds it
    assert (training.measure("spectral", pair, traj, 1)[1] <= torch.cat(spectral) * (1 + 1e-3)).all()


def trained(method, gamma, **changes):
    made = policies.from_scratch(QUICK["game"], QUICK["model"], 0)
    return made, training.train(QUICK | changes, made, 0, method, 1.0, gamma)


def test_methods_share_everything_but_the_bound():
    plain, without = trained("none", None)
    state = plain.policies.state_dict()
    for method in training.METHODS[1:]:  # a bound that nothing exceeds leaves no trace
        same, history = trained(method, 1e3)
        assert history["within"] == 1.0 and all(
            history[name] == without[name] for name in ("clean", "falls", "variance")
        )
        assert all(torch.equal(same.policies.state_dict()[name], value) for name, value in state.items())
        held, history = trained(method, 1e-3)
        assert history["within"] < 1 and history["multiplier"] > 0
        start = policies.from_scratch(QUICK["game"], QUICK["model"], 0).policies.state_dict()
        for name, value in held.policies.state_dict().items():
            frozen = "embed_tokens" in name
            assert torch.equal(value, start[name]) == frozen
            assert frozen or not torch.equal(value, state[name])


def test_a_run_that_is_not_finite_ends_before_the_update(monkeypatch):
    calls, measure = [], training.measure

    def broken(method, pair, *rest):
        calls.append(method)
        hinge, roots = measure(method, pair, *rest)
        return hinge + pair.policies[0].model.lm_head.weight.sum() * (
            math.inf if len(calls) == 3 else 0.0
        ), roots

    monkeypatch.setattr(training, "measure", broken)
    made, history = trained("aligned", 1.0)
    assert len(calls) == 3 and history["collapsed"] and not history["finite"] and history["variance"] is None
    assert all(parameter.isfinite().all() for parameter in made.policies.parameters())


def test_history():
    line = [0.01 * i for i in range(20)]
    away = [0.1, -0.1, -0.1, 0.1] * 5  # no trend of its own
    columns = {"clean": [0.0] * 20 + [0.4] * 20, "attacked": [9.0] * 20 + [a + b for a, b in zip(line, away)]}
    columns |= {"falls": [1.0] * 20 + [0.0, 1.0] * 10, "gradient": [50.0] * 20 + [1.0] * 19 + [11.0]}
    summary = training.history(columns, True, 0.3)
    assert len(summary["attacked"]) == 4 and summary["clean"] == [0.0, 0.0, 0.4, 0.4]
    assert summary["falls"] == 0.5 and summary["variance"] == pytest.approx(0.01, rel=1e-2)
    assert summary["tail"] == pytest.approx(np.quantile(columns["gradient"][20:], 0.99))
    assert not summary["collapsed"] and training.history(columns, True, 0.5)["collapsed"]


def test_attacks_only_lower_payoffs(pair):
    games = games_of(12, 5)
    short = {"steps": 4, "step": [0.25], "restarts": 1}
    seen = evaluation.clean(pair, games)
    strong = evaluation.robust(FULL, pair, games, short, 0)
    tiny = evaluation.robust(FULL | {"radius": 1e-5}, pair, games, short, 0)
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


def row(method, seed, w, gamma, clean, damage, falls=0.02, finite=True):
    payoffs = {"joint": clean, "robust_joint": clean - damage, "share": 0.5, "falls": falls, "kappa": 0.1}
    play = {"played": clean, "expected": clean, "error": 0.01}
    bounded = {"multiplier": 0.1, "within": 0.95} if gamma else {"multiplier": None, "within": None}
    facts = {
        "method": method,
        "seed": seed,
        "w": w,
        "gamma": gamma,
        "finite": finite,
        "collapsed": False,
        **bounded,
    }
    facts |= {
        "falls": falls,
        "variance": 0.01,
        "tail": 2.0,
        "task": f"{seed}/{method}/{w}/{gamma}",
        "seconds": 1.0,
    }
    return facts | ({"validation": payoffs, "test": {**payoffs, "play": play}} if finite else {})


def made(seeds=10, **shift):
    """Clean payoff and damage by setting, with noise of every seed; `shift` of AAJR's damage and falls."""
    random = np.random.default_rng(0)
    means = {("none", 0.5, None): (0.42, 0.06), ("none", 1.0, None): (0.40, 0.05)}
    for method in ("spectral", "aligned"):
        means |= {(method, 0.5, 1.0): (0.405, 0.05), (method, 0.5, 0.5): (0.396, 0.045)}
        means |= {(method, 1.0, 1.0): (0.402, 0.055), (method, 1.0, 0.5): (0.30, 0.01)}
    rows = []
    for seed in range(seeds):
        for (method, w, gamma), (clean, damage) in means.items():
            noise, own = random.normal(0, 0.001, 2), method == "aligned"
            damage += own * shift.get("damage", 0.0) + noise[0]
            falls = 0.02 + own * shift.get("falls", 0.0) + noise[1]
            rows.append(row(method, seed, w, gamma, clean, damage, falls))
    return rows


def test_w_and_gamma_are_chosen_together_at_the_matched_payoff():
    rows = made()
    assert away(FULL, rows, settings(rows, "none")[0.5, None]) == pytest.approx(0.05)
    assert chosen(FULL, rows, "none") == (1.0, None)  # the other is 5 % away
    assert chosen(FULL, rows, "aligned") == (0.5, 0.5)  # of three that match the least damage
    narrow = FULL | {"tolerance": 0.001}
    assert chosen(narrow, rows, "aligned") == (1.0, 1.0)  # none matches: the nearest
    assert "AAJR, joint: w = 1, γ = 1, +0.5% of the target (**not matched**), a tighter γ costs more" in (
        matching(narrow, rows)
    )
    assert "AAJR, joint: w = 0.5, γ = 0.5, −1.0% of the target, no tighter γ" in matching(FULL, rows)
    # a setting with a run that broke off is left out; the test games do not matter
    broken = [
        r | {"finite": False}
        if (r["method"], r["w"], r["gamma"], r["seed"]) == ("aligned", 0.5, 0.5, 3)
        else r
        for r in rows
    ]
    assert chosen(FULL, broken, "aligned") == (0.5, 1.0)
    turned = [r | {"test": {**r["test"], "joint": 9.0}} for r in rows]
    assert with_choice(FULL, turned)[2]["chosen"] == with_choice(FULL, rows)[2]["chosen"]
    assert chosen(FULL, turned, "aligned") == (0.5, 0.5)


def test_primaries_and_page(tmp_path):
    rows = made(damage=-0.02, falls=0.01)
    marked = with_choice(FULL, rows)
    assert [r["seed"] for r in marked if r["chosen"] and r["method"] == "none"] == list(range(10))
    primaries = COMPARISON.primaries(marked)
    assert set(primaries) == {("aligned", b, q) for b in ("none", "spectral") for q in ("falls", "damage")}
    assert primaries["aligned", "none", "damage"].verdict == "lower"
    assert primaries["aligned", "none", "falls"].verdict == "higher"
    differences = COMPARISON.paired(marked, "aligned", "none", "damage")
    assert primaries["aligned", "none", "damage"].interval == t_interval(differences)
    assert np.mean(differences) == pytest.approx(0.045 - 0.02 - 0.05, abs=0.002)
    same = COMPARISON.primaries(with_choice(FULL, made()))
    assert same["aligned", "spectral", "damage"].verdict == "equivalent"
    environment = dict(dirty=False, torch="2", python="3", cpu="c", machine="m", commit="0")
    page = load("two-agents").report({"config": FULL, "environment": environment}, rows, tmp_path)
    assert "| AAJR, joint − none | damage | 10 |" in page and page.count("**chosen**") == 3
    assert (tmp_path / "two-agents.png").stat().st_size > 10_000


@pytest.mark.slow
def test_a_small_run_and_its_page(tmp_path):
    pytest.importorskip("pettingzoo", reason="pettingzoo is not installed: pip install -e '.[experiments]'")
    experiment = load("two-agents")
    store = Store(tmp_path / "rows.jsonl", "two-agents", QUICK)
    run_experiment(experiment, store, quick=True)
    runs = {(r["seed"], r["method"], r["w"], r["gamma"]) for r in store.rows}
    assert len(runs) == len(store.rows) == 2 * (len(QUICK["unbounded"]) + 2 * len(QUICK["bounded"]))
    assert all(r["test"]["robust_joint"] <= r["test"]["joint"] + 1e-6 for r in store.rows)
    assert all((r["within"] is None) == (r["method"] == "none") for r in store.rows)
    page = experiment.report(store.header, store.rows, tmp_path)
    assert "AAJR, joint − global spectral" in page
