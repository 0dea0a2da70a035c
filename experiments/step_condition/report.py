"""The page on the step condition, drawn from its rows only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from common.pages import table
from common.plots import COLOURS, figure, save

from ..store import Row
from ..summaries import page
from .closed import EDGES, FAMILIES, PROJECTIONS, SCOPES, STEPS

#: integers of a row that are no counts
MARKS = ("of", "seed", "factor")


def totals(rows: list[Row], **wanted: Any) -> dict[str, int]:
    """Sums of the counts of the rows that have these values."""
    own = [row for row in rows if all(row.get(name) == value for name, value in wanted.items())]
    names = [name for name, value in own[0].items() if isinstance(value, int) and name not in MARKS]
    return {name: sum(row[name] for row in own) for name in names}


def _closed(rows: list[Row]) -> str:
    def cells(t: dict[str, int], form: str = "{}") -> list[str]:
        counts = [f"{t[name]:,}" for name in ("trials", "falls", "held", "tight", "held_falls")]
        ends = [f"{t[name]:,}: {t[f'{name}_falls']}" for name in ("special", "carried")]
        return [form.format(text) for text in counts + ends]

    lines = [
        [step, projection, *cells(totals(rows, step=step, projection=projection))]
        for step in STEPS
        for projection in PROJECTIONS
    ]
    heads = ["step", "projection", "steps", "falls", "condition holds", "of these tight", "**and falls**"]
    heads += ["special case: falls", "carried over: falls"]
    return table(heads, [*lines, ["**all**", "", *cells(totals(rows), "**{}**")]])


def _examples(rows: list[Row]) -> str:
    lines = []
    for scope in SCOPES:
        for step in ("normalized", "sign"):
            for projection in PROJECTIONS[1:]:
                t = totals(rows, step=step, projection=projection, scope=scope)
                if t["carried_falls"]:
                    lines.append([step, scope, projection, f"{t['carried']:,}", t["carried_falls"]])
    return table(["step", "scope", "projection", "steps within the formula", "falls"], lines)


#: kind -> (key that tells its runs apart, how that is written)
KINDS = {
    "raw": ("factor", "raw, η = {:g} · 2/κ₀"),
    "ball": ("share", "normalised in a ball, α = {:g} radii"),
}


def _networks(rows: list[Row]) -> str:
    lines = []
    for kind, (key, form) in KINDS.items():
        for value in dict.fromkeys(row[key] for row in rows if row.get("kind") == kind):
            t = totals(rows, kind=kind, **{key: value})
            steps, held = t["trials"], t["held"]
            shares = f"{t['projected'] / steps:.1%}", f"{1 - held / steps:.1%}", f"{t['falls'] / steps:.2%}"
            lines.append([form.format(value), f"{steps:,}", *shares, t["held_falls"]])
    heads = ["step", "steps", "projected", "condition violated", "non-monotone", "held, and falls"]
    return table(heads, lines)


def _binned(rows: list[Row]) -> tuple[np.ndarray, np.ndarray]:
    """Centres of the bins of ηκ with at least five steps, and the fraction that falls."""
    count, fell = (np.sum([row[name] for row in rows if "bins" in row], 0) for name in ("bins", "bins_falls"))
    centres = np.concatenate([[EDGES[0] * 2**-0.25], np.asarray(EDGES) * 2**0.25])
    enough = count >= 5
    return centres[enough], fell[enough] / count[enough]


def _picture(rows: list[Row], path: Path) -> None:
    drawn, (closed, sampled, by_eta) = figure(3, width=3.9, height=3.4)
    for colour, family in zip(COLOURS, FAMILIES):
        own = [row for row in rows if row["family"] == family]
        closed.plot(*_binned(own), "o-", color=colour, ms=4, label=family)
    raw = [row for row in rows if row.get("kind") == "raw"]
    sampled.plot(*_binned(raw), "o-", color=COLOURS[2], ms=4)
    for axis, title in ((closed, "closed-form losses, raw steps"), (sampled, "trained networks, raw steps")):
        axis.axvline(2, color="black", linestyle=":", linewidth=1)
        axis.set(xscale="log", xlabel="ηκ, κ of the step's own segment", title=title)
        axis.set_xticks([0.25, 0.5, 1, 2, 4, 8, 16, 32, 64], ["¼", "½", "1", "2", "4", "8", "16", "32", "64"])
        axis.minorticks_off()
    closed.set(ylabel="non-monotone fraction")
    for colour, seed in zip(COLOURS, sorted({row["seed"] for row in raw})):
        own = [row for row in raw if row["seed"] == seed]
        fractions = [row["falls"] / row["trials"] for row in own]
        by_eta.plot([row["eta"] for row in own], fractions, "o-", color=colour, ms=3)
        by_eta.axvline(2 / own[0]["kappa_0"], color=colour, linestyle=":", linewidth=1)
    by_eta.set(xscale="log", xlabel="η (dotted: 2/κ₀ of each network)", title="the same against η")
    save(drawn, path)


def report(header: dict[str, Any], rows: list[Row], folder: Path) -> str:
    """The page; draws ``step-condition.png`` into the folder."""
    _picture(rows, folder / "step-condition.png")
    closed = [row for row in rows if row["family"] != "network"]
    networks = [row for row in rows if row["family"] == "network"]
    raw = totals(networks, kind="raw")
    quadratic = totals(closed, family="quadratic", projection="none")
    return page(
        *(__file__, header, rows),
        closed=_closed(closed),
        examples=_examples(closed),
        networks=_networks(networks),
        whole=totals(closed),
        quadratic=quadratic | {"violated": quadratic["trials"] - quadratic["held"]},
        raw=raw,
        accuracy=np.mean([row["accuracy"] for row in networks]),
        fall=raw["falls"] / raw["trials"],
        beyond=1 - raw["held"] / raw["trials"],
    )
