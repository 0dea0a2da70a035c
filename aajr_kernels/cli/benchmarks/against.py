"""The same cases on another commit: checked out in a worktree of its own, built there, timed in turn with this one."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from .row import Row, read_rows

__all__ = ["Failed", "measure_both", "worktree"]

ROOT = Path(__file__).resolve().parents[3]
TURNS = 2  # either commit is measured so often, in the order this, other, other, this


class Failed(RuntimeError):
    """Git, the build or a benchmark failed; the message is for the user."""


def _run(command: Sequence[str], cwd: Path, what: str, **environment: str) -> str:
    done = subprocess.run(
        command, check=False, cwd=cwd, capture_output=True, text=True, env={**os.environ, **environment}
    )
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip()).splitlines()[-8:]
        raise Failed(f"{what} failed:\n" + "\n".join(last))
    return done.stdout


@contextmanager
def worktree(commit: str) -> Iterator[Path]:
    """A checkout of the commit, gone afterwards.

    Raises:
        Failed: this is no git checkout, or there is no such commit.
    """
    try:
        _run(["git", "rev-parse", "--verify", f"{commit}^{{commit}}"], ROOT, f"finding commit {commit!r}")
    except OSError as error:
        raise Failed(f"git is needed: {error}.") from error
    with tempfile.TemporaryDirectory(prefix="aajr-against-") as folder:
        place = Path(folder) / "tree"
        _run(["git", "worktree", "add", "--detach", str(place), commit], ROOT, "git worktree")
        try:
            yield place
        finally:
            subprocess.run(
                ["git", "worktree", "remove", "--force", str(place)],
                check=False,
                cwd=ROOT,
                capture_output=True,
            )


def build(tree: Path) -> None:
    """Its native module, in place. Without a compiler both sides run without one.

    Raises:
        Failed: the build failed.
    """
    _run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], tree, "building the other commit")


def measure_both(
    commit: str, arguments: Sequence[str], progress: Callable[[str], None]
) -> tuple[list[Row], list[Row]]:
    """Rows of the other commit, and of this code.

    Args:
        commit: anything that git resolves.
        arguments: of ``aajr bench``: suites and options, without ``--rows``.
        progress: told what is next.

    Raises:
        Failed: see above, or the other commit knows no such suite or option.
    """
    with worktree(commit) as tree, tempfile.TemporaryDirectory() as folder:
        progress(f"building {commit}")
        build(tree)
        rows: dict[Path, list[Row]] = {tree: [], ROOT: []}
        for turn in range(TURNS):
            for place in (ROOT, tree) if turn % 2 == 0 else (tree, ROOT):
                progress(f"{'this code' if place == ROOT else commit}, turn {turn + 1} of {TURNS}")
                file = Path(folder) / f"{turn}-{place == ROOT}.jsonl"
                command = [sys.executable, "-m", "aajr_kernels", "bench", *arguments, "--rows", str(file)]
                _run(command, place, f"aajr bench at {place.name}", PYTHONPATH=str(place))
                rows[place] += read_rows(file) if file.exists() else []
        return pooled(rows[tree]), pooled(rows[ROOT])


def pooled(rows: Sequence[Row]) -> list[Row]:
    """Rows of several turns as one each: the rounds of all, the smallest ratio."""
    import dataclasses

    from .compare import newest

    found: dict[tuple[object, ...], Row] = {}
    for row in rows:
        for key in newest([row]):
            old = found.get(key)
            if old is not None and old.ratio is not None and row.ratio is not None:
                both = [*old.round_ratios, *row.round_ratios]
                row = dataclasses.replace(row, round_ratios=both, ratio=min(old.ratio, row.ratio))
            found[key] = row
    return list(found.values())
