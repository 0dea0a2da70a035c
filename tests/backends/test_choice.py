"""The choice of a backend: by name, by block, by the environment; and names that it refuses."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import aajr_kernels as aajr
from aajr_kernels.backends import choice


def test_backend_choice_is_scoped_and_checked():
    assert choice.select_backend("norm", torch.ones(1).double()) == "reference"
    with aajr.use_backend("reference"):
        assert choice.select_backend("norm") == "reference"
    with pytest.raises(ValueError, match="choose one of auto, reference, native, triton"):
        aajr.use_backend("cudnn")
    missing = [name for name, reason in aajr.backends().items() if reason]
    for name in missing:
        with pytest.raises(aajr.BackendUnavailable, match=f"backend '{name}' cannot run here: ."):
            aajr.use_backend(name)
    assert aajr.backends()["reference"] is None


@pytest.mark.parametrize(
    ("value", "error"), [pytest.param("cudnn", "ValueError", marks=pytest.mark.slow), ("reference", "")]
)
def test_environment_variable_names_the_backend(value, error):
    code = (
        "import torch, aajr_kernels as a; d = a.dual(torch.ones(2, 3), torch.ones(2, 3)); "
        "print(a.rms_norm(d, 3).shape)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        check=False,
        env={**os.environ, "AAJR_BACKEND": value},
        capture_output=True,
        text=True,
    )
    assert (run.returncode != 0) == bool(error)
    assert error in run.stderr


def test_an_op_without_that_backend_says_so():
    with pytest.raises(aajr.BackendUnavailable, match="op 'norm' has no 'abacus' backend"):
        choice.implementation("norm", "abacus")
