"""The rows that were tested, bootstrap intervals of paired differences, and tables."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .store import Row

__all__ = ["bootstrap_interval", "chosen", "environment_line", "interval_text", "table"]


def bootstrap_interval(
    values: Sequence[float], *, level: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> tuple[float, float, float]:
    """Mean, and the percentile bootstrap interval of the mean over independent repetitions (seeds).

    Args:
        values: one number per repetition; of a paired comparison, the differences.
        level: of the interval.
        resamples: drawn with replacement.
        seed: of the resampling.

    Raises:
        ValueError: there are fewer than two values, or one is not finite.
    """
    sample = np.asarray(values, dtype=np.float64)
    if sample.ndim != 1 or len(sample) < 2 or not np.isfinite(sample).all():
        raise ValueError(f"values must be two or more finite numbers, got {list(values)}.")
    draws = np.random.default_rng(seed).integers(0, len(sample), (resamples, len(sample)))
    means = sample[draws].mean(1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(sample.mean()), float(low), float(high)


def interval_text(interval: tuple[float, float, float], digits: int = 3, sign: bool = True) -> str:
    """``+0.012 [−0.003, +0.027]``; bold where the interval leaves out zero."""
    form = f"{{:{'+' if sign else ''}.{digits}f}}"
    mean, low, high = (form.format(v).replace("-", "−") for v in interval)
    text = f"{mean} [{low}, {high}]"
    return f"**{text}**" if sign and (interval[1] > 0 or interval[2] < 0) else text


def chosen(rows: Sequence[Row]) -> dict[str, dict[int, Row]]:
    """method -> seed -> the row that was tested."""
    found: dict[str, dict[int, Row]] = {}
    for row in rows:
        if row.get("chosen"):
            found.setdefault(row["method"], {})[row["seed"]] = row
    return found


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def environment_line(header: dict[str, object], seconds: float) -> str:
    """One sentence: versions, commit, time."""
    facts = header["environment"]
    assert isinstance(facts, dict)
    change = ", with changes" if facts["dirty"] else ""
    return (
        f"torch {facts['torch']}, Python {facts['python']}, {facts['cpu'] or facts['machine']}, one thread per task, "
        f"commit {facts['commit']}{change}; {seconds / 60:.1f} minutes of computation in all."
    )
