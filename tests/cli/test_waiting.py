"""How long waiting threads spin: set for the command before torch is imported, left alone everywhere else."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from aajr_kernels.cli import waiting

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("arguments", "original", "ours"),
    [
        (["/usr/bin/aajr", "info"], ["python", "/usr/bin/aajr", "info"], True),
        (["-m", "info"], ["python", "-m", "aajr_kernels", "info"], True),
        (["-m", "step"], ["python", "-m", "bench", "step"], True),
        (["-m"], ["python", "-m", "bench.report"], True),
        (["checkout/demo/__main__.py"], ["python", "-m", "demo"], True),
        (["theirs/__main__.py"], ["python", "-m", "theirs"], False),
        (["-m"], ["python", "-X", "importtime", "-um", "aajr_kernels"], True),
        (["-m", "aajr_kernels"], ["python", "-m", "pytest", "aajr_kernels"], False),
        (["-m", "-m", "aajr_kernels"], ["python", "-m", "theirs.train"], False),
        (["train.py", "-m", "aajr_kernels"], ["python", "train.py", "-m", "aajr_kernels"], False),
        (["-c"], ["python", "-c", "import aajr_kernels"], False),
        ([""], ["python"], False),
        ([], ["python"], False),
    ],
)
def test_the_command_is_recognised(arguments, original, ours):
    assert waiting.is_command(arguments, original) is ours


@pytest.mark.parametrize("variable", waiting.DECISIONS)
def test_a_decision_of_the_user_stays(variable):
    environment = {variable: "7"}
    waiting.shorten(environment)
    assert environment == {variable: "7"}
    environment = {}
    waiting.shorten(environment)
    assert environment == waiting.SETTINGS


#: a `torch` that only tells what it would have read
SPY = "import os; print(os.environ.get('GOMP_SPINCOUNT', 'unset'), flush=True); os._exit(0)"


@pytest.mark.parametrize(
    ("arguments", "seen"),
    [
        (["-m", "aajr_kernels", "info"], "1000"),
        (["-m", "bench", "--list"], "1000"),
        (["-m", "bench.report", "--help"], "1000"),
        (["-m", "demo", "--help"], "1000"),
        (["-m", "experiments"], "1000"),
        (["-c", "import aajr_kernels"], "unset"),
    ],
    ids=lambda value: " ".join(value[1:2]) if isinstance(value, list) else value,
)
def test_torch_finds_it_set_when_it_is_loaded(tmp_path, arguments, seen):
    (tmp_path / "torch.py").write_text(SPY)
    environment = {name: value for name, value in os.environ.items() if name not in waiting.DECISIONS}
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=tmp_path,
        env={**environment, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.split() == [seen], done.stderr
