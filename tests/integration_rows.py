"""The rows of docs/integrations.md: what a test of an integration measured (`make integrations`)."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("torch", "transformers", "accelerate", "peft", "trl")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--integrations", action="store_true", help="only tests with a row in docs/integrations.md"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--integrations"):
        items[:] = [item for item in items if "integration" in getattr(item, "fixturenames", ())]


def versions() -> dict[str, str]:
    """Of the packages that are installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str:
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or "unknown"


@pytest.fixture
def integration(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Call it last in a test: ``integration("DDP", "two processes, gloo", error, "one process, float32")``.

    Args:
        integration: name in the table.
        shows: what was tried.
        error: largest relative error of a gradient; 0 where it is bitwise equal.
        against: what is right.
    """

    def record(integration: str, shows: str, error: float, against: str) -> None:
        file = os.environ.get("AAJR_INTEGRATIONS")
        if file is None:
            return
        row = {
            "integration": integration,
            "shows": shows,
            "error": float(f"{float(error):.3g}"),
            "against": against,
            "test": request.node.nodeid,
            "versions": versions(),
            "commit": commit(),
        }
        with open(file, "a", encoding="utf-8") as rows:
            rows.write(json.dumps(row, ensure_ascii=False) + "\n")

    return record
