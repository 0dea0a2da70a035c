"""The committed evidence: complete, from a commit without changes, within its bounds, and what the pages say."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import pytest
from typer.testing import CliRunner

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

from common.command import application
from experiments import EXPERIMENTS, RESULTS, inclusion, load
from experiments import __main__ as command
from experiments.__main__ import experiment
from experiments.language_model import parts
from experiments.minimax import rank as minimax_rank
from experiments.minimax.report import COMPARISON as MINIMAX
from experiments.search import best
from experiments.step_condition.report import totals
from experiments.store import read
from experiments.summaries import chosen_runs


def committed(name: str):
    """The rows, after a look at whether they are all there and whose they are."""
    header, rows = read(RESULTS / f"{name}.jsonl")
    experiment = load(name)
    assert header["experiment"] == name and header["config"] == experiment.config(False)
    assert header["environment"]["commit"] and header["environment"]["dirty"] is False
    assert {row["task"] for row in rows} == {task.key for task in experiment.tasks(experiment.config(False))}
    return rows


def test_inclusion():
    worst = inclusion.errors(committed("inclusion"))
    assert max(worst.values()) < 1e-6, worst


def test_step_condition():
    rows = committed("step-condition")
    whole = totals([row for row in rows if row["family"] != "network"])
    assert whole["trials"] >= 20_000 and whole["held"] >= 20_000 and whole["held_falls"] == 0
    assert whole["special"] >= 20_000 and whole["special_falls"] == 0
    kinds = {(row["step"], row["scope"], row["projection"]) for row in rows if row["family"] != "network"}
    assert len(kinds) == 3 * 3 * 4


def test_digits():
    rows = committed("digits")
    tested = chosen_runs(rows)
    assert all(sorted(by_seed) == list(range(10)) for by_seed in tested.values())
    budgets = {m: {sum(r["method"] == m and r["seed"] == s for r in rows) for s in range(10)} for m in tested}
    assert budgets.pop("none") == {1}
    assert len(set().union(*budgets.values())) == 1  # as many weights for every method and seed
    for by_seed in tested.values():
        for (row,) in by_seed.values():
            assert row["validation"]["robust_accuracy"] >= 0.6 or row["method"] == "none"


def test_minimax():
    rows = committed("minimax")
    config = load("minimax").config(False)
    seeds, factors = set(range(config["seeds"])), set(config["factors"])
    tested = chosen_runs(rows)
    assert set(tested) == set(MINIMAX.names) and all(set(by_seed) == seeds for by_seed in tested.values())
    spent = Counter((row["method"], row["seed"], row["factor"]) for row in rows)
    assert all(
        count == (1 if method == "plain" else config["budget"]) for (method, *_), count in spent.items()
    )
    for method in tested.keys() - {
        "plain"
    }:  # as many runs for every method, all judged on the validation part
        for seed, own in tested[method].items():
            assert {row["factor"] for row in own} == factors and len(own) == len(factors)
            for row in own:
                key = (method, seed, row["factor"])
                runs = [r for r in rows if (r["method"], r["seed"], r["factor"]) == key]
                assert runs[best(runs, lambda r: minimax_rank(r, r["target"]))]["chosen"]


def test_language_model():
    rows = committed("language-model")
    config = load("language-model").config(False)
    seeds = set(range(config["scratch"]["seeds"]))
    by_part = {part: chosen_runs([r for r in rows if r["part"] == part]) for part in ("scratch", "adapted")}
    tested = by_part["scratch"]
    assert set(tested) == {"plain", "adversarial", *parts.SCRATCH[1:]}
    assert all(set(by_seed) == seeds for by_seed in tested.values())
    for method in parts.SCRATCH[1:]:  # as many runs for every method, all judged on the validation part
        for seed in tested[method]:
            mine = [r for r in rows if (r["part"], r["method"], r["seed"]) == ("scratch", method, seed)]
            assert len(mine) == config["scratch"]["budget"]
            assert mine[best(mine, lambda r: parts.rank(r, r["target"]))]["chosen"]
    assert len({(r["seed"], r["target"]) for r in rows if r["part"] == "scratch"}) == len(seeds)
    for methods in by_part.values():
        for by_seed in methods.values():
            for (row,) in by_seed.values():
                start, attacked = row["test"]["start"], row["test"]["embedding"]
                replaced = row["test"]["substitution"]
                assert min(attacked) >= start and replaced == sorted(replaced) and replaced[0] == start
    assert set(by_part["adapted"]) == set(parts.ADAPTED)


def test_constraint():
    from experiments.constraint.report import is_met

    rows, config = committed("constraint"), load("constraint").config(False)
    gammas = (*config["gammas"], config["loose"])
    assert {(row["gamma"], row["seed"]) for row in rows if row["followed"] == "training"} == {
        (g, s) for g in gammas for s in range(config["seeds"])
    }
    assert all(is_met(config, rows, "validation", gamma) for gamma in gammas)


def test_equal_bound():
    from experiments.equal_bound.report import is_valid, primaries

    rows, config = committed("equal-bound"), load("equal-bound").config(False)
    bounded = [row for row in rows if row["method"] != "none"]
    for row in rows:  # as ‖J u‖ ≤ ‖J‖₂, which ‖J‖_F and the layers bound
        along, top, every, product = row["validation"].values()
        assert along <= 1.001 * top and top <= 1.001 * min(every, product)
    assert sum(is_valid(config, row) for row in bounded) > 0.75 * len(bounded)
    assert all(len(one.differences) >= config["seeds"] - 1 for one in primaries(config, rows))


def test_equal_bound_lm():
    from experiments.equal_bound_lm.report import is_valid, primaries

    rows, config = committed("equal-bound-lm"), load("equal-bound-lm").config(False)
    bounded = [row for row in rows if row["gamma"] is not None]
    assert all(row["validation"]["aligned"] <= row["validation"]["spectral"] for row in rows)
    assert all(row["bound"] == pytest.approx(row["gamma"] * row["at_start"]) for row in bounded)
    assert sum(is_valid(config, row) for row in bounded) > 0.75 * len(bounded)
    assert all(len(one.differences) >= config["seeds"] - 1 for one in primaries(config, rows))


def test_constraint_lm():
    rows, config = committed("constraint-lm"), load("constraint-lm").config(False)
    bounds = (*config["shares"], config["loose"])
    assert sorted((row["share"], row["seed"]) for row in rows) == sorted(
        (share, seed) for share in bounds for seed in range(config["seeds"])
    )
    for row in rows:
        assert (row["quantile_held_out"] <= row["gamma"]) == (row["within_held_out"] >= config["quantile"])


def test_lazy():
    rows, config = committed("lazy"), load("lazy").config(False)
    for part in ("digits", "language"):
        runs = [(row["seed"], row["every"]) for row in rows if row["part"] == part]
        assert sorted(runs, key=str) == sorted(
            ((seed, k) for seed in range(config[part]["seeds"]) for k in (None, *config["every"])), key=str
        )
    assert all(row["robust"] >= row["nominal"] or row["part"] == "language" for row in rows)


def test_ablation():
    from experiments.ablation.report import COMPARISON
    from experiments.ablation.runs import METHODS, chosen

    rows, config = committed("ablation"), load("ablation").config(False)
    tested = chosen_runs(rows)
    assert set(tested) == set(COMPARISON.names)
    for method, by_seed in tested.items():
        assert set(by_seed) == set(range(config["seeds"]))
        for seed in by_seed:
            own = [row for row in rows if (row["method"], row["seed"]) == (method, seed)]
            assert len(own) == config["budget"][method] * (len(config["mixes"]) if METHODS[method] else 1)
            assert own[chosen(own, own[0]["target"], config["tolerance"])]["chosen"]


def test_decoupling():
    from experiments.decoupling.report import NAMES

    rows, config = committed("decoupling"), load("decoupling").config(False)
    runs = [(row["seed"], row["setting"], row["method"]) for row in rows]
    seeds = range(config["seeds"])
    assert set(runs) == {(seed, s, method) for seed in seeds for s in config["settings"] for method in NAMES}
    assert len(runs) == len(set(runs))


def test_shared_context():
    from experiments.shared_context.report import LOSSES, largest_difference, ratio

    rows = committed("shared-context")
    assert {row["weights"] for row in rows} == {"pretrained"}
    assert all(largest_difference(rows, name) < 1e-4 for name in LOSSES)
    assert ratio(rows, "processor_seconds") < 0.75


def test_two_agents():
    pytest.importorskip("transformers")
    from experiments.two_agents.report import COMPARISON, settings

    rows, config = committed("two-agents"), load("two-agents").config(False)
    for method in COMPARISON.names:
        expected = config["bounded"] if method != "none" else [[w, None] for w in config["unbounded"]]
        own = settings(rows, method)
        assert set(own) == {(w, gamma) for w, gamma in expected}
        seeds = list(range(config["seeds"]))
        assert all(sorted(row["seed"] for row in runs) == seeds for runs in own.values())
    for row in (row for row in rows if row["finite"]):
        play = row["test"]["play"]
        assert row["test"]["robust_joint"] <= row["test"]["joint"] + 1e-6
        # a play with hardly any chance in it has no normal mean; five standard errors and what one play can move
        assert abs(play["played"] - play["expected"]) < 5 * play["error"] + 1e-3


def test_prompt_injection():
    from experiments.prompt_injection.report import LOSSES, METHODS, rank

    rows, config = committed("prompt-injection"), load("prompt-injection").config(False)
    tested = chosen_runs(rows)
    assert set(tested) == set(METHODS)
    for method, by_seed in tested.items():
        assert set(by_seed) == set(range(config["seeds"]))
        for seed, (row,) in by_seed.items():
            own = [r for r in rows if (r["method"], r["seed"]) == (method, seed)]
            settings = [{"mix": r["mix"]} | ({"gamma": r["gamma"]} if "gamma" in r else {}) for r in own]
            assert settings == config["runs"][method]
            assert own[best(own, lambda r: rank(config, r))] is row
            losses = dict(row["test"]["rows"])
            assert set(losses) == set(LOSSES)
            assert all(len(values) == config["evaluation"]["rows"] for values in losses.values())
            assert losses.pop("worst") == [max(values) for values in zip(*losses.values())]


@pytest.mark.parametrize("name", sorted(EXPERIMENTS))
def test_pages_are_what_the_rows_say(name, tmp_path):
    result = CliRunner().invoke(application(experiment), [name, "--draw", "--out", os.fspath(tmp_path)])
    assert result.exit_code == 0, result.output
    pages = Path(command.ROOT) / "docs" / "experiments"
    assert (tmp_path / f"{name}.md").read_text() == (pages / f"{name}.md").read_text()
    assert all((pages / picture.name).exists() for picture in tmp_path.glob("*.png"))
