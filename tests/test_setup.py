"""Set-up of `.venv` and of the environments with other versions: which torch, which packages, which table."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from test_packaging import ROOT, load_script

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


@pytest.fixture
def script():
    return load_script("setup_env")


@pytest.fixture
def environment():
    return load_script("environment")


@pytest.fixture
def test_env():
    return load_script("test_env")


@pytest.mark.parametrize(
    ("index", "driver", "offered", "expected"),
    [
        (
            "https://example.invalid/simple",
            False,
            True,
            ["torch==2.13.0", "--index-url", "https://example.invalid/simple"],
        ),
        ("", False, True, ["torch==2.13.0"]),
        (None, True, True, ["torch==2.13.0"]),
        (None, False, True, ["torch==2.13.0+cpu"]),
        (None, False, False, ["torch==2.13.0+cpu", "--extra-index-url"]),
    ],
    ids=["named index", "pip's choice", "NVIDIA driver", "local CPU build", "index of CPU builds"],
)
def test_set_up_never_downloads_cuda_without_a_driver(script, monkeypatch, index, driver, offered, expected):
    monkeypatch.setattr(script.platform, "system", lambda: "Linux")
    monkeypatch.setattr(script, "has_nvidia_driver", lambda: driver)
    monkeypatch.setattr(script, "pip_offers", lambda version: offered and version == "2.13.0+cpu")
    monkeypatch.delenv("AAJR_TORCH_INDEX", raising=False)
    if index is not None:
        monkeypatch.setenv("AAJR_TORCH_INDEX", index)
    arguments, _ = script.torch_source()
    assert arguments[: len(expected)] == expected


def test_set_up_takes_plain_torch_where_it_is_a_cpu_build(script, monkeypatch):
    monkeypatch.setattr(script.platform, "system", lambda: "Darwin")
    monkeypatch.delenv("AAJR_TORCH_INDEX", raising=False)
    assert script.torch_source()[0] == ["torch==2.13.0"]


def named(group: str) -> set[str]:
    """Names of the packages of a dependency group, those that it includes too."""
    names: set[str] = set()
    for entry in PYPROJECT["dependency-groups"][group]:
        names |= named(entry["include-group"]) if isinstance(entry, dict) else {re.match(r"[\w-]+", entry)[0]}
    return names


def test_groups_are_those_of_the_project(script):
    assert set(script.GROUPS) == set(PYPROJECT["dependency-groups"])
    makefile = (ROOT / "Makefile").read_text()
    assert set(re.findall(r"\(call SETUP,([a-z]+)\)", makefile)) == set(script.GROUPS)


def test_tests_have_the_packages_of_every_extra():
    extras = {
        re.match(r"[\w-]+", r)[0] for e in PYPROJECT["project"]["optional-dependencies"].values() for r in e
    }
    assert extras <= named("test")


def test_the_demo_is_not_made_to_download_what_it_does_not_use(script):
    assert {"triton", "trl", "datasets", "pytest", "mkdocs-material", "mypy"} & named("demo") == set()
    assert "demo" not in script.WITH_TRITON | script.WITH_EMULATED
    assert script.DATA["demo"] == ["requirements/demo-data.txt"]


def test_requirements_beside_torch_are_read_from_the_project(script):
    expected = [r for r in PYPROJECT["project"]["dependencies"] if not r.startswith("torch")]
    assert script.dependencies() == expected and expected


def test_a_target_adds_its_packages_to_those_that_are_there(script, monkeypatch, tmp_path):
    """And a second call does nothing."""
    calls = []
    monkeypatch.setattr(script, "STAMP", tmp_path / "stamp.json")
    monkeypatch.setattr(
        script, "read_stamp", lambda: json.loads(script.STAMP.read_text()) if script.STAMP.exists() else {}
    )
    monkeypatch.setattr(script, "create_venv", lambda: calls.append("create"))
    monkeypatch.setattr(script, "install_torch", lambda: "2.13.0")
    monkeypatch.setattr(script.VENV.__class__, "pip", lambda self, *arguments, **_: None)
    monkeypatch.setattr(script.VENV.__class__, "size", lambda self: 0.0)
    monkeypatch.setattr(script, "install", lambda groups, torch: calls.append(sorted(groups)))
    monkeypatch.setattr(script, "building", lambda emulated: _Recorded(calls, emulated))
    for groups in ({"demo"}, {"demo"}, {"test"}, {"demo"}):
        script.refresh(set(groups), force=False)
    assert calls == ["create", "build False", ["demo"], "create", "build True", ["demo", "test"]]
    (script.STAMP).write_text(
        json.dumps({**json.loads(script.STAMP.read_text()), "build": "of older sources"})
    )
    script.refresh({"demo"}, force=False)
    assert calls[-1] == "build True" and len(calls) == 7


class _Recorded:
    def __init__(self, calls: list, emulated: bool) -> None:
        calls.append(f"build {emulated}")

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass


def test_progress_names_large_downloads_and_shows_that_it_goes_on(environment, monkeypatch, capsys):
    monkeypatch.setattr(environment, "HEARTBEAT", 0.02)
    with environment.Progress() as progress:
        for line in (
            "Collecting torch==2.13.0\n",
            "  Downloading torch-2.13.0-cp311-cp311-linux_x86_64.whl (192.3 MB)\n",
            "Collecting idna\n",
            "  Downloading idna-3.13-py3-none-any.whl (65 kB)\n",
        ):
            progress.read(line)
        time.sleep(0.2)
        progress.read("Installing collected packages: idna, torch\n")
    lines = capsys.readouterr().out.splitlines()
    assert "[set-up]   downloading torch 2.13.0, 192 MB" in lines
    assert "[set-up]   0 s: 2 packages so far" in lines
    assert lines[-1] == "[set-up]   unpacking 2 packages"
    assert not [line for line in lines if "idna" in line]


def test_lower_bounds_are_those_of_the_project(test_env):
    bounds = test_env.lower_bounds()
    assert "torch==2.11.*" in bounds
    assert {bound.partition("==")[0] for bound in bounds} >= {"torch", "typer", "rich", "transformers", "trl"}


def test_every_environment_names_what_exists(test_env):
    makefile = (ROOT / "Makefile").read_text()
    assert f"ENV={'|'.join(test_env.ENVIRONMENTS)}" in makefile
    for name in test_env.SHORT:
        assert Path(ROOT, name.partition("::")[0]).exists()


def test_the_table_of_environments_is_that_of_its_rows(test_env, tmp_path):
    rows = test_env.read()
    assert {row["environment"] for row in rows} <= set(test_env.ENVIRONMENTS)
    assert all(
        row["failed"] == 0 and row["passed"] > 1000 and set(row["errors"]) == set(test_env.MODELS)
        for row in rows
    )
    assert not test_env.write(shutil.copy(test_env.PAGE, tmp_path / "environments.md"), rows)


def test_the_commit_of_a_row_is_that_before_the_run(test_env, monkeypatch):
    """A commit made while the tests run is not what they ran on."""
    calls = []
    environment = SimpleNamespace(
        name="newest",
        lock=Path(),
        python=sys.executable,
        refresh=lambda: calls.append("refresh"),
        version_of=lambda name: "1",
        pytest=lambda *arguments: calls.append("tests") or (0, None),
    )
    monkeypatch.setattr(test_env, "TestEnvironment", lambda name: environment)
    monkeypatch.setattr(test_env, "locked", lambda path: contextlib.nullcontext())
    monkeypatch.setattr(test_env, "_printed", lambda *arguments: "3.12.1")
    monkeypatch.setattr(test_env, "counts", lambda report: {})
    monkeypatch.setattr(test_env, "compiled_errors", lambda report: {})
    monkeypatch.setattr(test_env, "commit_of_the_tree", lambda: calls.append("commit") or "abc")
    monkeypatch.setattr(sys, "argv", ["test_env.py", "newest"])
    test_env.main()
    assert calls == ["commit", "refresh", "tests", "tests"]
