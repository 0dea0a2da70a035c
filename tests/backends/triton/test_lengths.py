"""No length is a kernel of its own: what Triton would compile for calls of every op at lengths from 1,000 to 1,200."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

TESTS = Path(__file__).resolve().parents[2]
CALLS = (
    "attention", "attention causal", "attention packed", "attention context", "attention mask of pairs",
    "attention padding", "attention bias", "attention dual bias", "attention bias per query",
    "attention bias of buckets",
    "rms_norm", "layer_norm", "rms_norm of heads", "layer_norm long", "add_rms_norm", "gelu", "swiglu",
    "rotary", "rotary trained", "linear", "linear float32", "head", "head probs", "head joint", "head mask",
    "sensitivity", "softmax", "softmax along the tokens",
)  # fmt: skip


@functools.cache
def answers() -> dict[str, dict[str, list[str]]]:
    """By processor and call, the kernels that a later length compiles; Triton is not interpreted there."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    path = [str(TESTS.parent), str(TESTS), environment.get("PYTHONPATH", "")]
    environment |= {"PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "backends.triton.lengths"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_every_length_runs_the_kernels_of_the_first(architecture, call):
    again = answers()[architecture][call]
    if call == "softmax along the tokens":  # a row is as long as the sequence: docs/triton.md says so
        assert any("_softmax_fwd_kernel" in line for line in again)
        return
    assert again == []


def test_every_call_is_asked_for():
    assert set(answers()["sm_90"]) == set(CALLS)
