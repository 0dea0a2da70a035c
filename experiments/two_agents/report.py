"""The page on two agents: written before the runs, and drawn from their rows alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from .. import summaries
from ..plots import COLOURS, figure, save
from ..store import Row
from ..summaries import bootstrap_interval, environment_line, interval_text, table
from .page import PAGE, PILOT
from .training import SMOOTHED

__all__ = ["NAMES", "chosen", "compare", "report", "verdict"]

NAMES = {
    "none": "none (w chosen)",
    "frobenius": "global Frobenius",
    "spectral": "global spectral",
    "aajr-joint": "AAJR, joint",
    "aajr-agents": "AAJR, per agent",
}
PAINT = dict(zip(NAMES, ("#444444", *COLOURS)))
OTHERS = ("none", "frobenius", "spectral")
PAIRS = [(ours, other) for ours in ("aajr-joint", "aajr-agents") for other in OTHERS]
PAIRS.append(("aajr-agents", "aajr-joint"))

Value = Callable[[Row], float | None]


def _test(name: str, factor: float = 1.0) -> Value:
    return lambda row: factor * float(row["test"][name])


def _run(name: str, factor: float = 1.0) -> Value:
    return lambda row: None if row[name] is None else factor * float(row[name])


#: quantity -> (heading, digits, what it is of a chosen row; None where the run broke off)
QUANTITIES: dict[str, tuple[str, int, Value]] = {
    "variance": ("variance × 100", 2, _run("variance", 100)),
    "falls": ("non-monotone, %", 2, _run("falls", 100)),
    "robust": ("robust joint payoff", 3, _test("robust_joint")),
    "joint": ("clean joint payoff", 3, _test("joint")),
    "share": ("share of the optimum", 3, _test("share")),
    "jitter": ("jitter × 100", 2, _run("jitter", 100)),
    "drop": ("largest drop", 3, _run("drop")),
    "tail": ("gradient tail", 1, _run("tail")),
    "falls_after": ("non-monotone after, %", 2, _test("falls", 100)),
    "kappa": ("κ after", 3, _test("kappa")),
}
PRIMARY = {"variance": "variance", "falls": "non-monotone fraction", "robust": "robust joint payoff"}


def chosen(rows: list[Row]) -> dict[str, dict[int, Row]]:
    """method -> seed -> the row that was tested, of the models from scratch."""
    return summaries.chosen([row for row in rows if row["model"] == "scratch"])


def compare(rows: list[Row], ours: str, other: str, quantity: str) -> tuple[float, float, float] | None:
    """Mean over seeds of ours − other, and its 95 % bootstrap interval; None with fewer than two whole pairs."""
    table_of, value = chosen(rows), QUANTITIES[quantity][2]
    pairs = [(value(table_of[ours][s]), value(table_of[other][s])) for s in sorted(table_of[ours])]
    differences = [a - b for a, b in pairs if a is not None and b is not None]
    return bootstrap_interval(differences) if len(differences) > 1 else None


def verdict(rows: list[Row], ours: str, other: str) -> str:
    """One sentence on the primary quantities."""
    parts = []
    for quantity, name in PRIMARY.items():
        found = compare(rows, ours, other, quantity)
        if found is None or found[1] <= 0 <= found[2]:
            parts.append(f"{name} cannot be told from the other's")
        else:
            parts.append(f"{name} **{'lower' if found[0] < 0 else 'higher'}**")
    return f"- {NAMES[ours]} against {NAMES[other]}: {', '.join(parts)}."


def _means(rows: list[Row]) -> str:
    lines = []
    for method, name in NAMES.items():
        tested = list(chosen(rows)[method].values())
        cells: list[object] = [name, f"{np.exp(np.mean([np.log(row['knob']) for row in tested])):.3g}"]
        for _, digits, value in QUANTITIES.values():
            values = [v for row in tested if (v := value(row)) is not None]
            cells.append(f"{np.mean(values):.{digits}f}" if values else "-")
        every = [row for row in rows if row["method"] == method and row["model"] == "scratch"]
        broken = sum(not row["finite"] for row in every)
        slow = sum(row["collapsed"] for row in tested), sum(row["collapsed"] for row in every)
        cells += [
            f"{slow[0]} of {len(tested)}",
            f"{slow[1]} of {len(every)}",
            f"{broken} of {len(every)}",
        ]
        lines.append(cells)
    ends = ["collapsed (chosen)", "collapsed (all)", "not finite (all)"]
    return table(["method", "w or λ", *(head for head, _, _ in QUANTITIES.values()), *ends], lines)


def _differences(rows: list[Row]) -> str:
    lines = []
    for ours, other in PAIRS:
        cells = [compare(rows, ours, other, quantity) for quantity in QUANTITIES]
        texts = [
            "-" if c is None else interval_text(c, digits)
            for c, (_, digits, _) in zip(cells, QUANTITIES.values())
        ]
        lines.append([f"{NAMES[ours]} − {NAMES[other]}", *texts])
    return table(["paired difference", *(head for head, _, _ in QUANTITIES.values())], lines)


def _language(rows: list[Row]) -> str:
    lines = []
    for row in rows:
        if row["model"] != "language":
            continue
        test = row["test"]
        numbers = [row["before"]["share"], test["share"], test["joint"], test["robust_joint"]]
        numbers += [row["variance"] and 100 * row["variance"], row["tail"], test["kappa"]]
        cells = ["-" if n is None else f"{n:.3f}" for n in numbers]
        falls = "-" if row["falls"] is None else f"{100 * row['falls']:.1f}"
        lines.append([NAMES[row["method"]].split(" (")[0], *cells, falls, f"{row['seconds'] / 60:.1f}"])
    heads = ["share before", "share after", "clean joint payoff", "robust joint payoff", "variance × 100"]
    return table(["method", *heads, "gradient tail", "κ after", "non-monotone, %", "minutes"], lines)


def _play(rows: list[Row]) -> str:
    """How far sampled play was from the exact expectation, in standard errors."""
    plays = [row["test"]["play"] for row in rows if row["chosen"]]
    away = [abs(p["played"] - p["expected"]) / p["error"] for p in plays if p["error"] > 0]
    return (
        f"In the environment the mean sum of payoffs of the {len(away)} tested pairs was "
        f"{np.mean(away):.2f} standard errors from the exact expectation on average ({np.sqrt(2 / np.pi):.2f} is the "
        f"mean of a normal variable's size), at most {max(away):.2f}."
    )


def _picture(rows: list[Row], path: Path) -> None:
    drawn, (curves, front, forest) = figure(3, width=4.4, height=4.0)
    for method, name in NAMES.items():
        tested = list(chosen(rows)[method].values())
        whole = [row["attacked"] for row in tested if row["finite"]]
        if whole:
            at = SMOOTHED * (np.arange(len(whole[0])) + 0.5)
            curves.plot(at, np.mean(whole, 0), color=PAINT[method], linewidth=1.4)
        payoffs = np.asarray([(row["test"]["joint"], row["test"]["robust_joint"]) for row in tested])
        front.scatter(*payoffs.T, s=12, color=PAINT[method], alpha=0.35, linewidths=0)
        front.scatter(*payoffs.mean(0), s=70, color=PAINT[method], edgecolors="white", zorder=3, label=name)
    curves.set(xlabel="update", ylabel="payoff under attack, share of the optimum")
    front.legend(fontsize=7, frameon=False)
    front.set(xlabel="clean joint payoff", ylabel="robust joint payoff", title="test games; large: means")
    front.title.set_fontsize(9)
    labels = []
    for place, (ours, other) in enumerate(reversed(PAIRS)):
        labels.append(f"{NAMES[ours]} −\n{NAMES[other]}")
        found = compare(rows, ours, other, "robust")
        if found is None:
            continue
        mean, low, high = found
        forest.errorbar(
            *(mean, place),
            xerr=[[mean - low], [high - mean]],
            fmt="o",
            color=PAINT[ours],
            capsize=3,
            markersize=5,
        )
    forest.axvline(0, color="black", linewidth=0.8)
    forest.set_yticks(range(len(PAIRS)), labels, fontsize=7)
    forest.set(xlabel="difference of robust joint payoff", title="positive: AAJR keeps more")
    forest.title.set_fontsize(9)
    save(drawn, path)


def report(header: dict[str, Any], rows: list[Row], folder: Path) -> str:
    """The page; draws ``two-agents.png`` into the folder."""
    config = header["config"]
    _picture(rows, folder / "two-agents.png")
    seconds = sum({row["task"]: row["seconds"] for row in rows}.values())
    return PAGE.format(
        **{name: config[name] for name in ("seeds", "games", "batch", "updates", "temperature", "radius")},
        **config["game"],
        **config["inner"],
        model=config["model"],
        strong=config["attack"],
        language=config["language_model"],
        rate=config["learning_rate"],
        clip=config["clip"],
        total=1 + config["game"]["regard"],
        token=config["model"]["width"] ** 0.5,
        iterations=config["power_iterations"],
        mixes=" and ".join(map(str, config["mixes"])),
        weights=" and ".join(map(str, config["weights"])),
        shares=" and ".join(map(str, config["attack"]["step"])),
        pilot=PILOT,
        environment=environment_line(header, seconds),
        means=_means(rows),
        differences=_differences(rows),
        verdicts="\n".join(verdict(rows, *pair) for pair in PAIRS),
        language_table=_language(rows),
        play=_play(rows),
    )
