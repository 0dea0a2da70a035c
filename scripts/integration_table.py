"""The table of integrations in docs/integrations.md: runs the tests that make it up, and writes what they measured.

    python scripts/integration_table.py            # rewrite the table from docs/integrations.jsonl
    python scripts/integration_table.py --run      # run the tests first; nothing is written unless all of them pass

A test has a row in the table if it is marked `integration`. Every row names its test and the error that it
measured, with versions and commit.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from common.pages import between, table  # noqa: E402

ROWS, PAGE = ROOT / "docs" / "integrations.jsonl", ROOT / "docs" / "integrations.md"
BEGIN, END = "<!-- integrations: written by `make integrations` -->", "<!-- end of integrations -->"
FIELDS = ("integration", "shows", "error", "against", "test", "versions", "commit")


def read() -> list[dict[str, Any]]:
    """The committed rows.

    Raises:
        ValueError: a row has other fields than :data:`FIELDS`.
    """
    rows = [json.loads(line) for line in ROWS.read_text(encoding="utf-8").splitlines()]
    for row in rows:
        if tuple(row) != FIELDS:
            raise ValueError(
                f"{ROWS.name}: a row must have the fields {', '.join(FIELDS)}, got {', '.join(row)}."
            )
    return rows


def write(page: Path, rows: list[dict[str, Any]]) -> bool:
    """Put the table and its versions between the marks of the page; whether that changed it.

    Raises:
        ValueError: it has not exactly one pair of marks.
    """
    lines = []
    for row in rows:
        file, _, name = row["test"].partition("::")
        error = "bitwise equal" if row["error"] == 0 else f"{row['error']:.0e}"
        test = f"`{Path(file).name}::{name}`"
        lines.append([row["integration"], "✓", row["shows"], error, row["against"], test])
    heads = ["integration", "works", "what was tried", "gradient error", "against", "test"]
    packages = sorted({f"{name} {version}" for row in rows for name, version in row["versions"].items()})
    commits = ", ".join(sorted({row["commit"] for row in rows}))
    measured = f"Measured with {', '.join(packages)}, commit {commits}."
    return between(page, BEGIN, END, f"{table(heads, lines)}\n\n{measured}")


def run() -> list[dict[str, Any]]:
    """Run every test that uses the fixture.

    Raises:
        SystemExit: one of them failed or was skipped, or there is none.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.jsonl"
        environment = {**os.environ, "AAJR_INTEGRATIONS": str(file)}
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "--integrations", "tests"]
        code = subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode
        if code or not file.exists():
            raise SystemExit("the table was not written: a test failed, or none has a row in it.")
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return sorted(rows, key=lambda row: (row["test"].partition("::")[0], row["integration"]))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", action="store_true", help="run the tests and write their rows first")
    if parser.parse_args().run:
        rows = run()
        ROWS.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    write(PAGE, read())


if __name__ == "__main__":
    main()
