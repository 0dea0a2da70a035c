"""The figure of the page on language models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ..plots import COLOURS, figure, save
from ..store import Row
from .comparisons import NAMES, PAIRS, PRIMARY, chosen, compare, quantities

__all__ = ["draw"]

PAINT = dict(zip(NAMES, ("#bbbbbb", "#888888", "#444444", *COLOURS)))


def draw(config: dict[str, Any], rows: list[Row], path: Path) -> None:
    """Perplexity against radius and against replaced tokens; paired differences; the adapted model."""
    drawn, (radii, tokens, forest, adapted) = figure(4, width=3.9, height=3.7)
    tested, part = chosen(rows, "scratch"), config["scratch"]
    at = [0.0, *(factor * part["radius"] for factor in part["evaluation"]["radii"])]
    for method, by_seed in tested.items():
        tests = [row["test"] for row in by_seed.values()]
        robust = np.exp(np.mean([[test["start"], *test["embedding"]] for test in tests], 0))
        radii.plot(at, robust, "o-", color=PAINT[method], ms=3, linewidth=1, label=NAMES[method])
        replaced = np.exp(np.mean([test["substitution"] for test in tests], 0))
        tokens.plot(range(len(replaced)), replaced, "o-", color=PAINT[method], ms=3, linewidth=1)
    radii.set(
        xlabel="radius in norms of a token", ylabel="perplexity", yscale="log", title="embedding attack"
    )
    tokens.set(xlabel="tokens replaced", ylabel="perplexity", title="substitution attack")
    radii.legend(fontsize=6.5, frameon=False)
    _forest(part, rows, forest)
    _adapted(config["adapted"], rows, adapted)
    for axis in (radii, tokens, forest, adapted):
        axis.title.set_fontsize(9)
    save(drawn, path)


def _forest(config: dict[str, Any], rows: list[Row], axis: Any) -> None:
    known = quantities(config)
    for shift, (name, marker) in enumerate(zip(PRIMARY, ("o", "s"))):
        for place, (ours, other) in enumerate(reversed(PAIRS)):
            mean, low, high = compare(rows, ours, other, known[name][2])
            axis.errorbar(
                *(mean, place + 0.2 * (0.5 - shift)),
                xerr=[[mean - low], [high - mean]],
                fmt=marker,
                color=COLOURS[shift],
                capsize=3,
                markersize=4,
                label=name if place == 0 else None,
            )
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set_yticks(range(len(PAIRS)), [NAMES[other] for _, other in reversed(PAIRS)], fontsize=7)
    axis.set(xlabel="loss of AAJR − that of", title="from scratch, 95 % intervals; negative: AAJR better")
    axis.legend(fontsize=7, frameon=False)


def _adapted(config: dict[str, Any], rows: list[Row], axis: Any) -> None:
    columns = ("no attack", f"embeddings {config['radius']:g}", "tokens")
    for method, by_seed in chosen(rows, "adapted").items():
        tests = [row["test"] for row in by_seed.values()]
        values = [[test["start"], test["embedding"][0], test["substitution"][-1]] for test in tests]
        axis.plot(
            *(range(3), np.exp(np.mean(values, 0)), "o-"),
            color=PAINT[method],
            ms=4,
            linewidth=0.8,
            label=NAMES[method],
        )
    axis.set_xticks(range(3), columns, fontsize=7)
    axis.set(ylabel="perplexity", yscale="log", title="SmolLM2 with LoRA, one seed: no claim")
    axis.legend(fontsize=6.5, frameon=False)
