"""Look up known vulnerabilities with pip-audit: of the lower bounds in pyproject.toml, and of the installed packages.

    python scripts/audit.py        # or make audit

Exit code 0: every package was looked up and none has a known vulnerability. 1: one has. 2: a package was not looked up,
because the service of vulnerabilities cannot be reached or does not know it; that is no clean result. pip-audit itself
ends with "No known vulnerabilities found" and code 0 for packages that it skipped.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
CLEAN, VULNERABLE, INCOMPLETE = 0, 1, 2


@dataclass(frozen=True)
class Audit:
    """Result for some packages.

    Attributes:
        looked_up: "name version" of the packages that the service knows.
        vulnerable: "name version: ID, fixed in VERSIONS", one for each known vulnerability.
        skipped: reason for each package that was not looked up.
    """

    looked_up: list[str]
    vulnerable: list[str]
    skipped: list[str]


def lower_bounds() -> list[str]:
    """Requirements of the package and its extras at their lowest versions, "name==version"."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lists = [project["dependencies"], *project["optional-dependencies"].values()]
    pins = set()
    for requirement in map(Requirement, (text for texts in lists for text in texts)):
        (lowest,) = (bound.version for bound in requirement.specifier if bound.operator == ">=")
        pins.add(f"{requirement.name}=={lowest}")
    return sorted(pins)


def parsed(report: str) -> Audit:
    """Read the JSON of pip-audit.

    Raises:
        ValueError: it is none.
    """
    audit = Audit([], [], [])
    for package in json.loads(report)["dependencies"]:
        if "skip_reason" in package:
            audit.skipped.append(package["skip_reason"])
            continue
        name = f"{package['name']} {package['version']}"
        audit.looked_up.append(name)
        for hole in package["vulns"]:
            fixed = ", ".join(hole["fix_versions"]) or "no version"
            audit.vulnerable.append(f"{name}: {hole['id']}, fixed in {fixed}")
    return audit


def installed() -> list[str]:
    """Packages of this environment but this project, "name==version", without a build's label (2.13.0+cpu)."""
    return sorted(
        f"{package.name}=={Version(package.version).public}"
        for package in importlib.metadata.distributions()
        if canonicalize_name(package.name) != "aajr-kernels"
    )


def look_up(pins: list[str]) -> Audit:
    """Run pip-audit for these versions.

    Raises:
        SystemExit: it gave no result: it is not installed, or the service cannot be reached.
    """
    with tempfile.TemporaryDirectory() as folder:
        report, requirements = Path(folder) / "report.json", Path(folder) / "pins.txt"
        requirements.write_text("\n".join(pins) + "\n", encoding="utf-8")
        command = [sys.executable, "-m", "pip_audit", "--progress-spinner", "off", "--format", "json"]
        files = ["--output", str(report), "--requirement", str(requirements)]
        done = subprocess.run(
            [*command, *files, "--no-deps", "--disable-pip"],  # versions are known: nothing is resolved
            cwd=ROOT,
            env={**os.environ, "NO_COLOR": "1"},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            check=False,
        )
        if report.exists():
            return parsed(report.read_text(encoding="utf-8"))
    reason = (done.stdout.strip().splitlines() or ["it printed nothing"])[-1]
    if re.search(r"Connection|Timeout|resolve|unreachable", done.stdout):
        reason = f"offline, the service of vulnerabilities cannot be reached ({reason})"
    print(f"[audit] nothing was looked up: {reason}. This is no clean result.")
    raise SystemExit(INCOMPLETE)


def verdict(audits: dict[str, Audit]) -> int:
    """Print a line for every finding and every part; the exit code."""
    vulnerable = skipped = 0
    for part, audit in audits.items():
        for line in (*audit.vulnerable, *(f"not looked up: {reason}" for reason in audit.skipped)):
            print(f"[audit] {part}: {line}")
        print(
            f"[audit] {part}: {len(audit.looked_up)} packages looked up, {len(audit.vulnerable)} known "
            f"vulnerabilities, {len(audit.skipped)} packages not looked up"
        )
        vulnerable, skipped = vulnerable + len(audit.vulnerable), skipped + len(audit.skipped)
    if skipped:
        print(f"[audit] incomplete: {skipped} packages were not looked up. This is no clean result.")
    return VULNERABLE if vulnerable else INCOMPLETE if skipped else CLEAN


def main() -> int:
    audits = {"lower bounds": look_up(lower_bounds())}
    if audits["lower bounds"].looked_up:
        audits["installed"] = look_up(installed())
    else:
        print(
            "[audit] offline, or an index without reports of vulnerabilities: installed packages are left out"
        )
    return verdict(audits)


if __name__ == "__main__":
    sys.exit(main())
