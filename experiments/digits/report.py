"""The page on digits: written before the runs, and drawn from their rows alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ..plots import COLOURS, figure, save
from ..store import Row
from ..summaries import bootstrap_interval, chosen, environment_line, interval_text, table

__all__ = ["compare", "report"]

NAMES = {
    "none": "none",
    "frobenius": "global Frobenius",
    "spectral": "global spectral",
    "random": "random direction",
    "frobenius-fisher": "Frobenius, Fisher",
    "spectral-fisher": "spectral, Fisher",
    "aajr-l2": "AAJR, l2",
    "aajr-fisher": "AAJR, Fisher",
}
PAINT = dict(zip(NAMES, ("#888888", *COLOURS)))
#: what each of ours is compared with; the global penalties in the Fisher metric tell direction and metric apart
RIVALS = {
    "aajr-l2": ("frobenius", "spectral", "random"),
    "aajr-fisher": ("frobenius", "spectral", "random", "frobenius-fisher", "spectral-fisher", "aajr-l2"),
}
PAIRS = [(ours, other) for ours, others in RIVALS.items() for other in others]
#: quantity of the test part -> (heading, whether less is better)
QUANTITIES = {
    "nominal": ("nominal loss", True),
    "cross_entropy": ("cross-entropy", True),
    "utility_error": ("utility error", True),
    "accuracy": ("accuracy", False),
    "robust_accuracy": ("robust accuracy", False),
}


def compare(rows: list[Row], ours: str, other: str, quantity: str) -> tuple[float, float, float]:
    """Mean over seeds of ours − other on the test part, and its 95 % bootstrap interval; paired by seed."""
    table_of = chosen(rows)
    seeds = sorted(set(table_of[ours]) & set(table_of[other]))
    differences = [table_of[ours][s]["test"][quantity] - table_of[other][s]["test"][quantity] for s in seeds]
    return bootstrap_interval(differences)


def verdict(rows: list[Row], ours: str, other: str) -> str:
    """One sentence on the primary quantity, the nominal loss at matched robust accuracy."""
    mean, low, high = compare(rows, ours, other, "nominal")
    _, robust_low, robust_high = compare(rows, ours, other, "robust_accuracy")
    if low > 0 or high < 0:
        result = f"{'higher' if mean > 0 else 'lower'} nominal loss"
    else:
        result = "no nominal loss that could be told from the other's"
    if robust_low > 0 or robust_high < 0:
        match = f"at {'higher' if robust_low > 0 else 'lower'} robust accuracy on the test part"
    else:
        match = "at robust accuracy that does not differ on the test part"
    return f"- {NAMES[ours]} against {NAMES[other]}: {result}, {match}."


def _means(config: dict[str, Any], rows: list[Row]) -> str:
    found, lines = chosen(rows), []
    base = found["none"]
    for method, by_seed in found.items():
        tests = {q: [row["test"][q] for row in by_seed.values()] for q in QUANTITIES}
        weights = [row["weight"] for row in by_seed.values()]
        reached = sum(row["validation"]["robust_accuracy"] >= config["target"] for row in by_seed.values())
        price = [row["test"]["nominal"] - base[s]["test"]["nominal"] for s, row in by_seed.items()]
        lines.append(
            [
                NAMES[method],
                "-" if method == "none" else f"{np.exp(np.mean(np.log(weights))):.2f}",
                "-" if method == "none" else f"{reached} of {len(by_seed)}",
                *(f"{np.mean(values):.3f}" for values in tests.values()),
                "0" if method == "none" else interval_text(bootstrap_interval(price)),
            ]
        )
    heads = [head for head, _ in QUANTITIES.values()]
    return table(["method", "λ (units)", "target reached", *heads, "price of robustness"], lines)


def _differences(rows: list[Row]) -> str:
    lines = []
    for ours, other in PAIRS:
        cells = [interval_text(compare(rows, ours, other, quantity)) for quantity in QUANTITIES]
        lines.append([f"{NAMES[ours]} − {NAMES[other]}", *cells])
    return table(["paired difference", *(head for head, _ in QUANTITIES.values())], lines)


def _picture(config: dict[str, Any], rows: list[Row], path: Path) -> None:
    drawn, (front, forest) = figure(2, width=5.0, height=4.4)
    for method, name in NAMES.items():
        colour = PAINT[method]
        seen = [row["validation"] for row in rows if row["method"] == method]
        front.scatter(
            [s["robust_accuracy"] for s in seen],
            [s["nominal"] for s in seen],
            *(12, colour),
            alpha=0.35,
            linewidths=0,
        )
        tests = [row["test"] for row in rows if row["method"] == method and row["chosen"]]
        front.scatter(
            np.mean([t["robust_accuracy"] for t in tests]),
            np.mean([t["nominal"] for t in tests]),
            *(70, colour),
            label=name,
            edgecolors="white",
            zorder=3,
        )
    front.axvline(config["target"], color="black", linewidth=0.8, linestyle=":")
    front.set(
        xlabel="robust accuracy",
        ylabel="nominal loss",
        yscale="log",
        title="every run (validation); large: chosen, test mean",
    )
    front.title.set_fontsize(9)
    front.legend(fontsize=7, frameon=False)
    for place, (ours, other) in enumerate(reversed(PAIRS)):
        mean, low, high = compare(rows, ours, other, "nominal")
        colour = PAINT[ours]
        forest.errorbar(
            mean, place, xerr=[[mean - low], [high - mean]], fmt="o", color=colour, capsize=3, markersize=5
        )
    forest.axvline(0, color="black", linewidth=0.8)
    forest.set_yticks(
        range(len(PAIRS)), [f"{NAMES[o]} −\n{NAMES[b]}" for o, b in reversed(PAIRS)], fontsize=7
    )
    forest.set(xlabel="difference of nominal loss (test), 95 % interval", title="negative: AAJR pays less")
    forest.title.set_fontsize(9)
    save(drawn, path)


def report(header: dict[str, Any], rows: list[Row], folder: Path) -> str:
    """The page; draws ``digits.png`` into the folder."""
    config = header["config"]
    _picture(config, rows, folder / "digits.png")
    seconds = sum({row["task"]: row["seconds"] for row in rows}.values())
    strong, inner = config["attack"], config["inner"]
    verdicts = "\n".join(verdict(rows, ours, other) for ours, other in PAIRS)
    return f"""# Price of robustness on digits

`python -m experiments digits` ({config["seeds"]} seeds). {environment_line(header, seconds)}

## Question

A policy tells the class of an image and, with a second head, four quantities of it (ink, centre of mass across and
down, slant). The adversary attacks the class alone. At the same robust accuracy, what does each way of regularising
cost in nominal loss (cross-entropy plus mean squared error of the utilities, without an adversary)?

## Protocol

- scikit-learn's digits, pixels in [0, 1], {"/".join(map(str, config["sizes"]))} images for training, validation and
  test, drawn anew for every seed. Two hidden layers of {config["width"]} GELU units, Adam, {config["epochs"]} epochs. A
  seed fixes split, start, order of batches and starts of the ascents for all methods alike.
- Training loss: nominal loss + λ · penalty at all points of an ascent on the batch: {inner["steps"]} normalised steps
  of {inner["step"]} radii in an l2 ball of radius {config["radius"]}. The loss itself stays nominal: robustness comes
  from the penalty. All penalties look at the same kind of points; they differ in direction and metric.
- λ is counted in units of 1 over the penalty of the unregularised policy. Every method gets {config["budget"]} values,
  a bisection of log λ towards a robust accuracy of {config["target"]} on the validation part. Of the values that reach
  it there, the one with the smallest nominal validation loss is tested; if none does, the most robust one.
- Robust accuracy: images classified rightly at every point of every attack: {strong["steps"]} normalised steps of
  {" and ".join(map(str, strong["step"]))} radii, {strong["restarts"]} restarts each from uniform starts, on
  {" and ".join(strong["losses"])}.
- Primary quantity: paired difference of nominal test loss, mean over seeds, 95 % percentile bootstrap interval over
  seeds (10,000 resamples). Everything else is secondary; intervals are not corrected for their number. This analysis
  was committed before the runs; radius, target and range of λ come from a pilot on other seeds (100 and up).

## Result

![Pareto front and paired differences](digits.png)

{_means(config, rows)}

Paired differences on the test part; bold where the interval leaves out zero. Less is better for the first three.

{_differences(rows)}

{verdicts}

The global penalties in the Fisher metric are a control: they tell what the direction contributes from what the metric
does. Random direction and Frobenius are the same penalty in expectation up to a factor, so they must agree up to the
noise of their draws. λ was matched on {config["sizes"][1]} validation images, so that robust accuracy on the test part
agrees up to sampling only; its difference is in the table.

## Limits

One small data set, one architecture, one radius and one target; an l2 adversary of the class alone, the same loss in
training and evaluation. Robustness comes from the penalty; nothing here is trained on adversarial examples. The l2
penalties weigh class logits and utilities alike, so that what they cost depends on the scale of both. `spectral` takes
{config["power_iterations"]} power iterations from a random start at every batch. Cross-entropy and utility error may
move in opposite directions while their sum falls: read the columns, not the sum alone.
"""
