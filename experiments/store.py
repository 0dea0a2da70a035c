"""Rows of an experiment as JSON lines: a header with configuration and environment, then one line per row.

The rows of a task are written together, and the task counts as done when all are there. So an interrupted run loses at
most the task it was at, and a torn last line is dropped when the file is opened again.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from aajr_kernels import files
from aajr_kernels.training.record import read_json_lines
from common import machine

Row = dict[str, Any]


def environment() -> dict[str, Any]:
    """Machine, versions and commit; ``dirty`` says whether the code of package or experiments was changed since."""
    return machine.describe(("aajr_kernels", "csrc", "common", "experiments", ":!experiments/results"))


def read(path: Path) -> tuple[dict[str, Any], list[Row]]:
    """Header and rows of the complete tasks of a file; lines that are no rows are left out, with a warning.

    Raises:
        ValueError: the file does not start with a header.
    """
    header, *_ = [*files.read_rows(path, {})[0], None]  # a damaged header is none of the rows
    if header is None or not {"config", "experiment"} <= set(header):
        raise ValueError(
            f"{path.name} does not start with the header of an experiment: choose another folder."
        )
    tasks: dict[str, list[Row]] = {}
    for row in read_json_lines(path, {"task": str, "of": int}, skip=1):
        tasks.setdefault(row["task"], []).append(row)
    return header, [row for rows in tasks.values() if len(rows) == rows[0]["of"] for row in rows]


class Store:
    """The file of a run.

    Args:
        path: made if it is not there, with its folder; otherwise continued.
        name: of the experiment.
        config: JSON values; must equal that of the file.

    Raises:
        ValueError: the file belongs to another experiment or configuration.
    """

    def __init__(self, path: Path, name: str, config: dict[str, Any]) -> None:
        self.path = path
        config = json.loads(json.dumps(config))
        if path.exists() and path.stat().st_size:
            self.header, self.rows = read(path)
            if (self.header["experiment"], self.header["config"]) != (name, config):
                raise ValueError(
                    f"{path} holds rows of another configuration: choose another folder, or --fresh to replace them."
                )
        else:
            self.header, self.rows = {"experiment": name, "config": config, "environment": environment()}, []
        self._done = {row["task"] for row in self.rows}
        self._rewrite()

    def has(self, task: str) -> bool:
        """Whether the rows of a task are there."""
        return task in self._done

    def add(self, task: str, rows: list[Row], seconds: float) -> None:
        """Append the rows of a finished task.

        Raises:
            ValueError: there are none, or a value is not finite (write None).
        """
        if not rows:
            raise ValueError(
                f"task {task!r} yielded no rows, so that it could not be told from an unfinished one."
            )
        marks = {"task": task, "of": len(rows), "seconds": round(seconds, 2)}
        rows = [{**marks, **row} for row in rows]
        files.append_rows(self.path, rows)
        self.rows += [json.loads(json.dumps(row)) for row in rows]
        self._done.add(task)

    def _rewrite(self) -> None:
        """Keep only complete tasks in the file."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        files.write_text(self.path, "".join(map(files.row_line, [self.header, *self.rows])))
