"""The contact of a stage with the run it is part of: rows, time, the device."""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Stage:
    """One stage.

    Attributes:
        name: a key of :data:`.NAMES`.
        out: folder of the results.
        end: when it has to be over, by ``time.monotonic``.
        dry: on the CPU, at tiny sizes.
        before: rows of an earlier run, whose failures are repeated; empty in a first run.
    """

    name: str
    out: Path
    end: float
    dry: bool = False
    before: list[dict[str, Any]] | None = None

    @property
    def device(self) -> str:
        return "cpu" if self.dry else "cuda"

    @property
    def left(self) -> float:
        """Seconds."""
        return self.end - time.monotonic()

    def row(self, name: str, state: str = "done", **facts: Any) -> None:
        """Append a row to ``rows.jsonl``; it is on disk when this returns."""
        line = json.dumps({"stage": self.name, "name": name, "state": state, **facts}, default=str)
        with (self.out / "rows.jsonl").open("a") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())
        print(line, flush=True)

    def rows(self) -> list[dict[str, Any]]:
        """The rows of this stage so far, of earlier attempts too."""
        return [row for row in read_rows(self.out / "rows.jsonl") if row["stage"] == self.name]

    def failed_before(self) -> list[str] | None:
        """Names of this stage that did not pass in the earlier run; None in a first run."""
        if self.before is None:
            return None
        states = {row["name"]: row["state"] for row in self.before if row["stage"] == self.name}
        return [name for name, state in states.items() if state in ("failed", "started", "faulted")]

    def wait(self) -> None:
        """For the device."""
        if not self.dry:
            import torch  # stages that are commands do without

            torch.cuda.synchronize()


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file; lines that a process did not finish are left out."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows
