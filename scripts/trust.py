"""The table of promises in docs/trust.md: runs the commands that test them, and writes what they counted.

    python scripts/trust.py               # rewrite the table from docs/trust.jsonl
    python scripts/trust.py --run NAME    # run the command of these promises first; a failing one writes nothing

A row of docs/trust.jsonl names the promise, how it is tested and the command that does so. Figures are never typed:
a test or script says ``common.trust.count(NAME, examples=200)``, and what a whole green run counted becomes the row's.
For a new promise add a row with ``"figures": {}`` and ``"commit": ""``, then run it.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from common.pages import between, table  # noqa: E402
from common.trust import VARIABLE, totals  # noqa: E402

ROWS, PAGE = ROOT / "docs" / "trust.jsonl", ROOT / "docs" / "trust.md"
BEGIN, END = "<!-- trust: written by `python scripts/trust.py` -->", "<!-- end of trust -->"
FIELDS = ("name", "kind", "promise", "tested", "command", "figures", "commit")
#: in the order of the table and of the page's sections
KINDS = (
    "Fuzzing",
    "Mutation",
    "Determinism",
    "Memory",
    "Native safety",
    "Faults of the world",
    "Supply chain",
)


def read() -> list[dict[str, Any]]:
    """The committed rows.

    Raises:
        ValueError: a row has other fields than :data:`FIELDS` or an unknown kind, or two have one name.
    """
    rows = [json.loads(line) for line in ROWS.read_text(encoding="utf-8").splitlines()]
    for row in rows:
        if tuple(row) != FIELDS:
            raise ValueError(
                f"{ROWS.name}: a row must have the fields {', '.join(FIELDS)}, got {', '.join(row)}."
            )
        if row["kind"] not in KINDS:
            raise ValueError(f"{ROWS.name}: kind must be one of {', '.join(KINDS)}, got {row['kind']}.")
    names = [row["name"] for row in rows]
    if len(set(names)) < len(names):
        raise ValueError(f"{ROWS.name}: every row must have a name of its own, got {', '.join(names)}.")
    return sorted(rows, key=lambda row: KINDS.index(row["kind"]))


def said(figures: dict[str, float]) -> str:
    """Figures as the table has them: `10,000 examples, 0 failures`."""
    return ", ".join(
        f"{number:,} {unit.replace('_', ' ')}"
        if isinstance(number, int)
        else f"{number:.3g} {unit.replace('_', ' ')}"
        for unit, number in figures.items()
    )


def write(page: Path, rows: list[dict[str, Any]]) -> bool:
    """Put the table between the marks of the page; whether that changed it.

    Raises:
        ValueError: the page has not exactly one pair of marks.
    """
    heads = ["promise", "how it is tested", "figure", "command", "commit"]
    lines = [
        [row["promise"], row["tested"], said(row["figures"]), f"`{row['command']}`", row["commit"]]
        for row in rows
        if row["figures"]
    ]
    return between(page, BEGIN, END, table(heads, lines))


def run(command: str) -> dict[str, dict[str, float]]:
    """Run a command and return what it counted, by promise.

    Raises:
        SystemExit: it failed.
    """
    words = shlex.split(command)
    if words[0] == "python":
        words[0] = sys.executable
    elif words[0] == "make":
        words.append(f"PY={sys.executable}")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "counts.jsonl"
        file.touch()
        # the suite's other settings are in the Makefile
        settings = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        environment = {**settings, **os.environ, VARIABLE: str(file)}
        if subprocess.run(words, cwd=ROOT, env=environment, check=False).returncode:
            raise SystemExit(f"nothing was written: `{command}` failed; its output is above.")
        return totals(file)


def commit() -> str:
    """Short hash of the last commit that changed what is tested, with a + where the working tree differs from it."""

    def git(*arguments: str) -> str:
        command = ["git", *arguments, "--", "aajr_kernels", "csrc"]
        return subprocess.run(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, check=True).stdout.strip()

    return git("log", "-1", "--format=%h") + ("+" if git("status", "--porcelain") else "")


def refresh(names: list[str]) -> None:
    """Run the commands of these promises and write their figures.

    Raises:
        SystemExit: a name is unknown, or a command failed or counted nothing.
    """
    wanted = {row["name"]: row for row in read()}
    if unknown := set(names) - set(wanted):
        raise SystemExit(
            f"no row is named {', '.join(sorted(unknown))}: choose from {', '.join(sorted(wanted))}."
        )
    for command in dict.fromkeys(wanted[name]["command"] for name in names):
        at = commit()
        counted = run(command)
        rows = read()  # again: a run takes long, and others add rows
        for row in rows:
            if row["name"] in names and row["command"] == command:
                if row["name"] not in counted:
                    raise SystemExit(f"nothing was written: `{command}` counted nothing for {row['name']}.")
                row["figures"], row["commit"] = counted[row["name"]], at
        ROWS.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", nargs="+", default=[], metavar="NAME", help="run these promises' commands")
    refresh(parser.parse_args().run)
    write(PAGE, read())


if __name__ == "__main__":
    main()
