"""The rows of docs/integrations.md: what tests of integrations measured (`make integrations`).

A test has a row if it is marked ``@pytest.mark.integration(name, what was tried, against)`` and says
``record_property("error", ...)``, the relative error of its gradients. A parameter in the name, as in
``"PEFT: {kind}"``, makes a row for each of its values; over the other parameters the largest error counts.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("torch", "transformers", "accelerate", "peft", "trl")
#: values of parameters as people write them
NAMES = {
    "bert-sdpa": "BERT",
    "ddp": "DDP",
    "dora": "DoRA",
    "fsdp2": "FSDP2",
    "gpt2-sdpa": "GPT-2",
    "llama-sdpa": "Llama",
    "lora": "LoRA",
    "rslora": "rsLoRA",
}

_rows: dict[tuple[str, str], dict[str, Any]] = {}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--integrations", action="store_true", help="only tests with a row in docs/integrations.md"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--integrations"):
        items[:] = [item for item in items if item.get_closest_marker("integration")]


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if "AAJR_INTEGRATIONS" not in os.environ or report.when != "call" or not report.passed:
        return
    properties = dict(report.user_properties)
    if "integration" not in properties:
        return
    name, shows, against = properties["integration"]
    errors = [float(value) for key, value in report.user_properties if key == "error"]
    if not errors:
        raise RuntimeError(f"{report.nodeid} has a row in docs/integrations.md and recorded no error.")
    test = report.nodeid.partition("[")[0]
    before = _rows.get((test, name), {"error": 0.0})["error"]
    _rows[test, name] = {
        "integration": name,
        "shows": shows,
        "error": float(f"{max(before, *errors):.3g}"),
        "against": against,
        "test": test,
        "versions": versions(),
        "commit": commit(),
    }


@pytest.fixture(autouse=True)
def _integration(request: pytest.FixtureRequest) -> None:
    """Sends the marker's words along with the report."""
    marker = request.node.get_closest_marker("integration")
    if marker is not None:
        parameters = getattr(getattr(request.node, "callspec", None), "params", {})
        named = {key: NAMES.get(value, value) for key, value in parameters.items() if isinstance(value, str)}
        words = tuple(part.format(**named) for part in marker.args)
        request.node.user_properties.append(("integration", words))


def pytest_sessionfinish(exitstatus: int) -> None:
    file = os.environ.get("AAJR_INTEGRATIONS")
    if file and exitstatus == 0:
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in _rows.values())
        Path(file).write_text("".join(lines), encoding="utf-8")


def said(text: str) -> float:
    """The largest error that the workers of a test in several processes printed: numbers like ``1.2e-07``."""
    return max(float(number) for number in re.findall(r"\b\d\.\de[-+]\d\d\b", text))


def versions() -> dict[str, str]:
    """Of the packages that are installed."""
    installed = {}
    for name in PACKAGES:
        try:
            installed[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return installed


def commit() -> str:
    """The last one that changed the package: what comes after it is not under test."""
    done = subprocess.run(
        ["git", "log", "-1", "--format=%h", "--", "aajr_kernels"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.strip() or "unknown"
