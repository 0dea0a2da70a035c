"""Promises of the repository about itself: metadata, house rules, and a wheel that works in a clean environment."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

import aajr_kernels

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
VERSION = aajr_kernels.__version__

#: what a build reads beside the package and its sources
BUILD_FILES = (
    "pyproject.toml",
    "setup.py",
    "CMakeLists.txt",
    "MANIFEST.in",
    "README.md",
    "LICENSE",
    "CHANGELOG.md",
)


def run(*command: str | Path, cwd: Path = ROOT, **env: str) -> str:
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**os.environ, **env},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_the_version_stands_in_one_place():
    """And is a semantic one, with its entry in the changelog."""
    assert PROJECT["dynamic"] == ["version"] and "version" not in PROJECT
    assert re.fullmatch(r"\d+\.\d+\.\d+", VERSION)
    assert re.search(rf"^## {re.escape(VERSION)}\b", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)


def test_every_public_name_exists():
    assert sorted(set(aajr_kernels.__all__)) == sorted(aajr_kernels.__all__)
    assert [name for name in aajr_kernels.__all__ if not hasattr(aajr_kernels, name)] == []


#: files that are longer than a sitting, and read better in one piece than in several
LONG_FILES = {
    # attention's three kernels of gradients, which share the recomputation of a tile
    "aajr_kernels/ops/attention/triton/backward.py": 600,
    # one lie of a layer after another
    "tests/integrations/transformers/test_verification.py": 500,
}


def test_no_file_grows_beyond_reading():
    sources = [
        path
        for folder in ("aajr_kernels", "experiments", "tests", "scripts")
        for path in (ROOT / folder).rglob("*.py")
    ]
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in sources}
    assert {name: n for name, n in lengths.items() if n > LONG_FILES.get(name, 450)} == {}


def test_make_targets_are_listed_by_help():
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    text = run("make", "help")
    for target in ("demo", "test", "test-all", "sanitize", "lint", "audit", "gpu-check", "clean"):
        assert f"make {target} " in text


def load_script(name: str):
    """A module of scripts/, which finds its neighbours as it does when it is run."""
    if str(ROOT / "scripts") not in sys.path:
        sys.path.append(str(ROOT / "scripts"))
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


def test_scripts_share_no_name_with_modules_and_folders_of_the_tests():
    """Both are on sys.path in the tests, where a script hides a folder without __init__.py."""
    assert not {path.stem for path in (ROOT / "tests").iterdir()} & {
        path.stem for path in (ROOT / "scripts").iterdir() if path.stem != "__pycache__"
    }


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A copy of what the builds read, so that no build product is left in the repository."""
    copy = tmp_path_factory.mktemp("source")
    for name in BUILD_FILES:
        shutil.copy(ROOT / name, copy)
    for name in ("aajr_kernels", "csrc"):
        if (ROOT / name).is_dir():
            skip = shutil.ignore_patterns("__pycache__", "_build_info.json", "_native*", "_cuda.*")
            shutil.copytree(ROOT / name, copy / name, ignore=skip)
    return copy


def build_wheel(source: Path, out: Path, **env: str) -> Path:
    run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", out, ".", cwd=source, **env)
    (wheel,) = out.glob("*.whl")
    return wheel


def clean_environment(folder: Path, wheel: Path) -> Path:
    """A new environment that holds the wheel; its dependencies are lent by this one, the package itself is not."""
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    # a plain .pth line adds the folder without running its own .pth files, so an editable install stays behind
    lent = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    base = Path(lent[0], "aajr_base.pth")
    lent += base.read_text().split("\n") if base.exists() else []
    (site / "lent.pth").write_text("\n".join(lent) + "\n")
    run(
        sys.executable,
        "-m",
        "pip",
        "--python",
        python,
        "install",
        "-q",
        "--no-deps",
        "--ignore-installed",
        wheel,
    )
    return python


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_pure_python_wheel_works_in_a_clean_environment(source, tmp_path):
    wheel = build_wheel(source, tmp_path / "dist", AAJR_NATIVE="0")
    assert wheel.name.endswith("-py3-none-any.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "aajr_kernels/py.typed" in names
    assert not [
        name
        for name in names
        if name.startswith(("tests/", "scripts/", "experiments/", "bench/", "demo/", "common/"))
    ]
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "aajr_kernels").rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == modules
    run(sys.executable, "-m", "twine", "check", "--strict", wheel)
    run(sys.executable, "-m", "check_wheel_contents", wheel)

    python = clean_environment(tmp_path / "clean", wheel)
    where = run(python, "-c", "import aajr_kernels; print(aajr_kernels.__file__)", cwd=tmp_path)
    assert str(tmp_path) in where
    facts = json.loads(run(python.parent / "aajr", "info", "--json", cwd=tmp_path))
    assert facts["versions"]["aajr_kernels"] == VERSION
    assert facts["build"]["native"] is False
    assert "AAJR_NATIVE=0" in facts["build"]["reason"]
    assert facts["backends"]["reference"] is None


BINDINGS = """
#include <pybind11/pybind11.h>
int answer();
PYBIND11_MODULE(_native, m) { m.def("answer", &answer); }
"""
needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler (c++) is installed")


@pytest.fixture
def small(source, tmp_path) -> Path:
    """The source tree with three small C++ files instead of the kernels."""
    tree = tmp_path / "tree"
    shutil.copytree(source, tree, ignore=shutil.ignore_patterns("csrc", "build", "*.egg-info"))
    (tree / "csrc").mkdir()
    (tree / "csrc" / "bindings.cpp").write_text(BINDINGS)
    (tree / "csrc" / "answer.cpp").write_text("int answer() { return 42; }\n")
    (tree / "csrc" / "other.cpp").write_text("int other() { return 1; }\n")
    return tree


@pytest.fixture(scope="module")
def native_wheel(source, tmp_path_factory) -> Path:
    """The wheel as `pip wheel .` makes it: isolated, every kernel compiled."""
    return build_wheel(
        source, tmp_path_factory.mktemp("dist"), AAJR_NATIVE="1", AAJR_CMAKE_ARGS="", AAJR_CUDA="OFF"
    )


USE = """
import torch, aajr_kernels as a
from aajr_kernels.backends import cpu as native
d = a.dual(torch.randn(5, 7), torch.randn(5, 7))
with a.use_backend("native"), a.coverage() as cov:
    y = a.rms_norm(d, 7)
with a.use_backend("reference"):
    torch.testing.assert_close(y.stacked, a.rms_norm(d, 7).stacked)
print(native.info()["file"])
"""


@pytest.mark.slow
@pytest.mark.timeout(1800)
@needs_compiler
def test_native_wheel_works_in_a_clean_environment(native_wheel, tmp_path):
    tag = f"{sys.implementation.cache_tag.replace('cpython-', 'cp')}"
    assert f"-{tag}-{tag}-" in native_wheel.name and not native_wheel.name.endswith("-any.whl")
    opened = zipfile.ZipFile(native_wheel)
    libraries = [name for name in opened.namelist() if ".so" in name or name.endswith((".pyd", ".dylib"))]
    assert libraries == [
        f"aajr_kernels/_native{sysconfig.get_config_var('EXT_SUFFIX')}"
    ]  # and no copy of libgomp
    (metadata,) = (name for name in opened.namelist() if name.endswith(".dist-info/WHEEL"))
    text = opened.read(metadata).decode()
    assert "Root-Is-Purelib: false" in text and f"Tag: {tag}-{tag}-" in text
    run(sys.executable, "-m", "twine", "check", "--strict", native_wheel)
    run(sys.executable, "-m", "check_wheel_contents", native_wheel)

    python = clean_environment(tmp_path / "clean", native_wheel)
    facts = json.loads(run(python.parent / "aajr", "info", "--json", cwd=tmp_path))
    assert facts["build"]["native"] is True and facts["backends"]["native"] is None
    assert facts["native"]["file"].startswith(str(tmp_path))
    assert not [name for name in facts["native"]["capabilities"] if "emulated" in name]
    assert str(tmp_path) in run(python, "-c", USE, cwd=tmp_path)
    if shutil.which("objdump"):
        dynamic = run("objdump", "-p", facts["native"]["file"])
        assert "RPATH" not in dynamic and "RUNPATH" not in dynamic
        needed = [line.split()[1] for line in dynamic.splitlines() if "NEEDED" in line]
        assert not [name for name in needed if "gomp" in name and name != "libgomp.so.1"]
        assert not [name for name in needed if "torch" in name or "python" in name]


@pytest.mark.slow
@pytest.mark.timeout(600)
@needs_compiler
def test_a_failed_compilation_leaves_a_working_package_and_its_reason(small, tmp_path):
    (small / "csrc" / "answer.cpp").write_text("this is not C++\n")
    wheel = build_wheel(small, tmp_path / "dist")
    python = clean_environment(tmp_path / "clean", wheel)
    facts = json.loads(run(python.parent / "aajr", "info", "--json", cwd=tmp_path))
    assert facts["build"]["native"] is False and facts["native"] is None
    assert "compilation" in facts["build"]["reason"] and "answer.cpp:1:1: error" in facts["build"]["reason"]
    assert facts["build"]["reason"] in facts["backends"]["native"]
    assert facts["backends"]["reference"] is None


def without_compilers(folder: Path) -> str:
    """A PATH that holds what an installation needs besides a compiler."""
    folder.mkdir()
    for name in ("sh", "env", "uname", "cmake", "ninja"):
        if (path := shutil.which(name)) is not None:
            (folder / name).symlink_to(path)
    return str(folder)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_without_a_compiler_the_package_installs_and_says_why(small, tmp_path):
    path = without_compilers(tmp_path / "bin")
    wheel = build_wheel(small, tmp_path / "dist", PATH=path, CXX="")
    assert wheel.name.endswith("-py3-none-any.whl")
    python = clean_environment(tmp_path / "clean", wheel)
    facts = json.loads(run(python.parent / "aajr", "info", "--json", cwd=tmp_path))
    assert "no C++ compiler was found at installation: install g++" in facts["backends"]["native"]
    code = USE.replace('"native"', '"auto"').replace('print(native.info()["file"])', "print(cov)")
    assert "reference" in run(python, "-c", code, cwd=tmp_path)
    asked = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", tmp_path / "none", "."],
        cwd=small,
        env={**os.environ, "PATH": path, "CXX": "no-such-compiler", "AAJR_NATIVE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert asked.returncode != 0
    assert "AAJR_NATIVE=1 asks for the native module, but CXX=no-such-compiler was not found" in asked.stderr


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_broken_compiler_is_named_with_its_words(small, tmp_path):
    compiler = tmp_path / "c++broken"
    compiler.write_text("#!/bin/sh\necho 'error: no space left in the crystal' >&2\nexit 1\n")
    compiler.chmod(0o755)
    wheel = build_wheel(small, tmp_path / "dist", CXX=str(compiler))
    info = json.loads(zipfile.ZipFile(wheel).read("aajr_kernels/_build_info.json"))
    assert info["native"] is False and str(compiler) in info["reason"]
    assert "not able to compile a simple test program" in info["reason"]


@pytest.mark.slow
@pytest.mark.timeout(600)
@needs_compiler
def test_an_editable_install_builds_in_place_and_again_only_what_changed(small, tmp_path):
    venv.create(tmp_path / "env", with_pip=False)
    python = tmp_path / "env" / "bin" / "python"

    def install(**env: str) -> None:
        options = ["-q", "--no-deps", "--editable", "."]
        run(sys.executable, "-m", "pip", "--python", python, "install", *options, cwd=small, **env)

    def answer() -> int:
        code = "import importlib.util as u; s = u.spec_from_file_location('_native', '{}'); m = u.module_from_spec(s)"
        (module,) = (small / "aajr_kernels").glob("_native*.so")
        return int(run(python, "-c", f"{code.format(module)}; s.loader.exec_module(m); print(m.answer())"))

    install()
    assert answer() == 42
    (folder,) = (small / "build").glob("native-*")
    (other,) = folder.glob("CMakeFiles/ops.dir/**/other.cpp.o")
    before = other.stat().st_mtime_ns
    (small / "csrc" / "answer.cpp").write_text("int answer() { return 43; }\n")
    install()
    assert answer() == 43
    assert other.stat().st_mtime_ns == before
    record = json.loads((small / "aajr_kernels" / "_build_info.json").read_text())
    assert record["native"] is True
    assert record["seconds"].keys() == {"native"} and record["seconds"]["native"]["processor"] > 0

    install(AAJR_NATIVE="0")  # no stale module stays behind
    assert list((small / "aajr_kernels").glob("_native*.so")) == []


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_source_archive_holds_what_a_build_needs(source, tmp_path):
    run(sys.executable, "-m", "build", "--sdist", "--outdir", tmp_path, cwd=source)
    (archive,) = tmp_path.glob("*.tar.gz")
    run(sys.executable, "-m", "twine", "check", "--strict", archive)
    with tarfile.open(archive) as opened:
        names = {name.split("/", 1)[1] for name in opened.getnames() if "/" in name}
    expected = {
        "setup.py",
        "pyproject.toml",
        "CMakeLists.txt",
        "LICENSE",
        "README.md",
        "aajr_kernels/py.typed",
    }
    expected |= {path.relative_to(source).as_posix() for path in source.glob("csrc/**/*") if path.is_file()}
    assert expected <= names
