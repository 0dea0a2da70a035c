"""The page on language models: written before the runs, and drawn from their rows only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from common.pages import table
from common.plots import figure, save

from .. import summaries
from ..statistics import t_interval
from ..store import Row
from ..summaries import Cell, Comparison, Quantity, chosen_runs, entry

NAMES = {
    "untouched": "not trained",
    "plain": "none (clean training)",
    "adversarial": "adversarial, w = 1",
    "weighted": "adversarial, w matched",
    "random": "random direction",
    "frobenius": "global Frobenius",
    "spectral": "global spectral",
    "aajr": "AAJR",
}
PAIRS = [("aajr", baseline) for baseline in ("weighted", "random", "frobenius", "spectral")]
#: looked at after the runs: does what is gained over clean training hold against tokens?
AFTERWARDS = [(ours, "plain") for ours in ("adversarial", "weighted", "aajr")]


def comparison(config: dict[str, Any]) -> Comparison:
    """Of a part of the configuration; losses are in nats per scored token."""
    evaluation = config["evaluation"]
    budget, radii = evaluation["substitution"]["budget"], evaluation["radii"]

    def rise(attack: str, place: int) -> Quantity:
        heading = "rise by embeddings" if attack == "embedding" else f"rise by {budget} tokens"
        return Quantity(heading, lambda row: row["test"][attack][place] - row["test"]["start"])

    def within(factor: float, primary: bool = False) -> Quantity:
        heading = f"loss, embeddings within {factor * config['radius']:g}"
        return Quantity(heading, entry("test", "embedding", radii.index(factor)), 3, primary, 0.02)

    replaced = entry("test", "substitution", budget)
    quantities = {
        "clean": Quantity("clean loss", entry("test", "clean")),
        "embedding": within(1.0, primary=True),
        "substitution": Quantity(f"loss, {budget} tokens replaced", replaced, 3, True, 0.02),
        **{f"embedding at {factor:g}": within(factor) for factor in radii if factor != 1},
        "rise in embeddings": rise("embedding", radii.index(1.0)),
        "rise": rise("substitution", budget),
        "kappa": Quantity("κ", entry("test", "kappa")),
        "falls": Quantity("non-monotone, %", entry("test", "falls", factor=100), 2),
    }
    return Comparison(NAMES, PAIRS, quantities, greys=("#bbbbbb", "#888888", "#444444"))


def _perplexity(*keys: str | int) -> Cell:
    """Exponential of the mean of losses: a geometric mean over seeds."""
    loss = entry("test", *keys)
    return lambda own, _: f"{np.exp(np.mean([loss(row) for row in own])):.2f}"


def _means(config: dict[str, Any], rows: list[Row]) -> str:
    """Perplexities, curvature and falls of every method of a part."""

    def eta_max(own: list[Row], _: list[Row]) -> str:
        largest = [row["test"]["eta_max"] for row in own]
        return "∞ at times" if None in largest else f"{np.mean(largest):.2f}"

    columns = {"clean": _perplexity("clean")}
    for place, factor in enumerate(config["evaluation"]["radii"]):
        columns[f"embeddings {factor * config['radius']:g}"] = _perplexity("embedding", place)
    for count in range(config["evaluation"]["substitution"]["budget"] + 1):
        columns[f"{count} token{'' if count == 1 else 's'}"] = _perplexity("substitution", count)
    columns |= {
        "κ": Quantity("", entry("test", "kappa")).mean,
        "η_max": eta_max,
        "non-monotone, %": Quantity("", entry("test", "falls", factor=100), 1).mean,
    }
    return summaries.by_method(NAMES, rows, columns)


def _step_seconds(rows: list[Row]) -> dict[int, float]:
    """Seed -> median processor time of a step, over all runs."""
    seconds: dict[int, list[float]] = {}
    for row in rows:
        if "seconds_per_step" in row:
            seconds.setdefault(row["seed"], []).append(row["seconds_per_step"])
    return {seed: float(np.median(values)) for seed, values in seconds.items()}


def _runs(rows: list[Row]) -> str:
    """Knobs, how well the runs are matched, and what a step costs."""
    base = _step_seconds([row for row in rows if row["method"] == "adversarial"])

    def matched(cell: Cell) -> Cell:
        return lambda own, every: "-" if own[0]["method"] in ("plain", "adversarial") else cell(own, every)

    def away(own: list[Row]) -> list[float]:
        return [abs(np.exp(row["validation"]) / row["target"] - 1) for row in own]

    def cost(own: list[Row], every: list[Row]) -> str:
        if own[0]["method"] == "adversarial":
            return "1"
        ratios = [seconds / base[seed] for seed, seconds in _step_seconds(every).items()]
        return summaries.interval_text(t_interval(ratios), 2, sign=False)

    columns = {
        "w or λ": matched(lambda own, _: summaries.geometric_mean(own, "knob")),
        "off the target": matched(lambda own, _: f"{np.mean(away(own)):.1%}"),
        "furthest off": matched(lambda own, _: f"{max(away(own)):.1%}"),
        "time per step": cost,
        "steps skipped": lambda _, every: sum(row["skipped"] for row in every),
    }
    return summaries.by_method(NAMES, rows, columns)


def _adapted(rows: list[Row]) -> str:
    """Weights, losses of training, and what a step costs, of the adapted part."""
    training, lines = [row for row in rows if row["stage"] == "training"], []
    base = _step_seconds([row for row in training if row["method"] == "adversarial"])
    for row in training:
        ends = [
            f"{row['first'][name]:.3g} to {row['last'][name]:.3g}" if row["first"][name] is not None else "-"
            for name in ("clean_loss", "adversarial_loss", "penalty")
        ]
        seconds = row["seconds_per_step"]
        cost = f"{seconds:.2f} ({seconds / base[row['seed']]:.2f})"
        lines.append([NAMES[row["method"]], row["seed"], f"{row['weight']:.2g}", *ends, cost])
    heads = ["clean loss", "adversarial loss", "penalty", "seconds per step (ratio)"]
    return table(["method", "seed", "λ", *heads], lines)


def _picture(config: dict[str, Any], scratch: list[Row], adapted: list[Row], path: Path) -> None:
    """Perplexity against radius and against replaced tokens; paired differences; the adapted model."""
    drawn, (radii, tokens, forest, pretrained) = figure(4, width=3.9, height=3.7)
    compared = comparison(config["scratch"])
    at = [factor * config["scratch"]["radius"] for factor in config["scratch"]["evaluation"]["radii"]]
    style: dict[str, Any] = {"ms": 3, "linewidth": 1}
    for method, by_seed in chosen_runs(scratch).items():
        tests, colour = [row["test"] for (row,) in by_seed.values()], compared.colours[method]
        robust = np.exp(np.mean([[test["start"], *test["embedding"]] for test in tests], 0))
        radii.plot([0.0, *at], robust, "o-", color=colour, label=NAMES[method], **style)
        replaced = np.exp(np.mean([test["substitution"] for test in tests], 0))
        tokens.plot(range(len(replaced)), replaced, "o-", color=colour, **style)
    radii.set(
        xlabel="radius in norms of a token", ylabel="perplexity", yscale="log", title="embedding attack"
    )
    tokens.set(xlabel="tokens replaced", ylabel="perplexity", title="substitution attack")
    compared.forest(forest, scratch, ["embedding", "substitution"])
    forest.set(xlabel="difference of loss, 95 % interval", title="from scratch; negative: AAJR better")
    for method, by_seed in chosen_runs(adapted).items():
        tests = [row["test"] for (row,) in by_seed.values()]
        values = [[test["start"], test["embedding"][0], test["substitution"][-1]] for test in tests]
        colour = compared.colours[method]
        pretrained.plot(
            range(3), np.exp(np.mean(values, 0)), "o-", color=colour, label=NAMES[method], **style
        )
    columns = ("no attack", f"embeddings {config['adapted']['radius']:g}", "tokens")
    pretrained.set_xticks(range(3), columns, fontsize=7)
    pretrained.set(ylabel="perplexity", yscale="log", title="SmolLM2 with LoRA, one seed: no claim")
    save(drawn, path)


def report(header: dict[str, Any], rows: list[Row], folder: Path) -> str:
    """The page; draws ``language-model.png`` into the folder."""
    config = header["config"]
    part = config["scratch"]
    scratch, adapted = ([row for row in rows if row["part"] == name] for name in ("scratch", "adapted"))
    _picture(config, scratch, adapted, folder / "language-model.png")
    compared = comparison(part)
    return summaries.page(
        *(__file__, header, rows),
        open_places=(part["length"] // part["turn"] + 1) // 2 * part["turn"],
        means=_means(part, scratch),
        differences=compared.differences(scratch),
        primaries=compared.primary_table(scratch),
        afterwards=compared.differences(scratch, AFTERWARDS),
        runs=_runs(scratch),
        adapted_means=_means(config["adapted"], adapted),
        adapted_runs=_adapted(adapted),
    )
