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
        self._file = file or sys.stderr
        self._shown = shown
        self._display: Any = _Bars(self._file, keep) if shown and draws(self._file) else None
        self._lock = threading.RLock()
        self._stopped = threading.Event()
        self._begun = self._written = time.monotonic()
        self._name = ""
        self._clear()

    def _clear(self) -> None:
        self._total: int | None = None
        self._done = self._started = self._first = 0
        self._text = ""
        self._since = time.monotonic()

    def __enter__(self) -> Progress:
        if self._display is not None:
            self._display.start()
        elif self._shown:
            threading.Thread(target=self._beat, name="aajr-progress", daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        if kind is None:
            self._finish()
        self.stop()

    def stop(self) -> None:
        """End the display; the current stage stays unfinished."""
        self._stopped.set()
        if self._display is not None:
            self._display.stop()

    def stage(self, name: str, total: int | None = None, done: int = 0) -> None:
        """Begin a stage of `total` steps, `done` of which an earlier run did; the one before is finished."""
        with self._lock:
            self._finish()
            self._clear()
            self._name, self._total = name, total
            self._done = self._started = self._first = done
            if self._display is not None:
                self._display.add(name, total, done)
            else:
                self._write()

    def begin(self, text: str) -> None:
        """The next step begins, which `text` names: those begun before are done."""
        with self._lock:
            self._started += 1
            self.reach(self._started - 1, text)

    def step(self, text: str = "") -> None:
        """One step is done; `text` says how it went."""
        with self._lock:
            self._started = self._done + 1
            self.reach(self._done + 1, text)

    def note(self, text: str) -> None:
        """The current step has come to `text`."""
        self.reach(self._done, text)

    def reach(self, done: int, text: str = "", total: int | None = None) -> None:
        """So many steps are done, of so many."""
        with self._lock:
            self._done, self._text = done, text
            self._started = max(self._started, done)
            self._total = self._total if total is None else total
            if self._display is not None:
                self._display.update(done, text, self._total)
            else:
                self._write_if_due()

    def _finish(self) -> None:
        if self._name and self._total is not None:
            self._done = self._total
        if self._display is not None:
            self._display.finish()
        elif self._name:
            self._text = ""
            self._write(last=True)
        self._name = ""

    # ------------------------------------------------------------------------------------------------ plain lines

    def _beat(self) -> None:
        while not self._stopped.wait(0.5):
            with self._lock:
                if self._stopped.is_set() or not self._name:
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
        if not self._shown:
            return
        self._written = time.monotonic()
        print(self._line(self._written - self._since, last), file=self._file, flush=True)

    def _line(self, seconds: float, last: bool) -> str:
        count = "" if self._total in (None, 1) else f" {self._done}/{self._total}"
        if last:
            return f"{self._name}{count}: done in {in_words(seconds)}"
        facts = [in_words(seconds)] if seconds >= 1 else []
        steps = self._done - self._first
        if self._total is not None and steps > 0 and self._done < self._total:
            facts.append(f"about {in_words(seconds / steps * (self._total - self._done))} left")
        return (
            f"{self._name}{count}: {', '.join([*facts, *([self._text] if self._text else [])]) or 'begins'}"
        )


def in_words(seconds: float) -> str:
    """Seconds, minutes or hours, with the precision of a glance."""
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 99.5 * 60 else f"{seconds / 3600:.1f} h"


class _Bars:
    """One rich bar per stage, the current one at the bottom."""

    def __init__(self, file: IO[str], keep: bool) -> None:
        from rich import progress
        from rich.console import Console

        columns = (
            progress.TextColumn("{task.description:34}", markup=False),
            progress.BarColumn(bar_width=28),
            progress.MofNCompleteColumn(),
            progress.TimeElapsedColumn(),
            progress.TimeRemainingColumn(),
            progress.TextColumn("{task.fields[text]}", style="dim", markup=False),
        )
        self._progress = progress.Progress(*columns, console=Console(file=file), transient=not keep)
        self._task: Any = None
        self.start, self.stop = self._progress.start, self._progress.stop

    def add(self, name: str, total: int | None, done: int) -> None:
        self._task = self._progress.add_task(name, total=total, completed=done, text="")

    def update(self, done: int, text: str, total: int | None) -> None:
        self._progress.update(self._task, completed=done, text=text, total=total)

    def finish(self) -> None:
        if self._task is not None:
            total = self._progress.tasks[self._task].total
            self._progress.update(
                self._task, completed=total if total is not None else 1, total=total or 1, text=""
            )
            self._progress.stop_task(self._task)
        self._task = None
