"""The CUDA module at installation, and the resources of its kernels; no device is needed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
import venv
import zipfile
from pathlib import Path

import pytest
from test_packaging import BUILD_FILES, load_script

ROOT = Path(__file__).resolve().parent.parent
needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler (c++) is installed")

NATIVE = """
#include <pybind11/pybind11.h>
PYBIND11_MODULE(_native, m) { m.attr("answer") = 42; }
"""
CUDA = """
#include <pybind11/pybind11.h>
int blocks();
PYBIND11_MODULE(AAJR_CUDA_MODULE, m) { m.def("blocks", &blocks); }
"""
KERNEL = """
__global__ void nothing(int* out) { *out = 1; }
int blocks() { int n = 0; cudaOccupancyMaxActiveBlocksPerMultiprocessor(&n, nothing, 32, 0); return n; }
"""


@pytest.fixture
def tree(tmp_path) -> Path:
    """The build as it is, with one small kernel."""
    tree = tmp_path / "tree"
    tree.mkdir()
    for name in BUILD_FILES:
        shutil.copy(ROOT / name, tree)
    shutil.copytree(
        ROOT / "aajr_kernels",
        tree / "aajr_kernels",
        ignore=shutil.ignore_patterns("__pycache__", "_*.json", "*.so"),
    )
    files = {
        "bindings.cpp": NATIVE,
        "layout.cpp": "",
        "registry.cpp": "",
        "cuda/bindings.cpp": CUDA,
        "cuda/nothing.cu": KERNEL,
    }
    (tree / "csrc" / "cuda").mkdir(parents=True)
    for name, text in files.items():
        (tree / "csrc" / name).write_text(text)
    shutil.copy(ROOT / "csrc" / "cuda" / "CMakeLists.txt", tree / "csrc" / "cuda")
    return tree


def wheel(tree: Path, **env: str) -> tuple[subprocess.CompletedProcess[str], Path]:
    """Built by this environment's tools, beside its torch."""
    out = tree.parent / "dist"
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(out),
        ".",
    ]
    environment = {**os.environ, "AAJR_CMAKE_ARGS": "", **env}
    done = subprocess.run(command, cwd=tree, env=environment, text=True, capture_output=True, check=False)
    return done, out


def facts(out: Path) -> tuple[dict[str, object], list[str]]:
    """The record of a build, and the compiled modules of the wheel."""
    (path,) = out.glob("*.whl")
    opened = zipfile.ZipFile(path)
    modules = [name.split("/")[1].partition(".")[0] for name in opened.namelist() if ".so" in name]
    return json.loads(opened.read("aajr_kernels/_build_info.json")), sorted(modules)


@pytest.mark.slow
def test_a_wish_that_is_unknown_is_refused(tree):
    done, _ = wheel(tree, AAJR_CUDA="maybe")
    assert done.returncode != 0
    assert "AAJR_CUDA=MAYBE is unknown: choose AUTO, ON or OFF." in done.stderr + done.stdout


@pytest.mark.slow
@pytest.mark.timeout(600)
@needs_compiler
def test_left_out_when_told_and_beside_a_torch_without_cuda(tree):
    import torch

    done, out = wheel(tree, AAJR_CUDA="OFF")
    assert done.returncode == 0, done.stdout + done.stderr
    record, modules = facts(out)
    assert modules == ["_native"] and record["native"] is True and record["cuda"] is False
    assert record["cuda_reason"] == "it was left out at installation (AAJR_CUDA=OFF)"
    if torch.version.cuda is None:
        done, out = wheel(tree, AAJR_CUDA="auto")
        record, modules = facts(out)
        assert modules == ["_native"] and "is built without CUDA (AAJR_CUDA=ON" in str(record["cuda_reason"])


@pytest.mark.slow
@pytest.mark.timeout(600)
@needs_compiler
def test_asked_for_without_a_compiler_it_fails_with_the_reason(tree):
    done, out = wheel(tree, AAJR_CUDA="ON", CUDACXX="/none/nvcc")
    assert done.returncode != 0 and not list(out.glob("*.whl"))
    expected = "AAJR_CUDA=ON asks for the CUDA module, but CUDACXX=/none/nvcc compiles nothing here"
    assert expected in " ".join((done.stdout + done.stderr).split())


@pytest.mark.slow
@pytest.mark.timeout(600)
@needs_compiler
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no CUDA compiler (nvcc) is installed")
def test_asked_for_it_is_in_the_wheel_and_a_failure_is_loud(tree):
    few = {"AAJR_CUDA": "ON", "AAJR_CUDA_ARCHITECTURES": "90-real"}
    done, out = wheel(tree, **few)
    assert done.returncode == 0, done.stdout + done.stderr
    record, modules = facts(out)
    assert modules == ["_cuda", "_native"] and record["cuda"] is True and record["cuda_reason"] is None
    assert record["cuda_architectures"] == "90-real"
    (tree / "csrc" / "cuda" / "nothing.cu").write_text("this is no CUDA\n")
    done, _ = wheel(tree, **few)
    assert done.returncode != 0
    text = done.stdout + done.stderr
    assert "The CUDA module was asked for (AAJR_CUDA=ON), but its compilation failed" in text
    assert "nothing.cu(1): error" in text


@pytest.mark.slow
@pytest.mark.timeout(600)
@needs_compiler
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no CUDA compiler (nvcc) is installed")
@pytest.mark.parametrize(
    ("answer", "expected"),
    [("echo 9.0; echo 9.0; echo 8.0", "90-real,80-real"), ("exit 9", "80-real,90-real,90-virtual")],
)
def test_the_processors_of_this_machine(tree, tmp_path, answer, expected):
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "nvidia-smi").write_text(f"#!/bin/sh\n{answer}\n")
    (tools / "nvidia-smi").chmod(0o755)
    path = f"{tools}{os.pathsep}{os.environ['PATH']}"
    done, out = wheel(tree, AAJR_CUDA="ON", AAJR_CUDA_ARCHITECTURES="present", PATH=path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert str(facts(out)[0]["cuda_architectures"]).startswith(expected)


@pytest.mark.slow
@pytest.mark.timeout(600)
@needs_compiler
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no CUDA compiler (nvcc) is installed")
def test_an_editable_install_has_it_beside_the_native_one_and_finds_a_compiler_that_came_later(
    tree, tmp_path
):
    venv.create(tmp_path / "env", with_pip=False)
    python = tmp_path / "env" / "bin" / "python"

    def install(**env: str) -> dict[str, object]:
        command = [
            sys.executable,
            "-m",
            "pip",
            "--python",
            str(python),
            "install",
            "-q",
            "--no-deps",
            "--editable",
            ".",
        ]
        environment = {**os.environ, "AAJR_CMAKE_ARGS": "", "AAJR_CUDA_ARCHITECTURES": "90-real", **env}
        done = subprocess.run(command, cwd=tree, env=environment, text=True, capture_output=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return json.loads((tree / "aajr_kernels" / "_build_info.json").read_text())

    def modules() -> list[str]:
        return sorted(path.name.partition(".")[0] for path in (tree / "aajr_kernels").glob("*.so"))

    record = install(CUDACXX="/none/nvcc")  # isolated: there is no torch that says no
    assert record["cuda"] is False and modules() == ["_native"]
    record = install(AAJR_CUDA="ON")
    assert record["cuda"] is True and modules() == ["_cuda", "_native"]
    record = install(AAJR_CUDA="OFF")  # no stale module stays behind
    assert record["cuda"] is False and modules() == ["_native"]


# ------------------------------------------------------------------------------------------------------- resources
def test_the_table_of_the_page_is_that_of_the_budgets():
    cuda_budgets = load_script("cuda_budgets")
    budgets = json.loads(cuda_budgets.BUDGETS.read_text())
    between = cuda_budgets.PAGE.read_text().partition(cuda_budgets.BEGIN)[2].partition(cuda_budgets.END)[0]
    assert between.strip() == cuda_budgets.markdown(budgets["registers"])
    assert {p for row in budgets["registers"].values() for p in row} == {"sm_80", "sm_90", "sm_100", "sm_120"}


def test_rules_and_budgets_find_what_they_are_for():
    cuda_budgets = load_script("cuda_budgets")
    fine = {
        "norm_fwd_kernel<bf16, true, 1>": {"sm_90": [64, 0, 0]},
        "norm_bwd_kernel<bf16, true, 2>": {"sm_90": [255, 0, 0]},
    }
    assert cuda_budgets.broken(fine, None) == []  # another toolkit has no budgets
    spilled = {
        "norm_fwd_kernel<bf16, true, 1>": {"sm_80": [64, 8, 0], "sm_90": [64, 0, 16], "sm_120": [129, 0, 0]}
    }
    assert len(cuda_budgets.broken(spilled, None)) == 3
    budgets = {"norm_fwd_kernel<bf16, true, 1>": {"sm_90": 63}}
    # one more register, and a kernel without a budget
    assert len(cuda_budgets.broken(fine, budgets)) == 2


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.skipif(
    shutil.which("nvcc") is None or load_script("cuda_budgets").find_cuobjdump() is None,
    reason="nvcc or cuobjdump not found: the CUDA toolkit is not installed",
)
def test_every_kernel_on_every_processor_is_within_rules_and_budgets(record_property):
    """Compiled without a warning, or the build fails."""
    script = str(ROOT / "scripts" / "cuda_budgets.py")
    start = time.monotonic()
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    record_property("seconds", time.monotonic() - start)
    assert done.returncode == 0, done.stdout + done.stderr
    registers = json.loads((ROOT / "csrc" / "cuda" / "budgets.json").read_text())["registers"]
    assert f"{len(registers)} kernels for" in done.stdout
