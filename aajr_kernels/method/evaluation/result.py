"""Result of an evaluation: losses by row, their means with intervals, a table and a picture."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...files import one_line
from .scene import Found

__all__ = ["Evaluation", "Interval"]

#: mean, lower and upper bound
Interval = tuple[float, float, float]
#: of the bootstrap, and how many of them are in memory at once
RESAMPLES, AT_ONCE = 10_000, 500


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Losses of R rows, float64 on the CPU.

    Attributes:
        clean: ``[R]``, without an attack.
        attacked: of every attack ``[R]``.
        curves: of every attack ``[K + 1, R]``, after 0, 1, ... K steps or replacements.
        calls: of every attack, forwards of a batch with a gradient, and without, over all batches.
        tokens: of every attack that puts tokens in, the ids ``[B, N']`` of every batch.
    """

    clean: Tensor
    attacked: dict[str, Tensor]
    curves: dict[str, Tensor]
    calls: dict[str, tuple[int, int]]
    tokens: dict[str, list[Tensor]] = field(default_factory=dict)

    @classmethod
    def of(cls, clean: list[Tensor], found: Mapping[str, list[Found]]) -> Evaluation:
        """From what was found in every batch."""
        tokens = {
            name: [one.tokens.cpu() for one in several if one.tokens is not None]
            for name, several in found.items()
        }
        return cls(
            _rows(clean),
            {name: _rows(one.losses for one in several) for name, several in found.items()},
            {name: _rows(one.curve for one in several) for name, several in found.items()},
            {
                name: (sum(one.calls[0] for one in several), sum(one.calls[1] for one in several))
                for name, several in found.items()
            },
            {name: ids for name, ids in tokens.items() if ids},
        )

    @property
    def worst(self) -> Tensor:
        """``[R]``, the largest loss of every row: without an attack or under any of them."""
        return torch.stack([self.clean, *self.attacked.values()]).amax(0)

    def losses(self, name: str) -> Tensor:
        """``[R]``, of ``"clean"``, ``"worst"`` or an attack.

        Raises:
            ValueError: there is no such entry.
        """
        entries = {"clean": self.clean, **self.attacked, "worst": self.worst}
        if name not in entries:
            raise ValueError(f"name must be one of {', '.join(entries)}, got {name!r}.")
        return entries[name]

    def interval(self, name: str = "worst", level: float = 0.95) -> Interval:
        """Mean loss over rows and a percentile bootstrap interval of it: 10,000 resamples of rows, the same every time.

        Args:
            name: ``"clean"``, ``"worst"`` or an attack.
            level: of the interval.

        Raises:
            ValueError: unknown name, a level outside (0, 1), or fewer than two rows.
        """
        return bootstrap(self.losses(name), level)

    def rise(self, name: str = "worst", level: float = 0.95) -> Interval:
        """The same of the difference to the clean loss, row by row."""
        return bootstrap(self.losses(name) - self.clean, level)

    def as_dict(self) -> dict[str, Any]:
        """Numbers and lists, for JSON."""
        return {
            "clean": self.clean.tolist(),
            "attacked": {name: losses.tolist() for name, losses in self.attacked.items()},
            "curves": {name: curve.tolist() for name, curve in self.curves.items()},
            "calls": {name: list(calls) for name, calls in self.calls.items()},
            "tokens": {name: [ids.tolist() for ids in several] for name, several in self.tokens.items()},
        }

    @classmethod
    def from_dict(cls, entries: Mapping[str, Any]) -> Evaluation:
        """From :meth:`as_dict`."""
        return cls(
            _numbers(entries["clean"]),
            {name: _numbers(losses) for name, losses in entries["attacked"].items()},
            {name: _numbers(curve) for name, curve in entries["curves"].items()},
            {name: (int(calls[0]), int(calls[1])) for name, calls in entries["calls"].items()},
            {name: [torch.tensor(ids) for ids in several] for name, several in entries["tokens"].items()},
        )

    def summary(self, level: float = 0.95) -> list[dict[str, Any]]:
        """One entry for the clean loss, every attack and the worst: ``name``, ``loss``, ``rise``, ``calls``.

        Intervals as of :meth:`interval`, whose bounds are None with one row; no rise and no calls where there is none.
        """
        several = len(self.clean) > 1
        only = lambda values: (float(values.mean()), None, None)
        entries = []
        for name in ("clean", *self.attacked, "worst"):
            losses = self.losses(name)
            entries.append(
                {
                    "name": name,
                    "loss": bootstrap(losses, level) if several else only(losses),
                    "rise": None
                    if name == "clean"
                    else bootstrap(losses - self.clean, level)
                    if several
                    else only(losses - self.clean),
                    "calls": self.calls.get(name),
                }
            )
        return entries

    def table(self, level: float = 0.95) -> Any:
        """A table of rich: mean losses, their rise, and what it cost."""
        from rich.markup import escape
        from rich.table import Table

        several = len(self.clean) > 1
        made = Table(
            *("attack", "loss", "rise", "gradients", "forwards"),
            title=f"Mean loss of {len(self.clean)} rows" + (f", {level:.0%} intervals" if several else ""),
            box=None,
        )
        for entry in self.summary(level):
            cells = [_cell(entry[name]) if entry[name] else "" for name in ("loss", "rise")]
            made.add_row(
                escape(one_line(entry["name"])), *cells, *(f"{count:,}" for count in entry["calls"] or ())
            )
        for column in made.columns:
            column.no_wrap = True
        for column in made.columns[1:]:
            column.justify = "right"
        return made

    def save_picture(self, path: str | Path, level: float = 0.95) -> None:
        """Write a picture of the means with their intervals, and of the losses over steps and replacements.

        Raises:
            ModuleNotFoundError: matplotlib is not installed.
        """
        from .picture import draw

        draw(self, Path(path), level)


def _cell(interval: tuple[float, float | None, float | None]) -> str:
    mean, low, high = interval
    return f"{mean:.4f}" if low is None else f"{mean:.3f} [{low:.3f}, {high:.3f}]"


def bootstrap(values: Tensor, level: float = 0.95) -> Interval:
    """Mean, and the percentile bootstrap interval of it.

    Raises:
        ValueError: a level outside (0, 1), or fewer than two values.
    """
    if not 0 < level < 1:
        raise ValueError(f"level must be between 0 and 1, got {level}.")
    if len(values) < 2:
        raise ValueError(f"an interval needs two rows or more, got {len(values)}: evaluate on more.")
    generator, size = torch.Generator().manual_seed(0), len(values)
    means = [
        values[torch.randint(size, (AT_ONCE, size), generator=generator)].mean(-1)
        for _ in range(RESAMPLES // AT_ONCE)
    ]
    tails = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=values.dtype)
    low, high = torch.cat(means).quantile(tails).tolist()
    return float(values.mean()), low, high


def _rows(parts: Iterable[Tensor]) -> Tensor:
    return torch.cat([part.double().cpu() for part in parts], -1)


def _numbers(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)
