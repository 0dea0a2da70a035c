"""Run the tests in an environment of its own, with other versions than `.venv` has.

    python scripts/test_env.py newest                  # the everyday suite and the short set
    python scripts/test_env.py newest --short          # imports, one model of each kind: eager, compiled, fused ...
    python scripts/test_env.py oldest tests/rules -x   # anything else goes to pytest

An environment lives in the user's cache folder (AAJR_ENVIRONMENTS names another one) and is brought up to date by pip
at every call: `newest` is what `pip install` takes on that day. The tests run on a copy of the working tree there, so
that each environment has native kernels of its own. `--publish` writes what a complete run showed into
docs/environments.jsonl and the table of docs/environments.md.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from environment import BUILD_INPUTS, BUILD_TOOLS, ROOT, Environment, fail, interpreter_for, locked, say, step
from setup_env import STAMP, TORCH, digest, install_data

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

sys.path.insert(0, str(ROOT))

from common.pages import between, table

ROWS, PAGE = ROOT / "docs" / "environments.jsonl", ROOT / "docs" / "environments.md"
BEGIN, END = "<!-- environments: written by `make test-env` -->", "<!-- end of environments -->"
PACKAGES = ("torch", "triton", "transformers", "numpy")
MODELS = {"Llama": "llama-sdpa", "GPT-2": "gpt2-sdpa"}


@dataclass(frozen=True)
class Versions:
    """Versions that an environment is made of.

    Attributes:
        shows: one line for the table.
        python: version of the interpreter; None: the one that runs this script.
        requirements: for pip, beside the group `test`.
        oldest: take the lowest versions that pyproject.toml allows.
        constraints: take the versions of requirements/constraints.txt.
        upgrade: take the newest versions.
    """

    shows: str
    python: str | None = None
    requirements: tuple[str, ...] = ()
    oldest: bool = False
    constraints: bool = False
    upgrade: bool = False


def _pinned(python: str) -> Versions:
    return Versions(f"the pinned versions on Python {python}", python, (f"torch=={TORCH}",), constraints=True)


ENVIRONMENTS = {
    "oldest": Versions("the lower bounds of pyproject.toml", "3.10", oldest=True),
    "gpu": Versions(
        "a GPU machine's image", "3.12", ("torch==2.11.0", "triton==3.6.0", "transformers==5.17.0")
    ),
    "newest": Versions("what pip installs today", None, ("torch", "numpy"), upgrade=True),
    "py310": _pinned("3.10"),
    "py312": _pinned("3.12"),
    "py313": _pinned("3.13"),
}

#: tests repeated with the newest versions at every change
SHORT = (
    "tests/test_imports.py",
    "tests/cli/test_info.py",
    "tests/rules/test_guards.py",
    "tests/rules/test_transforms_around.py",
    *(
        f"tests/test_zoo.py::test_aligned_penalty_is_exact_in_float64[{name}-1]"
        for name in ("llama-sdpa", "gpt2-sdpa", "bert-sdpa", "t5_encoder-sdpa", "vit-sdpa")
    ),
    *(
        f"tests/integrations/transformers/test_compile.py::test_inductor[{name}-{form}]"
        for name in MODELS.values()
        for form in ("as it is", "fused")
    ),
    "tests/integrations/transformers/test_fusion.py",
    "tests/integrations/transformers/test_recomputed.py",
)


def lower_bounds() -> list[str]:
    """The oldest series of every package that the project names a lower bound for."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    listed = [
        *project["dependencies"],
        *(r for extra in project["optional-dependencies"].values() for r in extra),
    ]
    bounds = {re.fullmatch(r"([\w-]+)>=([\d.]+)", requirement).groups() for requirement in listed}  # type: ignore[union-attr]
    if len({name for name, _ in bounds}) != len(bounds):
        fail("pyproject.toml gives a package two lower bounds.")
    return sorted(f"{name}=={version}.*" for name, version in bounds)


class TestEnvironment(Environment):
    """One of :data:`ENVIRONMENTS`, with the copy of the working tree that its tests run on."""

    def __init__(self, name: str) -> None:
        cache = (
            Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "aajr_kernels" / "environments"
        )
        home = Path(os.environ.get("AAJR_ENVIRONMENTS", cache)) / name
        super().__init__(home / "venv")
        self.name, self.versions, self.source, self.lock = (
            name,
            ENVIRONMENTS[name],
            home / "source",
            home / "lock",
        )

    def refresh(self) -> None:
        """Bring packages, sources and kernels up to date."""
        versions = self.versions
        interpreter = interpreter_for(versions.python) if versions.python else sys.executable
        if interpreter is None:
            fail(
                f"the environment {self.name} needs Python {versions.python}, which is not on PATH: install it."
            )
        if not self.works():
            self.create(str(interpreter))
            self.pip("pip>=25.1")
        with step(f"packages of {self.name}"), tempfile.TemporaryDirectory() as folder:
            constraints = Path(folder, "constraints.txt")
            constraints.write_text("\n".join(lower_bounds()) if versions.oldest else "")
            options = ["--upgrade"] * versions.upgrade + ["--constraint", str(constraints)] * versions.oldest
            options += ["--constraint", "requirements/constraints.txt"] * versions.constraints
            self.pip(
                *options, *versions.requirements, "torch", "typer", "rich", *BUILD_TOOLS, "--group", "test"
            )
        install_data(self, ["test"])
        self.install_triton(str(self.version_of("torch")))
        self._copy_sources()
        self._install()

    def _copy_sources(self) -> None:
        """A clone that follows the working tree, uncommitted changes included; what was built in it stays."""
        if not (self.source / ".git").exists():
            _git(ROOT, "clone", "--quiet", "--no-checkout", str(ROOT), str(self.source))
        _git(self.source, "fetch", "--quiet", str(ROOT), "HEAD")
        _git(self.source, "checkout", "--quiet", "--force", "--detach", "FETCH_HEAD")
        _git(self.source, "clean", "--quiet", "--force", "-d")
        changed = _git(ROOT, "diff", "--name-only", "HEAD") + _git(
            ROOT, "ls-files", "--others", "--exclude-standard"
        )
        for name in changed:
            target = self.source / name
            if (ROOT / name).is_file():
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, target)
            else:
                target.unlink(missing_ok=True)

    def _install(self) -> None:
        """Install the copy, editable; with `.venv`'s native kernels where they are current, else with its own."""
        suffix = _printed(self.python, "import sysconfig; print(sysconfig.get_config_var('EXT_SUFFIX'))")
        native = ROOT / "aajr_kernels" / f"_native{suffix}"
        record = ROOT / "aajr_kernels" / "_build_info.json"
        # the module does not depend on torch
        current = native.exists() and STAMP.exists() and digest(*BUILD_INPUTS) in STAMP.read_text()
        settings = (
            {"AAJR_NATIVE": "0"} if current else {"AAJR_CUDA": "OFF", "AAJR_CMAKE_ARGS": "-DAAJR_EMULATED=ON"}
        )
        with step("aajr_kernels" if current else "aajr_kernels, with its native kernels"):
            self.pip("--no-deps", "--no-build-isolation", "--editable", str(self.source), **settings)
        if current:
            for file in (native, record):
                shutil.copy2(file, self.source / "aajr_kernels" / file.name)

    def pytest(self, *arguments: str) -> tuple[int, ElementTree.Element]:
        """Run the tests there; the exit status, and the report in JUnit's form."""
        defaults = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "MPLBACKEND": "Agg"}
        threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        with tempfile.TemporaryDirectory() as folder:
            report = Path(folder, "report.xml")
            command = [str(self.python), "-m", "pytest", f"--junitxml={report}", *arguments]
            done = subprocess.run(
                command, cwd=self.source, env={**defaults, **os.environ, **threads}, check=False
            )
            if not report.exists():
                fail(f"pytest ended with {done.returncode} and left no report.")
            return done.returncode, ElementTree.parse(report).getroot()


def _git(folder: Path, *arguments: str) -> list[str]:
    done = subprocess.run(
        ["git", "-C", str(folder), *arguments], text=True, stdout=subprocess.PIPE, check=True
    )
    return done.stdout.splitlines()


def commit_of_the_tree() -> str:
    """Short hash of HEAD, with a + where the working tree differs from it."""
    changed = _git(ROOT, "status", "--porcelain", "--", ".", ":!docs/environments.*")
    return _git(ROOT, "log", "-1", "--format=%h")[0] + ("+" if changed else "")


def _printed(python: Path, code: str) -> str:
    return subprocess.run(
        [str(python), "-c", code], text=True, stdout=subprocess.PIPE, check=True
    ).stdout.strip()


def counts(report: ElementTree.Element) -> dict[str, int]:
    """Tests passed, failed (errors included) and skipped."""
    (suite,) = report.iter("testsuite")
    failed, skipped = (
        int(suite.get("failures", 0)) + int(suite.get("errors", 0)),
        int(suite.get("skipped", 0)),
    )
    return {"passed": int(suite.get("tests", 0)) - failed - skipped, "failed": failed, "skipped": skipped}


def compiled_errors(report: ElementTree.Element) -> dict[str, float]:
    """Relative error of the gradients of compiled steps against the float64 oracle, the larger of both forms."""
    errors: dict[str, float] = {}
    for case in report.iter("testcase"):
        for label, name in MODELS.items():
            if case.get("name", "").startswith(f"test_inductor[{name}-"):
                values = [
                    float(p.get("value", "nan")) for p in case.iter("property") if p.get("name") == "error"
                ]
                errors[label] = max(errors.get(label, 0.0), *values)
    return errors


def read() -> list[dict[str, Any]]:
    """The committed rows."""
    return (
        [json.loads(line) for line in ROWS.read_text(encoding="utf-8").splitlines()] if ROWS.exists() else []
    )


def write(page: Path, rows: list[dict[str, Any]]) -> bool:
    """Put the table between the marks of the page; whether that changed it."""
    heads = [
        "command",
        "shows",
        "Python",
        *PACKAGES,
        "passed",
        *(f"compiled {name}" for name in MODELS),
        "commit",
    ]
    lines = [
        [
            f"`make test-env ENV={row['environment']}`",
            ENVIRONMENTS[row["environment"]].shows,
            row["python"],
            *(row["versions"].get(name) or "–" for name in PACKAGES),
            f"{row['passed']:,}",
            *(f"{row['errors'][name]:.0e}" for name in MODELS),
            row["commit"],
        ]
        for row in rows
    ]
    return between(page, BEGIN, END, table(heads, lines))


def publish(row: dict[str, Any]) -> None:
    """Replace the environment's row and write the table."""
    rows = {old["environment"]: old for old in read()} | {row["environment"]: row}
    ordered = [rows[name] for name in ENVIRONMENTS if name in rows]
    ROWS.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ordered), encoding="utf-8")
    write(PAGE, ordered)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("environment", choices=ENVIRONMENTS)
    parser.add_argument("--short", action="store_true", help="the short set only")
    parser.add_argument("--publish", action="store_true", help="write the row of a complete, green run")
    parser.add_argument("--jobs", default="2", help="tests at a time (2)")
    options, arguments = parser.parse_known_args()
    if options.publish and (options.short or arguments):
        parser.error("--publish needs a complete run: leave --short and pytest's arguments out.")
    environment = TestEnvironment(options.environment)
    with locked(environment.lock):
        commit = commit_of_the_tree()  # before the run, which takes long: what is copied is what is tested
        environment.refresh()
        versions = {name: environment.version_of(name) for name in PACKAGES}
        python = _printed(environment.python, "import platform; print(platform.python_version())")
        say(
            f"{environment.name}: Python {python}, " + ", ".join(f"{n} {v}" for n, v in versions.items() if v)
        )
        workers = ["-n", options.jobs, "--dist", "worksteal"]
        if arguments:
            sys.exit(environment.pytest(*workers, *arguments)[0])
        start = time.monotonic()
        status, short = environment.pytest(*workers, *SHORT)
        if options.short:
            sys.exit(status)
        full_status, full = environment.pytest(*workers, "-m", "not slow and not gpu")
    row = {
        "environment": environment.name,
        "python": python,
        "versions": versions,
        **counts(full),
        "errors": compiled_errors(short),
        "seconds": round(time.monotonic() - start),
        "commit": commit,
    }
    print(json.dumps(row))
    if status or full_status:
        sys.exit(status or full_status)
    if options.publish:
        publish(row)


if __name__ == "__main__":
    main()
