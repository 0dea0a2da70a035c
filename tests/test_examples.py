"""Every example runs as a program, offline, in less than two minutes; examples/README.md has the seconds."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
#: example -> the optional packages it needs
NEEDS = {
    "accelerate_loop": ["transformers", "accelerate"],
    "hf_trainer": ["transformers", "accelerate"],
    "trl_grpo": ["trl", "datasets", "peft"],
    "trl_sft": ["trl", "datasets", "peft"],
    "two_agents_adapters": ["transformers", "peft"],
}
SHARED = {"text"}


def test_every_example_is_listed():
    assert {path.stem for path in (ROOT / "examples").glob("*.py")} == set(NEEDS) | SHARED
    page = (ROOT / "examples" / "README.md").read_text()
    assert [name for name in (*NEEDS, *SHARED) if f"[{name}.py]({name}.py)" not in page] == []


@pytest.mark.slow
@pytest.mark.parametrize("name", NEEDS)
def test_an_example_runs(name, tmp_path):
    for package in NEEDS[name]:
        pytest.importorskip(package)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment["OMP_NUM_THREADS"] = "1"  # the models are small, and other tests run beside
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / f"{name}.py")],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,  # for a machine that does other things too
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert not list(tmp_path.iterdir())  # nothing is left behind
