"""The choice of a backend: by name, by block, by the environment; and names that it refuses."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys

import pytest
import torch

import aajr_kernels as aajr
from aajr_kernels.backends import choice
from aajr_kernels.backends.triton import launch as gpu


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


def test_a_choice_is_made_once_for_a_kind_of_call(monkeypatch):
    monkeypatch.setattr(gpu, "_interpreted", lambda: False)
    looked = []
    select = choice._select
    monkeypatch.setattr(choice, "_select", lambda op, *rest: looked.append(op) or select(op, *rest))
    x = torch.ones(3, 4)
    first = choice.select_backend("norm", x, None)
    assert choice.select_backend("norm", torch.ones(7, 5), None) == first and len(looked) == 1
    kinds = [(x.double(), None), (x, x), (x, x.half()), (x.to("meta"), None)]
    backends = [choice.select_backend("norm", *tensors) for tensors in kinds]
    assert backends[0] == backends[3] == "reference" and len(looked) == 1 + len(kinds)
    assert choice.select_backend("rotary", x, None) == first and len(looked) == 2 + len(kinds)
    with aajr.use_backend("reference"):
        assert choice.select_backend("norm", x, None) == "reference" and len(looked) == 3 + len(kinds)
    assert choice.select_backend("norm", x, None) == first and len(looked) == 3 + len(kinds)


def test_the_last_axes_are_of_the_kind_where_kernels_may_lack_them(monkeypatch):
    monkeypatch.setattr(gpu, "_interpreted", lambda: False)
    asked = []

    def lacks(*tensors):
        asked.append(tensors[0].shape[-1])
        return "takes head sizes up to 4" if asked[-1] > 4 else None

    monkeypatch.setattr(choice, "_current", "triton")
    monkeypatch.setattr(choice, "_named", lambda op, backend: backend)
    monkeypatch.setattr(choice, "_why_not", lambda backend, *tensors: None)
    for size, error in ((4, False), (8, True), (4, False), (8, True)):
        with pytest.raises(aajr.BackendUnavailable) if error else contextlib.nullcontext():
            choice.select_backend("attention", torch.ones(2, size), triton_lacks=lacks)
    assert asked == [4, 8, 8]
