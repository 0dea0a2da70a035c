"""The page on prompt injections: written before the runs, and drawn from their rows only."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from common.pages import table
from common.plots import figure, save

from .. import summaries
from ..store import Row
from ..summaries import Comparison, Quantity, entry

#: loss -> its name on the page; those between are of the attacks
LOSSES = {
    "clean": "clean",
    "embedding": "embeddings",
    "hidden": "hidden layer",
    "universal": "universal",
    "substitution": "tokens replaced",
    "suffix": "tokens added",
    "worst": "worst of all",
}
METHODS = {"plain": "plain LoRA", "adversarial": "adversarial training", "aajr": "AAJR"}
PRIMARY = ("aajr", "adversarial")
PAIRS = (PRIMARY, ("aajr", "plain"), ("adversarial", "plain"))


def comparison(config: dict[str, Any]) -> Comparison:
    """By the losses of test dialogues; judged is the worst of all, of AAJR against adversarial training."""
    return Comparison(
        names=METHODS,
        pairs=[PRIMARY],
        quantities={
            name: Quantity(heading, entry("test", name), 3, name == "worst", config["margin"])
            for name, heading in LOSSES.items()
        },
    )


def is_near(config: dict[str, Any], row: Row) -> bool:
    """Whether its clean validation loss is at most `price` above that of the model that training starts from."""
    return bool(row["validation"]["clean"] <= row["reference"] + config["price"])


def rank(config: dict[str, Any], row: Row) -> tuple[bool, float]:
    """Of the runs that are near the most robust one under the short attack; without one, that of least clean loss."""
    near = is_near(config, row)
    return near, -row["validation"]["robust" if near else "clean"]


def unmatched(config: dict[str, Any], rows: Sequence[Row]) -> list[int]:
    """Seeds at which AAJR and adversarial training are not near, or more than `price` apart in clean test loss."""
    tested = summaries.chosen_runs(rows)
    seeds = []
    for seed in sorted(tested[PRIMARY[0]]):
        ours, baseline = (tested[method][seed][0] for method in PRIMARY)
        away = abs(ours["test"]["clean"] - baseline["test"]["clean"])
        if away > config["price"] or not (is_near(config, ours) and is_near(config, baseline)):
            seeds.append(seed)
    return seeds


def verdict(config: dict[str, Any], rows: Sequence[Row]) -> str:
    """How the primary difference came out, and whether the clean losses are matched, in two sentences."""
    ((pair, outcome),) = comparison(config).primaries(rows).items()
    place = {
        "lower": "is lower",
        "higher": "is higher",
        "equivalent": f"differs by at most {config['margin']:g} nats",
        "undecided": "is undecided",
    }[outcome.verdict]
    ours, baseline = (METHODS[method] for method in pair[:2])
    seeds = unmatched(config, rows)
    matched = (
        f"They are not matched at {len(seeds)} of the {outcome.count} seeds"
        if seeds
        else "They are matched at every seed"
    )
    interval = summaries.interval_text(outcome.interval)
    return (
        f"{ours} against {baseline} {place} in the worst of all losses: {interval} nats per token. {matched}."
    )


def _knobs(row: Row) -> str:
    gamma = row.get("gamma")
    return f"w = {row['mix']:g}" + ("" if gamma is None else f", γ = {gamma:g}")


def _runs(config: dict[str, Any], rows: Sequence[Row]) -> str:
    """A line for every setting: means over its seeds."""
    lines = []
    base = np.mean([row["seconds_per_step"] for row in rows if row["method"] == "adversarial"])
    for method, name in METHODS.items():
        for knobs in config["runs"][method]:
            own = [row for row in rows if row["method"] == method and _knobs(row) == _knobs(knobs)]
            held = [row for row in own if row.get("violation") is not None]
            lines.append(
                [
                    name,
                    _knobs(own[0]),
                    *(
                        f"{np.mean([row['validation'][part] for row in own]):.3f}"
                        for part in ("clean", "robust")
                    ),
                    summaries.share_of(own, lambda row: is_near(config, row)),
                    summaries.share_of(own, lambda row: row["chosen"]),
                    summaries.geometric_mean(held, "multiplier", ".2g") if held else "-",
                    f"{np.mean([row['violation'] for row in held]):.0%}" if held else "-",
                    f"{np.mean([row['seconds_per_step'] for row in own]) / base:.2f}",
                ]
            )
    return table(
        [
            *("method", "setting", "clean loss", "under the short attack", "near", "tested"),
            *("λ at the end", "units above γ at the end", "time of a step"),
        ],
        lines,
    )


def _seeds(rows: Sequence[Row]) -> str:
    """A line for every seed: the clean and the worst loss of the methods."""
    tested = summaries.chosen_runs(rows)
    lines = []
    for seed in sorted(tested["aajr"]):
        own = [tested[method][seed][0] for method in METHODS]
        values = [f"{row['test'][name]:.3f}" for name in ("clean", "worst") for row in own]
        lines.append([seed, *(_knobs(row) for row in own[1:]), *values])
    names = list(METHODS.values())
    columns = [f"{loss}, {name}" for loss in ("clean", "worst") for name in names]
    return table(["seed", *(f"setting, {name}" for name in names[1:]), *columns], lines)


def _picture(config: dict[str, Any], rows: Sequence[Row], path: Path) -> None:
    drawn, (losses, forest) = figure(2, width=4.8, height=3.6)
    compared, places = comparison(config), np.arange(len(LOSSES))
    for shift, (method, name) in zip((0.25, 0.0, -0.25), METHODS.items()):
        colour = compared.colours[method]
        values = np.array([list(compared.values(rows, method, loss).values()) for loss in LOSSES])
        losses.barh(places[::-1] + shift, values.mean(1), 0.23, color=colour, alpha=0.75, label=name)
        for of_seed in values.T:
            losses.plot(of_seed, places[::-1] + shift, "o", color="black", markersize=2.5)
    losses.set(xlabel="nats per scored token (test)", title="means, and a dot for every seed; less is better")
    for place, loss in zip(places[::-1], LOSSES):
        interval = compared.difference(rows, *PRIMARY, loss)
        if interval is not None:
            mean, low, high = interval
            bars = [[mean - low], [high - mean]]
            forest.errorbar(mean, place, xerr=bars, fmt="o", color=compared.colours["aajr"], capsize=3)
    forest.axvspan(-config["margin"], config["margin"], color="black", alpha=0.06)
    forest.axvline(0, color="black", linewidth=0.8)
    forest.set(xlabel="AAJR − adversarial training, 95 % interval", title="left of 0: AAJR is better")
    for axis in (losses, forest):
        axis.set_yticks(places[::-1], list(LOSSES.values()), fontsize=8)
    save(drawn, path)


def report(header: dict[str, Any], rows: list[Row], folder: Path) -> str:
    """The page; draws ``prompt-injection.png`` into the folder."""
    config = header["config"]
    compared, runs = comparison(config), config["runs"]
    _picture(config, rows, folder / "prompt-injection.png")
    return summaries.page(
        *(__file__, header, rows),
        verdict=verdict(config, rows),
        primaries=compared.primary_table(rows),
        means=summaries.by_method(
            METHODS, rows, {one.heading: one.mean for one in compared.quantities.values()}
        ),
        differences=compared.differences(rows, PAIRS),
        runs=_runs(config, rows),
        by_seed=_seeds(rows),
        start_steps=config["rows"]["start"] // config["start"]["batch"],
        steps=config["rows"]["train"] // config["batch"],
        budget=len(runs["aajr"]),
        mixes=", ".join(f"{knobs['mix']:g}" for knobs in runs["adversarial"]),
        settings=", ".join(f"({_knobs(knobs)})" for knobs in runs["aajr"]),
        least_p=2 / 2 ** config["seeds"],
    )
