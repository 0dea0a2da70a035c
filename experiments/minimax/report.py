"""The page on minimax training: written before the runs, and drawn from their rows alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..plots import COLOURS, figure, save
from ..store import Row
from ..summaries import bootstrap_interval, environment_line, interval_text, table

__all__ = ["QUANTITIES", "chosen", "compare", "report"]

NAMES = {
    "plain": "plain minimax (not matched)",
    "none": "none (w matched)",
    "frobenius": "global Frobenius",
    "spectral": "global spectral",
    "random": "random direction",
    "aajr-l2": "AAJR, l2",
    "aajr-fisher": "AAJR, Fisher",
}
PAINT = dict(zip(NAMES, ("#bbbbbb", "#444444", *COLOURS)))
OTHERS = ("none", "frobenius", "spectral", "random")
PAIRS = [("aajr-l2", other) for other in OTHERS]
PAIRS += [("aajr-fisher", other) for other in (*OTHERS, "aajr-l2")]

Value = Callable[[Row], float | None]


def _test(name: str) -> Value:
    return lambda row: float(row["test"][name])


#: quantity -> (heading, digits, what it is of a chosen row; None where the run broke off)
QUANTITIES: dict[str, tuple[str, int, Value]] = {
    "falls": ("non-monotone, %", 2, lambda row: 100 * sum(row["falls"]) / max(len(row["falls"]), 1)),
    "variance": ("variance × 100", 2, lambda row: None if row["variance"] is None else 100 * row["variance"]),
    "jitter": ("jitter × 100", 2, lambda row: None if row["jitter"] is None else 100 * row["jitter"]),
    "robust_loss": ("robust loss", 3, _test("robust_loss")),
    "robust_accuracy": ("robust accuracy", 3, _test("robust_accuracy")),
    "kappa": ("largest κ", 1, _test("kappa")),
    "nominal": ("nominal loss", 3, _test("nominal")),
}
PRIMARY = ("falls", "variance", "robust_loss")
#: drawn and listed by step size; the last one shows how well the runs are matched on images that were not used for it
LISTED = (*PRIMARY, "robust_accuracy", "kappa", "nominal")


def chosen(rows: list[Row]) -> dict[str, dict[tuple[int, float], Row]]:
    """method -> (seed, factor) -> the row that was tested."""
    found: dict[str, dict[tuple[int, float], Row]] = {}
    for row in rows:
        if row["chosen"]:
            found.setdefault(row["method"], {})[row["seed"], row["factor"]] = row
    return found


def compare(
    rows: list[Row], ours: str, other: str, quantity: str, factors: Sequence[float]
) -> tuple[float, float, float] | None:
    """Mean over seeds of ours − other, each the mean over the factors, and its 95 % bootstrap interval.

    A seed at which either broke off at one of the factors is left out; None with fewer than two seeds.
    """
    table_of, value = chosen(rows), QUANTITIES[quantity][2]
    differences = []
    for seed in sorted({seed for seed, _ in table_of[ours]}):
        pairs = [(value(table_of[ours][seed, f]), value(table_of[other][seed, f])) for f in factors]
        whole = [a - b for a, b in pairs if a is not None and b is not None]
        if len(whole) == len(factors):
            differences.append(float(np.mean(whole)))
    return bootstrap_interval(differences) if len(differences) > 1 else None


def _cell(rows: list[Row], ours: str, other: str, quantity: str, factors: Sequence[float]) -> str:
    found = compare(rows, ours, other, quantity, factors)
    return "-" if found is None else interval_text(found, QUANTITIES[quantity][1])


def _values(rows: list[Row], method: str, quantity: str, factor: float) -> list[float]:
    value = QUANTITIES[quantity][2]
    found = [value(row) for (_, f), row in sorted(chosen(rows)[method].items()) if f == factor]
    return [v for v in found if v is not None]


def verdict(rows: list[Row], ours: str, other: str, factors: Sequence[float]) -> str:
    """One sentence on the primary quantities."""
    parts = []
    for quantity, name in zip(
        PRIMARY, ("non-monotone fraction", "variance of the outer loss", "robust loss")
    ):
        found = compare(rows, ours, other, quantity, factors)
        if found is None or found[1] <= 0 <= found[2]:
            parts.append(f"{name} cannot be told from the other's")
        else:
            parts.append(f"{name} **{'lower' if found[0] < 0 else 'higher'}**")
    return f"- {NAMES[ours]} against {NAMES[other]}: {', '.join(parts)}."


def _by_factor(rows: list[Row], quantity: str, factors: Sequence[float]) -> str:
    heading, digits, _ = QUANTITIES[quantity]
    lines = []
    for method, name in NAMES.items():
        columns = [_values(rows, method, quantity, factor) for factor in factors]
        lines.append([name, *(f"{np.mean(c):.{digits}f}" if c else "-" for c in columns)])
    return table([heading, *(f"{factor:g} · 2/κ₀" for factor in factors)], lines)


def _matching(config: dict[str, Any], rows: list[Row]) -> str:
    lines = []
    for method, name in NAMES.items():
        tested = list(chosen(rows)[method].values())
        away = [abs(row["validation"]["nominal"] / row["target"] - 1) for row in tested]
        runs = [row for row in rows if row["method"] == method]
        diverged = sum(row["diverged"] for row in runs), len(runs)
        cells = [
            name,
            *(f"{_middle(tested, factor):.3g}" for factor in config["factors"]),
            "-" if method == "plain" else f"{sum(a <= 0.02 for a in away)} of {len(away)}",
            "-" if method == "plain" else f"{max(away):.1%}",
            f"{sum(row['diverged'] for row in tested)} of {len(tested)}",
            f"{diverged[0]} of {diverged[1]}",
        ]
        lines.append(cells)
    heads = [f"knob at {factor:g}" for factor in config["factors"]]
    ends = ["within 2 % of the target", "furthest off", "diverged (chosen)", "diverged (all runs)"]
    return table(["method", *heads, *ends], lines)


def _middle(rows: list[Row], factor: float) -> float:
    """Geometric mean of the chosen w (none) or λ (the others)."""
    return float(np.exp(np.mean([np.log(row["knob"]) for row in rows if row["factor"] == factor])))


def _picture(config: dict[str, Any], rows: list[Row], path: Path) -> None:
    factors = config["factors"]
    drawn, axes = figure(4, width=3.7, height=3.7)
    for number, (method, name) in enumerate(NAMES.items()):
        shift = 2 ** (0.04 * (number - (len(NAMES) - 1) / 2))
        for axis, quantity in zip(axes, PRIMARY):
            points = []
            for factor in factors:
                values = _values(rows, method, quantity, factor)
                if len(values) > 1:
                    points.append((factor * shift, *bootstrap_interval(values)))
            if not points:
                continue
            at, mean, low, high = np.asarray(points).T
            error = [mean - low, high - mean]
            axis.errorbar(at, mean, error, fmt="o-", color=PAINT[method], ms=3, linewidth=1, label=name)
        last = [
            row["falls"] for (_, f), row in chosen(rows)[method].items() if f == factors[-1] and row["finite"]
        ]
        if last:
            axes[3].plot(range(1, len(last[0]) + 1), 100 * np.mean(last, 0), color=PAINT[method])
    for axis, quantity in zip(axes, PRIMARY):
        axis.set(xscale="log", xlabel="η · κ₀ / 2", ylabel=QUANTITIES[quantity][0])
        axis.set_xticks(factors, [f"{factor:g}" for factor in factors])
        axis.minorticks_off()
        axis.axvline(1, color="black", linewidth=0.8, linestyle=":")
    axes[3].set(xlabel="epoch", ylabel="non-monotone, %", title=f"η = {factors[-1]:g} · 2/κ₀")
    axes[3].title.set_fontsize(9)
    axes[0].legend(fontsize=6.5, frameon=False)
    save(drawn, path)


def report(header: dict[str, Any], rows: list[Row], folder: Path) -> str:
    """The page; draws ``minimax.png`` into the folder."""
    config = header["config"]
    factors = config["factors"]
    _picture(config, rows, folder / "minimax.png")
    seconds = sum({row["task"]: row["seconds"] for row in rows}.values())
    strong, kappas = config["attack"], [row["kappa_0"] for row in rows]
    listed = "\n\n".join(_by_factor(rows, quantity, factors) for quantity in LISTED)
    heads = [heading for heading, _, _ in QUANTITIES.values()]
    pooled = [
        [f"{NAMES[a]} − {NAMES[b]}", *(_cell(rows, a, b, q, factors) for q in QUANTITIES)] for a, b in PAIRS
    ]
    single = [
        [f"{NAMES[a]} − {NAMES[b]}", *(_cell(rows, a, b, "robust_loss", [f]) for f in factors)]
        for a, b in PAIRS
    ]
    falling = [
        [f"{NAMES[a]} − {NAMES[b]}", *(_cell(rows, a, b, "falls", [f]) for f in factors)] for a, b in PAIRS
    ]
    steps = [f"{factor:g} · 2/κ₀" for factor in factors]
    verdicts = "\n".join(verdict(rows, a, b, factors) for a, b in PAIRS)
    return f"""# Stability of minimax training

`python -m experiments minimax` ({config["seeds"]} seeds). {environment_line(header, seconds)}

## Question

A policy is trained on its own inner maximiser: the loss after a short gradient ascent on the input. With the
inner step η near and beyond the bound 2/κ₀ of the policy that training starts from, how often does an inner step
lower the loss that it climbs, how much does the outer loss vary, which runs diverge, and how robust is the
result, without a penalty and with each way of regularising, **at the same nominal loss**?

## Protocol

- Data as in [the digits experiment](digits.md): {"/".join(map(str, config["sizes"]))} images for training,
  validation and test, drawn anew for every seed; ten classes and four utilities; the adversary attacks the
  classes alone. The policy has two hidden layers of {config["width"]} sine units, the first one with initial
  weights times {config["gain"]:g}: its curvature is large enough for inner steps to overshoot.
- Every seed trains one unregularised policy on the nominal loss ({config["pretraining"]["epochs"]} epochs of
  Adam). κ₀ is the largest negative curvature that an ascent with {config["curvature_steps"]} small steps meets
  from its validation images ({min(kappas):.1f} to {max(kappas):.1f}).
- From there every run takes {config["epochs"]} epochs of Adam (learning rate {config["learning_rate"]:g}) on
  (nominal + w · adversarial) / (1 + w) + λ · penalty. Adversarial is the loss of classes and utilities at the
  last point of {config["inner_steps"]} raw gradient steps of size η in an l2 ball of radius {config["radius"]:g},
  from the clean image; η is {", ".join(f"{factor:g}" for factor in factors)} times 2/κ₀. The penalty is taken at
  all points of that same ascent. A seed fixes split, start and batches for all methods alike.
- Plain minimax is w = 1, λ = 0. **Common target: {config["price"]:g} times its nominal validation loss**, for
  every seed and η. Every method gets {config["budget"]} runs to meet it, a stride on a logarithmic scale until
  the target is bracketed, then interpolation: the penalties search λ at w = 1 (in units of 1 over the penalty of
  the starting policy), *none* searches w at λ = 0, so that it may spend the same nominal loss on the adversary's
  weight. The run whose nominal validation loss is nearest to the target is tested, whatever its robustness.
- Non-monotone: fraction of all inner steps of training that lower the loss they climb, by more than rounding.
  Variance: of the batches' adversarial loss over the second half of training; jitter: half its mean squared
  change from one update to the next over all of training, which trends do not enter. Batches are the same for all
  methods. Diverged: a loss or gradient was not finite, or the adversarial loss of the last epoch is above that of
  a policy that does not look at its input (ln 10 + 1).
- Robust loss: mean over test images of the largest cross-entropy at the image or any point of any attack:
  {strong["steps"]} normalised steps of {" and ".join(map(str, strong["step"]))} radii from uniform starts, on
  {" and ".join(strong["losses"])}; robust accuracy likewise. They do not depend on η, except through training.
- Largest κ: negative curvature along the inner ascent from the test images after training, sampled at 5 points of
  every segment.
- Primary: paired differences of non-monotone fraction, variance and robust loss, averaged over the step sizes,
  mean over seeds, 95 % percentile bootstrap interval over seeds (10,000 resamples). Everything else is secondary;
  intervals are not corrected for their number. This analysis was committed before the runs; architecture, start,
  radius, price and ranges of the search come from a pilot on other seeds (100 to 102).
- What the pilot saw: minimax training itself lowers the curvature, so that with GELU or tanh units, or from an
  untrained start, hardly any inner step fell at any η; hence the sine units, the trained start and the radius,
  chosen such that plain training begins with about a tenth of its steps falling at the largest η. At matched
  nominal loss the penalties differed little from each other; AAJR in the Fisher metric had the larger robust loss
  at small η.

## Result

![Non-monotone fraction, variance and robust loss against the inner step](minimax.png)

Means over seeds; bars in the figure are 95 % intervals over seeds, unpaired.

{listed}

Paired differences, averaged over the step sizes; bold where the interval leaves out zero. Less is better, but for
robust accuracy.

{table(["paired difference", *heads], pooled)}

{verdicts}

Robust loss by step size:

{table(["paired difference", *steps], single)}

Non-monotone fraction in percent by step size:

{table(["paired difference", *steps], falling)}

How well the runs are matched: geometric mean of the chosen knob (w for *none*, λ for the penalties) at each
multiple of 2/κ₀, distance of the nominal validation loss from the target, and runs that diverged.

{_matching(config, rows)}

## Limits

One small data set, one architecture with deliberately large curvature, one radius, one price. Cross-entropy is
convex in the logits, so that negative curvature comes from the policy's own second derivative, which none of the
penalties bounds: they act on it by making the policy smoother. Robustness is matched on nothing; nominal loss is
matched on {config["sizes"][1]} validation images, so that on the test part it agrees up to sampling only (the
last of the tables of means). The l2 penalties weigh class logits and utilities alike. The global penalties were
not run in the Fisher metric here; [the digits experiment](digits.md) tells direction and metric apart. `spectral`
takes {config["power_iterations"]} power iterations from a random start at every batch.
"""
