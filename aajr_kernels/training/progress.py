"""Progress of long commands: bars on a terminal, plain lines everywhere else.

A file, a pipe or a continuous-integration log gets one line at once and another every few seconds: what is being done,
the count, the time so far and an estimate of the rest. A line also appears while a single step takes long.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from typing import IO, Any

#: seconds between two lines: at first, and at most after a long time
SHORTEST, LONGEST = 3.0, 30.0


def draws(file: IO[str]) -> bool:
    """Whether bars can be drawn and redrawn there."""
    return file.isatty() and os.environ.get("TERM", "").lower() not in ("dumb", "unknown")


class Progress:
    """Stages of counted steps, as a context manager.

    Args:
        file: where to; standard error unless named.
        shown: False makes every call do nothing.
        keep: leave finished bars on the terminal. Lines always stay.
    """

    def __init__(self, file: IO[str] | None = None, *, shown: bool = True, keep: bool = False) -> None:
        from rich import progress
        from rich.console import Console

        self._file = file or sys.stderr
        # one bar per stage, the current one at the bottom; without a terminal it counts only
        self._bars = progress.Progress(
            progress.TextColumn("{task.description:34}", markup=False),
            progress.BarColumn(bar_width=28),
            progress.MofNCompleteColumn(),
            progress.TimeElapsedColumn(),
            progress.TimeRemainingColumn(),
            progress.TextColumn("{task.fields[text]}", style="dim", markup=False),
            console=Console(file=self._file),
            transient=not keep,
            get_time=time.monotonic,
            disable=not (shown and draws(self._file)),
        )
        self._writes_lines = shown and self._bars.disable
        self._lock = threading.RLock()
        self._stopped = threading.Event()
        self._begun = self._written = time.monotonic()
        self._stage: Any = None
        self._started = 0

    def __enter__(self) -> Progress:
        self._bars.start()
        if self._writes_lines:
            threading.Thread(target=self._beat, name="aajr-progress", daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        if kind is None:
            self._finish()
        self.stop()

    def stop(self) -> None:
        """End the display; the current stage stays unfinished."""
        self._stopped.set()
        if not self._bars.disable:
            self._bars.stop()

    def stage(self, name: str, total: int | None = None, done: int = 0) -> None:
        """Begin a stage of `total` steps, `done` of which an earlier run did; the one before is finished."""
        with self._lock:
            self._finish()
            self._bars.add_task(name, total=total, completed=done, text="", first=done)
            self._stage, self._started = self._bars.tasks[-1], done
            self._write()

    def begin(self, text: str) -> None:
        """The next step begins, which `text` names: those begun before are done."""
        with self._lock:
            self._started += 1
            self.reach(self._started - 1, text)

    def step(self, text: str = "") -> None:
        """One step is done; `text` says how it went."""
        with self._lock:
            self._started = self._stage.completed + 1
            self.reach(self._started, text)

    def note(self, text: str) -> None:
        """The current step has come to `text`."""
        self.reach(self._stage.completed, text)

    def reach(self, done: int, text: str = "") -> None:
        """So many steps are done."""
        with self._lock:
            self._started = max(self._started, done)
            self._bars.update(self._stage.id, completed=done, text=text)
            self._write_if_due()

    def _finish(self) -> None:
        if self._stage is not None:
            total = self._stage.total or 1
            self._bars.update(self._stage.id, completed=total, total=total, text="")
            self._bars.stop_task(self._stage.id)
            self._write(last=True)
        self._stage = None

    # ------------------------------------------------------------------------------------------------ plain lines

    def _beat(self) -> None:
        while not self._stopped.wait(0.5):
            with self._lock:
                if self._stopped.is_set() or self._stage is None:
                    continue
                try:
                    self._write_if_due()
                except (OSError, ValueError):  # the file was closed: the main thread will find out
                    return

    def _write_if_due(self) -> None:
        now = time.monotonic()
        if now - self._written >= min(LONGEST, max(SHORTEST, (now - self._begun) / 30)):
            self._write()

    def _write(self, last: bool = False) -> None:
        if self._writes_lines:
            self._written = time.monotonic()
            print(self._line(last), file=self._file, flush=True)

    def _line(self, last: bool) -> str:
        stage = self._stage
        seconds, total, done, text = stage.elapsed, stage.total, stage.completed, stage.fields["text"]
        count = "" if total in (None, 1) else f" {done}/{total}"
        if last:
            return f"{stage.description}{count}: done in {in_words(seconds)}"
        facts = [in_words(seconds)] if seconds >= 1 else []
        steps = done - stage.fields["first"]
        if total is not None and steps > 0 and done < total:
            facts.append(f"about {in_words(seconds / steps * (total - done))} left")
        return f"{stage.description}{count}: {', '.join([*facts, *([text] if text else [])]) or 'begins'}"


def in_words(seconds: float) -> str:
    """Seconds, minutes or hours, with the precision of a glance."""
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 99.5 * 60 else f"{seconds / 3600:.1f} h"
