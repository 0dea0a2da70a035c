"""Comparisons at an equal bound and at an equal realised sensitivity, on made-up rows whose answers are known."""

from __future__ import annotations

import math

import pytest

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

from experiments import equal, equal_bound, load
from experiments.equal_bound.report import BASELINES, NAMES, binding, is_valid, primaries

CONFIG = load("equal-bound").config(False)
QUICK = load("equal-bound").config(True)
value = lambda row: row["loss"]
always = lambda row: True


def row(method, seed, gamma, loss, realised=1.0, **more):
    return dict(method=method, seed=seed, gamma=gamma, loss=loss, realised=realised, **more)


def test_at_an_equal_bound_only_pairs_of_valid_runs_count():
    rows = [
        row("ours", 0, 2, 1.0), row("theirs", 0, 2, 1.5), row("ours", 0, 4, 0.5), row("theirs", 0, 4, 0.6),
        row("ours", 1, 2, 9.0, bad=True), row("theirs", 1, 2, 1.0), row("ours", 1, 4, 0.2), row("theirs", 1, 4, 0.6),
        row("ours", 2, 2, 9.0, bad=True), row("theirs", 2, 2, 1.0), row("other", 0, 2, 7.0), row("ours", 0, 8, 7.0),
        row("theirs", 0, 8, 0.0), row("ours", 3, 2, 1.0),
    ]  # fmt: skip
    differences = equal.at_equal_bound(
        *(rows, "ours", "theirs", value, [2, 4], lambda row: not row.get("bad"))
    )
    # seed 0: both bounds; seed 1: the second one only; seeds 2 and 3 have no pair
    assert differences == pytest.approx([(-0.5 - 0.1) / 2, -0.4])


def test_at_an_equal_realised_sensitivity():
    """Losses linear in log ‖J u‖, so that interpolation is exact; the methods reach different ranges."""
    curve = lambda shift: lambda realised: 1.0 - 0.3 * math.log(realised) + shift
    rows = []
    for seed, gap in enumerate((0.1, -0.2)):
        for gamma in (2, 4, 8):
            rows.append(row("ours", seed, gamma, curve(gap)(gamma), gamma))
            rows.append(row("theirs", seed, gamma, curve(0.0)(gamma / 1.7), gamma / 1.7))
    assert equal.at_equal_realised(rows, "ours", "theirs", value, [2, 4, 8]) == pytest.approx([0.1, -0.2])
    # at the same γ the baseline, which realises less, has the larger loss
    at_bound = equal.at_equal_bound(rows, "ours", "theirs", value, [2, 4, 8], always)
    assert at_bound == pytest.approx([0.1 - 0.3 * math.log(1.7), -0.2 - 0.3 * math.log(1.7)])
    # no common range, and a method that is missing
    apart = [{**r, "realised": r["realised"] / (100 if r["method"] == "theirs" else 1)} for r in rows]
    assert equal.at_equal_realised(apart, "ours", "theirs", value, [2, 4, 8]) == []
    assert equal.at_equal_realised(rows, "ours", "neither", value, [2, 4, 8]) == []


def test_the_table_of_primaries():
    def primary(name, differences):
        return equal.Primary(name, "loss", differences, 0.02)

    spread = [0.001 * i for i in range(-5, 5)]
    table = equal.primary_table(
        [
            primary("a", [-0.1 + s for s in spread]),
            primary("b", [0.1 + s for s in spread]),
            primary("c", spread),
            primary("d", [20 * s for s in spread]),
            primary("e", [1.0]),
        ]
    )
    lines = {line.split(" | ")[0].strip("| "): line for line in table.splitlines()[2:]}
    ends = {"a": "**lower** |", "b": "**higher** |", "c": "within ±0.02 |", "d": "undecided |", "e": "- |"}
    assert all(lines[name].endswith(end) for name, end in ends.items())
    assert "| 10 |" in lines["a"] and "| 1 | - |" in lines["e"]


def made_up(config, gap):
    """Rows in which AAJR's loss at a given ‖J u‖ differs by a gap, and every method realises its share of γ."""
    share = {"aligned": 1.0, "spectral": 0.9, "frobenius": 0.5, "layer_product": 0.8}
    rows = []
    for task in load("equal-bound").tasks(config):
        facts = {name: task.arguments[name] for name in ("seed", "training", "method", "gamma")}
        method, gamma, seed = facts["method"], facts["gamma"], facts["seed"]
        free = (20.0 if facts["training"] == "nominal" else 10.0) + 0.01 * seed
        realised = free if gamma is None else min(gamma * share[method], free)
        loss = (
            2
            - 0.5 * math.log(realised)
            + 0.001 * (len(method) * (seed + 3) ** 2 % 5 - 2)
            + (gap if method == "aligned" else 0.0)
        )
        rows.append(
            facts
            | {
                "realised": realised,
                "violated": None if gamma is None else 0.05,
                "validation": {"aligned": realised, "layer_product": gamma},
                "test": {"nominal": loss, "robust_loss": 1.0, "robust_accuracy": 0.5},
                "stability": {"kappa": 0.1, "kappa_positive": 1.0, "smoothness": 2.0, "expansion": 1.1},
                "task": task.key,
                "seconds": 1.0,
            }
        )
    return rows


def test_bounds_that_bind():
    rows = made_up(CONFIG, 0.0)
    assert binding(CONFIG, rows, "nominal") == CONFIG["gammas"]
    assert binding(CONFIG, rows, "minimax") == [2, 3, 4.5, 6, 9]


def test_valid_runs():
    run = dict(method="aligned", gamma=3)
    assert [is_valid(CONFIG, run | {"violated": v}) for v in (0.02, 0.03, 0.07, 0.08)] == [
        *(False, True, True, False)
    ]
    product = lambda reached: dict(
        method="layer_product", gamma=3, violated=1.0, validation={"layer_product": reached}
    )
    assert [is_valid(CONFIG, product(reached)) for reached in (2.8, 2.9, 3.1, 3.2)] == [
        *(False, True, True, False)
    ]


@pytest.mark.parametrize("gap", [-0.05, 0.05, 0.0])
def test_primaries_of_either_sign(gap):
    rows = made_up(CONFIG, gap)
    family = primaries(CONFIG, rows)
    assert len(family) == 12 and len({(one.comparison, one.of) for one in family}) == 12
    for one, outcome in equal.judged(family):
        baseline = next(m for m in BASELINES if one.comparison.endswith(NAMES[m]))
        share = {"spectral": 0.9, "frobenius": 0.5, "layer_product": 0.8}[baseline]
        expected = gap + (0.5 * math.log(share) if one.of.startswith("A") else 0.0)
        assert outcome.count == 10 and outcome.interval[0] == pytest.approx(expected, abs=3e-3)
        verdict = "equivalent" if expected == 0 else "lower" if expected < 0 else "higher"
        assert outcome.verdict == verdict, one


def test_rows_and_page(tmp_path):
    tasks = load("equal-bound").tasks(QUICK)
    assert len({task.key for task in tasks}) == len(tasks) == 2 * 2 * (1 + 4 * 2)
    runs = [task for task in tasks if task.arguments["seed"] == 0 and task.arguments["gamma"] in (None, 6)]
    for task in runs[:3]:
        (measured,) = equal_bound.work(**task.arguments)
        assert measured == equal_bound.work(**task.arguments)[0]
        along, top = measured["validation"]["aligned"], measured["validation"]["spectral"]
        assert 0 < along <= top <= measured["validation"]["layer_product"]
        assert measured["test"]["robust_loss"] >= measured["test"]["cross_entropy"]
        assert (measured["multiplier"] is None) == (measured["method"] == "none")
    environment = dict(dirty=False, torch="2", python="3", cpu="c", machine="m", commit="0")
    text = load("equal-bound").report(
        {"config": CONFIG, "environment": environment}, made_up(CONFIG, -0.05), tmp_path
    )
    assert "At the same realised ‖J u‖ AAJR's nominal loss is lower in 6, higher in 0" in text
    assert "2, 3, 4.5, 6, 9 in minimax training" in text and "12, does not bind" in text
    assert (tmp_path / "equal-bound.png").stat().st_size > 10_000
