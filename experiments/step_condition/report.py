"""The page on the step condition, drawn from its rows alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ..plots import COLOURS, figure, save
from ..store import Row
from ..summaries import environment_line, table
from .closed import EDGES, FAMILIES, PROJECTIONS, STEPS

__all__ = ["report", "totals"]


def totals(rows: list[Row], **wanted: Any) -> dict[str, int]:
    """Sums of the counts of the rows that have these values."""
    chosen = [row for row in rows if all(row.get(name) == value for name, value in wanted.items())]
    names = [name for name, value in chosen[0].items() if isinstance(value, int) and name not in MARKS]
    return {name: sum(row[name] for row in chosen) for name in names}


MARKS = ("of", "seed", "factor")


def _count(number: int) -> str:
    return f"{number:,}"


def _closed(rows: list[Row]) -> str:
    lines = []
    for step in STEPS:
        for projection in PROJECTIONS:
            t = totals(rows, step=step, projection=projection)
            lines.append(
                [step, projection]
                + [_count(t[name]) for name in ("trials", "falls", "held", "tight", "held_falls")]
                + [
                    f"{_count(t['special'])}: {t['special_falls']}",
                    f"{_count(t['carried'])}: {t['carried_falls']}",
                ]
            )
    whole = totals([row for row in rows if row["family"] != "network"])
    lines.append(
        ["**all**", ""]
        + [f"**{_count(whole[name])}**" for name in ("trials", "falls", "held", "tight", "held_falls")]
        + [
            f"**{_count(whole['special'])}: {whole['special_falls']}**",
            f"**{_count(whole['carried'])}: {whole['carried_falls']}**",
        ]
    )
    heads = ["step", "projection", "steps", "falls", "condition holds", "of these tight", "**and falls**"]
    return table([*heads, "special case: falls", "carried over: falls"], lines)


def _examples(rows: list[Row]) -> str:
    lines = []
    for scope in ("sequence", "token", "agent"):
        for step in ("normalized", "sign"):
            for projection in PROJECTIONS[1:]:
                t = totals(rows, step=step, projection=projection, scope=scope)
                if t["carried_falls"]:
                    lines.append([step, scope, projection, _count(t["carried"]), t["carried_falls"]])
    return table(["step", "scope", "projection", "steps within the formula", "falls"], lines)


#: kind -> (what tells its runs apart, how that is written)
KINDS = {
    "raw": ("factor", "raw, η = {:g} · 2/κ₀"),
    "ball": ("share", "normalised in a ball, α = {:g} radii"),
}


def _networks(rows: list[Row]) -> str:
    lines = []
    for kind, (key, form) in KINDS.items():
        for value in dict.fromkeys(row[key] for row in rows if row.get("kind") == kind):
            t = totals(rows, kind=kind, **{key: value})
            lines.append(
                [
                    form.format(value),
                    _count(t["trials"]),
                    f"{t['projected'] / t['trials']:.1%}",
                    f"{1 - t['held'] / t['trials']:.1%}",
                    f"{t['falls'] / t['trials']:.2%}",
                    t["held_falls"],
                ]
            )
    return table(
        ["step", "steps", "projected", "condition violated", "non-monotone", "held, and falls"], lines
    )


def _binned(rows: list[Row]) -> tuple[np.ndarray, np.ndarray]:
    """Centres of the bins of ηκ with at least five steps, and the fraction that falls."""
    chosen = [row for row in rows if "bins" in row]
    count = np.sum([row["bins"] for row in chosen], 0)
    fell = np.sum([row["bins_falls"] for row in chosen], 0)
    centres = np.concatenate([[EDGES[0] * 2**-0.25], np.asarray(EDGES) * 2**0.25])
    enough = count >= 5
    return centres[enough], fell[enough] / count[enough]


def _picture(rows: list[Row], path: Path) -> None:
    drawn, (closed, sampled, by_eta) = figure(3, width=3.9, height=3.4)
    for colour, family in zip(COLOURS, FAMILIES):
        own = [row for row in rows if row["family"] == family]
        closed.plot(*_binned(own), "o-", color=colour, ms=4, label=family)
    seeds = sorted({row["seed"] for row in rows if row["family"] == "network"})
    raw = [row for row in rows if row.get("kind") == "raw"]
    sampled.plot(*_binned(raw), "o-", color=COLOURS[2], ms=4)
    for axis, title in ((closed, "closed-form losses, raw steps"), (sampled, "trained networks, raw steps")):
        axis.axvline(2, color="black", linestyle=":", linewidth=1)
        axis.set(xscale="log", xlabel="ηκ, κ of the step's own segment", title=title)
        axis.set_xticks([0.25, 0.5, 1, 2, 4, 8, 16, 32, 64], ["¼", "½", "1", "2", "4", "8", "16", "32", "64"])
        axis.minorticks_off()
    closed.set(ylabel="non-monotone fraction")
    closed.legend(frameon=False)
    for colour, seed in zip(COLOURS, seeds):
        own = [row for row in raw if row["seed"] == seed]
        by_eta.plot(
            [r["eta"] for r in own], [r["falls"] / r["trials"] for r in own], "o-", color=colour, ms=3
        )
        by_eta.axvline(2 / own[0]["kappa_0"], color=colour, linestyle=":", linewidth=1)
    by_eta.set(xscale="log", xlabel="η (dotted: 2/κ₀ of each network)", title="the same against η")
    for axis in (closed, sampled, by_eta):
        axis.title.set_fontsize(9)
    save(drawn, path)


def report(header: dict[str, Any], rows: list[Row], folder: Path) -> str:
    """The page; draws ``step-condition.png`` into the folder."""
    _picture(rows, folder / "step-condition.png")
    seconds = sum({row["task"]: row["seconds"] for row in rows}.values())
    closed = [row for row in rows if row["family"] != "network"]
    networks = [row for row in rows if row["family"] == "network"]
    whole, raw = totals(closed), totals(networks, kind="raw")
    quadratic = totals(closed, family="quadratic", projection="none")
    config = header["config"]["networks"]
    accuracy = np.mean([row["accuracy"] for row in networks])
    fall, beyond = raw["falls"] / raw["trials"], 1 - raw["held"] / raw["trials"]
    return f"""# The step condition

`python -m experiments step-condition`. {environment_line(header, seconds)}

## Question

An ascent on g moves by Δ; κ is the supremum along that segment of the negative part of its curvature. Is the step
monotone whenever κ‖Δ‖² ≤ 2⟨∇g, Δ⟩, whatever the kind of step and the projection? Where do the bounds on the step size
alone hold, and where not?

## Closed-form losses

Random losses in twelve dimensions (four tokens of three channels), float64: indefinite quadratics, and waves
⟨b, z⟩ + c cos(⟨w, z⟩ + φ), whose κ is known exactly on every segment. `ascend` takes every kind of step in every scope,
unprojected, in l2 and linf balls per group, and in a box given as `project=`; a third of the rows has tokens that may
not be attacked. Step sizes are spread over two orders of magnitude.

*Tight*: ⟨∇g, Δ⟩ < κ‖Δ‖² ≤ 2⟨∇g, Δ⟩, where the condition is near its limit. *Special case*: the step size obeys its own
bound, η ≤ 2/κ (raw), α ≤ 2‖∇g‖/κ with the mean over the groups' norms unprojected and the smallest of them projected
(normalised), α ≤ 2‖∇g‖₁/(nκ) unprojected (sign). *Carried over*: projected steps that obey the formula for unprojected
ones. Numbers after a colon are steps at which the loss fell.

{_closed(closed)}

**{_count(whole["held_falls"])} of {_count(whole["held"])} steps that satisfy the condition fell**, of
{_count(whole["trials"])} in all, and {_count(whole["special_falls"])} of {_count(whole["special"])} within their
special case. On unprojected quadratics the condition is sharp: {_count(quadratic["falls"])} steps fell, and
{_count(quadratic["trials"] - quadratic["held"])} violated it.

Counter-examples: the formulas for unprojected steps do not carry over to projected ones, unless the step is raw or
normalised over the sequence.

{_examples(closed)}

## Trained networks

{config["seeds"]} classifiers of digits (two hidden layers of {config["width"]} tanh units, float64, accuracy
{accuracy:.3f} on unseen images), 96 unseen images, {config["steps"]} steps. Here κ is sampled at {config["samples"]}
points of each segment by `stability_report`, so it can fall short of the supremum. κ₀ is the largest curvature that an
ascent with small steps meets.

{_networks(networks)}

Of all raw steps {beyond:.1%} violate the condition and {fall:.2%} fall: it is sufficient, not necessary.
{raw["held_falls"]} of {_count(raw["held"])} raw steps fell although the sampled κ admitted them.

![Non-monotone fraction against the step size](step-condition.png)
"""
