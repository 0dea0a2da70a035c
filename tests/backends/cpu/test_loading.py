"""Loading of the native module: the message where it is missing, and settings that it cannot follow."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from aajr_kernels.backends import choice
from aajr_kernels.backends import cpu as native

BUILT = choice.backends()["native"] is None
needs_native = pytest.mark.skipif(not BUILT, reason=f"native: {choice.backends()['native']}")


def start(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **env}, capture_output=True, text=True, check=False
    )


def test_build_record(tmp_path, monkeypatch):
    monkeypatch.setattr(native, "__file__", str(tmp_path / "backends" / "cpu.py"))
    assert "never installed" in native.build_info()["reason"]
    record = tmp_path / "_build_info.json"
    record.write_text("{")
    assert "reinstall" in native.build_info()["reason"]
    record.write_text('{"native": true, "compiler": "/usr/bin/c++"}')
    assert native.build_info()["native"] is True


@pytest.mark.parametrize(
    ("error", "record", "words"),
    [
        (
            "ModuleNotFoundError(name='aajr_kernels._native')",
            {"native": False, "reason": "why"},
            "module: why",
        ),
        (
            "ModuleNotFoundError(name='aajr_kernels._native')",
            {"native": True, "python": "3.9.1"},
            "was built for Python 3.9.1",
        ),
        ("ImportError('libx.so: cannot open')", {"native": True}, "cannot be loaded (libx.so: cannot open)"),
    ],
)
def test_why_it_is_missing(monkeypatch, error, record, words):
    def fail():
        raise eval(error)

    monkeypatch.setattr(native, "module", fail)
    monkeypatch.setattr(native, "build_info", lambda: record)
    assert words in native.missing()
    assert words in choice.backends()["native"]
    choice._has_native.cache_clear()
    try:
        assert choice.select_backend("norm", torch.ones(1)) == "reference"
    finally:
        choice._has_native.cache_clear()


CALL = """
import torch, aajr_kernels as a
d = a.dual(torch.ones(2, 3), torch.ones(2, 3))
print("status:", a.backends()["native"])
with a.use_backend("reference"):
    print(a.rms_norm(d, 3).shape)
a.rms_norm(d, 3)
"""


@needs_native
@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [
        ("AAJR_CPU_CAPABILITY", "sse9", "AAJR_CPU_CAPABILITY=sse9: capability 'sse9' is unknown"),
        pytest.param(
            "AAJR_NATIVE_MODULE", __file__, f"AAJR_NATIVE_MODULE={__file__}: ", marks=pytest.mark.slow
        ),
    ],
)
def test_an_impossible_wish_is_loud_unless_the_reference_was_chosen(variable, value, words):
    done = start(CALL, **{variable: value})
    assert done.returncode != 0
    assert f"status: {words}" in done.stdout
    assert "torch.Size" in done.stdout
    assert f"BackendUnavailable: {words}" in done.stderr
    if variable == "AAJR_CPU_CAPABILITY":
        assert "Choose one of default" in done.stderr


@needs_native
def test_the_environment_chooses_the_capability(monkeypatch):
    module = native.module()
    before = module.capability()
    try:
        for name, runs in module.capabilities():
            native.module.cache_clear()
            monkeypatch.setenv("AAJR_CPU_CAPABILITY", name)
            if runs:
                assert native.info()["capability"] == name
            else:
                with pytest.raises(ValueError, match=f"AAJR_CPU_CAPABILITY={name}: .* cannot run it"):
                    native.module()
    finally:
        native.module.cache_clear()
        module.set_capability(before)


@needs_native
def test_an_entry_that_an_older_module_lacks():
    with pytest.raises(ImportError, match="has no no_such_kernel, it is older than the package"):
        native.call("no_such_kernel", ())


@needs_native
def test_dtypes_without_kernels():
    name = next(n for n in dir(native.module()) if n.endswith("_fwd"))
    with pytest.raises(TypeError, match="no kernels for torch.float64"):
        native.call(name, (torch.ones(1, dtype=torch.float64),))


@needs_native
@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="no /proc/self/maps")
def test_one_openmp_library_in_the_process():
    code = """
import json, torch
from aajr_kernels.backends import cpu as native
torch.ones(1000, 1000) @ torch.ones(1000, 1000)
native.module()
print(json.dumps(sorted({l.split()[-1] for l in open("/proc/self/maps") if "libgomp" in l or "libiomp" in l})))
"""
    done = start(code)
    assert done.returncode == 0, done.stderr
    libraries = json.loads(done.stdout)
    if any("libgomp-" in name for name in libraries):
        pytest.skip("this torch brings an OpenMP library under a name of its own")
    assert len(libraries) <= 1, libraries


@pytest.mark.slow
@needs_native
def test_another_build_is_loaded_from_its_file():
    file = native.module().__file__
    done = start(
        "from aajr_kernels.backends import cpu as native; print(native.info()['file'])",
        AAJR_NATIVE_MODULE=str(file),
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(file)
