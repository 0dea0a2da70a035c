"""The same cases on another commit: checked out in a worktree of its own, built there, timed in turn with this one."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from .compare import key_of
from .row import Row, read_rows

__all__ = ["Failed", "measure_both", "worktree"]

ROOT = Path(__file__).resolve().parent.parent
TURNS = 2  # either commit is measured so often, in the order other, this, this, other


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
        _run(["git", "worktree", "prune"], ROOT, "git worktree prune")  # of runs that were killed
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
    """Its native module, in place, if this code has one; else neither side does.

    Raises:
        Failed: the build failed, or the module of this code is older than its sources.
    """
    modules = sorted((ROOT / "aajr_kernels").glob("_native*.so"))
    if modules:
        sources = [path.stat().st_mtime for path in (ROOT / "csrc").rglob("*") if path.is_file()]
        if max(sources, default=0.0) > modules[-1].stat().st_mtime:
            raise Failed(
                "csrc was changed after the native module of this code was built: pip install -e . first."
            )
        command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
        _run(command, tree, "building the other commit", AAJR_NATIVE="1")


def measure_both(
    commit: str, arguments: Sequence[str], progress: Callable[[str], None]
) -> tuple[list[Row], list[Row]]:
    """Rows of the other commit, and of this code.

    Args:
        commit: anything that git resolves.
        arguments: of ``python -m bench``: suites and options, without ``--rows``.
        progress: told what is next.

    Raises:
        Failed: see above, or the other commit knows no such suite or option.
    """
    with worktree(commit) as tree, tempfile.TemporaryDirectory() as folder:
        progress(f"building {commit}")
        build(tree)
        rows: dict[Path, list[Row]] = {tree: [], ROOT: []}
        for turn in range(TURNS):
            for place in (tree, ROOT) if turn % 2 == 0 else (ROOT, tree):
                progress(f"{'this code' if place == ROOT else commit}, turn {turn + 1} of {TURNS}")
                file = Path(folder) / f"{turn}-{place == ROOT}.jsonl"
                command = [sys.executable, "-m", "bench", *arguments, "--rows", str(file)]
                what = "python -m bench " + ("here" if place == ROOT else f"at {commit}")
                path = os.pathsep.join(p for p in (str(place), os.environ.get("PYTHONPATH")) if p)
                _run(command, place, what, PYTHONPATH=path)
                try:
                    rows[place] += read_rows(file) if file.exists() else []
                except ValueError as error:
                    raise Failed(f"the rows of {commit} are of another kind: {error}") from error
        both = pooled(rows[tree]), pooled(rows[ROOT])
    kinds = [{row.native_capability for row in side} for side in both]
    if kinds[0] != kinds[1]:
        raise Failed(f"the two sides ran with different native modules ({kinds[0]} and {kinds[1]}).")
    return both


def pooled(rows: Sequence[Row]) -> list[Row]:
    """Rows of several turns as one each, with the rounds of all; the ratio is that of the last turn."""
    found: dict[tuple[object, ...], Row] = {}
    for row in rows:
        old = found.get(key_of(row))
        if old is not None and old.base == row.base:
            row = dataclasses.replace(row, round_ratios=[*old.round_ratios, *row.round_ratios])
        found[key_of(row)] = row
    return list(found.values())
