"""Reproducible wheels, and an audit that calls nothing clean that it did not look up."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
from test_packaging import ROOT, load_script, needs_compiler
from test_packaging import source as source  # a fixture

from common.trust import count

EPOCH = "1700000000"


def digest_of_wheel(original: Path, folder: Path, umask: int, **env: str) -> str:
    """SHA-256 of a wheel that is built in a copy of the source with this umask; its files are a day old."""
    before = os.umask(umask)
    try:
        tree = folder / "tree"
        shutil.copytree(original, tree, ignore=shutil.ignore_patterns("build", "*.egg-info"))
        for path in tree.rglob("*"):
            if path.is_file():
                path.chmod(0o666 & ~umask)
                os.utime(path, (time.time() - 86400 * umask, time.time() - 86400 * umask))
        command = "from setuptools.build_meta import build_wheel as b; import sys; b(sys.argv[1])"
        (folder / "dist").mkdir()
        subprocess.run(
            [sys.executable, "-c", command, str(folder / "dist")],
            cwd=tree,
            env={**os.environ, "SOURCE_DATE_EPOCH": EPOCH, **env},
            stdout=subprocess.DEVNULL,
            check=True,
        )
    finally:
        os.umask(before)
    (wheel,) = (folder / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as opened:
        places = [str(folder).encode(), str(ROOT).encode()]
        assert [
            name for name in opened.namelist() if any(place in opened.read(name) for place in places)
        ] == []
    return hashlib.sha256(wheel.read_bytes()).hexdigest()


def test_two_builds_of_a_wheel_are_equal_byte_by_byte(source, tmp_path):
    """Of the Python part; the compiled one takes a minute."""
    digests = {
        digest_of_wheel(source, tmp_path / place, umask, AAJR_NATIVE="0")
        for place, umask in (("one", 0o022), ("another place", 0o077))
    }
    assert len(digests) == 1


@pytest.mark.slow
@pytest.mark.timeout(1800)
@needs_compiler
def test_two_builds_of_a_compiled_wheel_are_equal_byte_by_byte(source, tmp_path):
    digests = [
        digest_of_wheel(source, tmp_path / place, umask, AAJR_NATIVE="1", AAJR_CUDA="OFF")
        for place, umask in (("one", 0o022), ("another place", 0o077))
    ]
    assert digests[0] == digests[1]
    count("wheel", builds=len(digests), different=len(set(digests)) - 1)


FAKE = """
import json, pathlib, sys
answers = json.loads(pathlib.Path(__file__).with_name("answers.json").read_text())
asked = [line.split("==") for line in pathlib.Path(sys.argv[sys.argv.index("--requirement") + 1]).read_text().split()]
if answers is None:
    sys.exit("requests.exceptions.ConnectionError: Failed to resolve 'pypi.org'")
packages = [
    {"name": name, "skip_reason": f"not found: {name}"}
    if name in answers["unknown"]
    else {"name": name, "version": version, "vulns": answers["vulnerable"].get(name, [])}
    for name, version in asked
]
pathlib.Path(sys.argv[sys.argv.index("--output") + 1]).write_text(json.dumps({"dependencies": packages}))
print("No known vulnerabilities found")  # as pip-audit does, skipped packages or not
"""


@pytest.fixture
def audited(tmp_path, monkeypatch, capsys):
    """Runs the audit with a pip-audit whose service knows what is given; its exit code and output."""
    script = load_script("audit")
    (tmp_path / "pip_audit.py").write_text(FAKE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(script, "installed", lambda: ["torch==2.13.0", "left-out==1.0"])

    def run(answers) -> tuple[int, str]:
        (tmp_path / "answers.json").write_text(json.dumps(answers))
        try:
            code = script.main()
        except SystemExit as end:
            code = end.code
        return code, capsys.readouterr().out

    return run


def test_the_audit_is_clean_only_if_every_package_was_looked_up(audited):
    code, text = audited({"unknown": [], "vulnerable": {}})
    assert code == 0 and "no clean result" not in text
    assert "installed: 2 packages looked up, 0 known vulnerabilities, 0 packages not looked up" in text
    code, text = audited({"unknown": ["left-out"], "vulnerable": {}})
    assert code == 2 and "not looked up: not found: left-out" in text
    assert "incomplete: 1 packages were not looked up. This is no clean result." in text


def test_the_audit_names_a_vulnerable_package(audited):
    hole = {"id": "GHSA-xxxx", "fix_versions": ["9.0"]}
    code, text = audited({"unknown": ["left-out"], "vulnerable": {"torch": [hole]}})
    assert code == 1
    assert "installed: torch 2.13.0: GHSA-xxxx, fixed in 9.0" in text
    assert "lower bounds: torch 2.11: GHSA-xxxx, fixed in 9.0" in text


def test_the_audit_says_that_it_is_offline(audited):
    code, text = audited(None)
    assert code == 2
    assert "nothing was looked up: offline" in text and "Failed to resolve" in text
    script = load_script("audit")
    names = [pin.split("==")[0] for pin in script.lower_bounds()]
    code, text = audited({"unknown": names, "vulnerable": {}})
    assert code == 2
    assert "offline, or an index without reports of vulnerabilities" in text
    assert f"lower bounds: 0 packages looked up, 0 known vulnerabilities, {len(names)} packages" in text


def test_the_audit_covers_every_bound_and_the_installed_packages():
    script = load_script("audit")
    pins = script.lower_bounds()
    assert "torch==2.11" in pins and "transformers==5.8" in pins and len(set(pins)) == len(pins)
    installed = script.installed()
    assert not [pin for pin in installed if "+" in pin or pin.startswith("aajr")]
    assert [pin for pin in installed if pin.startswith("torch==2.")]


def unsafe(tree: ast.AST) -> list[str]:
    """Calls and imports that run what a file or a name says."""
    modules, calls = (
        {"pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal", "joblib"},
        {"eval", "exec"},
    )
    qualified = {("torch", "load"), ("os", "system"), ("os", "popen"), ("numpy", "load"), ("np", "load")}
    qualified |= {("yaml", name) for name in ("load", "unsafe_load", "full_load")}
    extracting = {"extractall", "extract", "unpack_archive"}  # an archive names files outside of its folder
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names if alias.name.split(".")[0] in modules]
        elif isinstance(node, ast.ImportFrom):
            names += [node.module] if (node.module or "").split(".")[0] in modules and not node.level else []
        elif isinstance(node, ast.Call):
            called = node.func
            if isinstance(called, ast.Name) and called.id in calls:
                names.append(called.id)
            if (
                isinstance(called, ast.Attribute)
                and isinstance(called.value, ast.Name)
                and (called.value.id, called.attr) in qualified
            ):
                names.append(f"{called.value.id}.{called.attr}")
            if isinstance(called, ast.Attribute) and called.attr in extracting:
                names.append(called.attr)
            names += [
                keyword.arg
                for keyword in node.keywords
                if keyword.arg in {"shell", "trust_remote_code", "allow_pickle"}
                and not (isinstance(keyword.value, ast.Constant) and keyword.value.value is False)
            ]
    return names


def test_no_pickle_is_read_and_no_shell_is_started():
    """The promise of SECURITY.md."""
    for text in (
        "import pickle",
        "torch.load(f)",
        "run('ls', shell=True)",
        "eval(name)",
        "from dill import load",
        "yaml.load(f)",
        "tarfile.open(f).extractall(folder)",
    ):
        assert unsafe(ast.parse(text)), text
    files = [
        path
        for folder in ("aajr_kernels", "bench", "common", "demo", "experiments", "examples", "scripts")
        for path in (ROOT / folder).rglob("*.py")
    ]
    found = {
        str(path.relative_to(ROOT)): names for path in files if (names := unsafe(ast.parse(path.read_text())))
    }
    assert found == {}
    count("pickle", files=len(files), calls=sum(map(len, found.values())))
