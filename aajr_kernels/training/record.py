"""Records of a training while it runs: rows as JSON lines, TensorBoard."""

from __future__ import annotations

import itertools
import math
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .. import files

__all__ = ["Recorder", "Row", "read_json_lines", "read_rows"]

Row = dict[str, Any]


def read_rows(path: str | os.PathLike[str]) -> list[Row]:
    """The rows of a ``metrics.jsonl``.

    A last line torn by a crash is left out; so is every other line that is no row or does not have its checksum, with a
    warning that has its number.

    Raises:
        FileNotFoundError: there is no such file.
    """
    return read_json_lines(Path(path), {"step": int})


def read_json_lines(path: Path, fields: Mapping[str, type], skip: int = 0) -> list[Row]:
    """The JSON objects with these fields in a file of one per line; the others are left out as in :func:`read_rows`.

    Args:
        path: of the file.
        fields: names that a row must have, and the types of their values.
        skip: lines at the start that are no rows.
    """
    rows, damage = files.read_rows(path, fields, skip)
    for sentence in damage:
        warnings.warn(sentence, RuntimeWarning, stacklevel=3)
    return rows


class Recorder:
    """Rows of a training, in memory and in a folder.

    Args:
        folder: or None for memory only.
        step: where the training starts; what the files hold of later steps, which a crash undid, is removed.
        tensorboard: also write to ``folder/tensorboard``.
    """

    FILES = ("metrics.jsonl", "stability.jsonl")

    def __init__(self, folder: Path | None, step: int, tensorboard: bool) -> None:
        self.folder = folder
        self.rows: list[Row] = []
        self.writer: Any = None
        if folder is None:
            return
        for name in self.FILES:
            kept = _keep_up_to(folder / name, step)
            self.rows = kept if name == self.FILES[0] else self.rows
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise ImportError(
                    "tensorboard=True needs the package tensorboard: pip install 'aajr_kernels[tensorboard]'."
                ) from None
            self.writer = SummaryWriter(os.fspath(folder / "tensorboard"), purge_step=step + 1)

    def add(self, row: Row) -> None:
        """Append one; it has a ``step``."""
        plain = {name: _number(value) for name, value in row.items()}
        self.rows.append(plain)
        if self.folder is not None:
            files.append_rows(self.folder / self.FILES[0], [plain])
        if self.writer is not None:
            for name, value in plain.items():
                if isinstance(value, (int, float)) and name != "step":
                    self.writer.add_scalar(name if "/" in name else f"train/{name}", value, row["step"])

    def stability(self, report: Any, step: int) -> None:
        """Append a :class:`StabilityReport`."""
        if self.folder is not None:
            report.append_jsonl(self.folder / self.FILES[1], step=step)
        if self.writer is not None:
            report.log(self.writer, step)

    def flush(self) -> None:
        """Rows to the disk, before a checkpoint is there that they belong to.

        Raises:
            OSError: they could not be written.
        """
        if self.folder is None:
            return
        for path in (*(self.folder / name for name in self.FILES), self.folder):
            if path.exists():
                with files.writing(path):
                    files.flush(path)

    def close(self) -> None:
        """Close what is open."""
        if self.writer is not None:
            self.writer.close()


def _keep_up_to(path: Path, step: int) -> list[Row]:
    """Keep the rows up to `step`. If lines are damaged, the file as it was stays beside it."""
    if not path.exists():
        return []
    rows, damage = files.read_rows(path, {"step": int})
    if damage:
        names = (path.with_name(f"{path.stem}.damaged-{n}{path.suffix}") for n in itertools.count(1))
        copy = next(name for name in names if not name.exists())
        files.replace(copy, lambda made: made.write_bytes(path.read_bytes()))
        for sentence in damage:
            warnings.warn(f"{sentence} The file as it was is {copy}.", RuntimeWarning, stacklevel=4)
    kept = [row for row in rows if row["step"] <= step]
    files.write_text(path, "".join(files.row_line(row) for row in kept))
    return kept


def _number(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
