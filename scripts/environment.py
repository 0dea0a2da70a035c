"""A Python environment of this checkout: created, filled by pip with progress, and measured.

Shared by setup_env.py (`.venv`) and test_env.py (the environments of docs/environments.md). Needs nothing but a Python
interpreter, 3.10 or newer.
"""

from __future__ import annotations

import contextlib
import os
import platform
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
#: seconds between two lines of a step that prints nothing of its own
HEARTBEAT = 10.0
#: packages smaller than this are counted, larger ones are named
NAMED_MB = 20.0
#: torch's CPU builds do not bring triton along; a pair that is not listed stays
TRITON_FOR_TORCH = {"2.11": "3.6", "2.12": "3.6", "2.13": "3.7", "2.14": "3.8", "2.15": "3.9"}
#: in the environment rather than in an isolated one that is thrown away, so that a rebuild compiles what changed
BUILD_TOOLS = ("setuptools>=77", "pybind11>=2.13", "cmake>=3.24", "ninja>=1.10")
#: sources of the native kernels
BUILD_INPUTS = ("setup.py", "CMakeLists.txt", "csrc")


def say(message: str) -> None:
    print(f"[set-up] {message}", flush=True)


def fail(message: str) -> None:
    raise SystemExit(f"[set-up] error: {message}")


@contextlib.contextmanager
def step(message: str) -> Iterator[None]:
    """Announce a step, and say how long it took."""
    say(f"{message} ...")
    start = time.monotonic()
    yield
    say(f"{message}: {time.monotonic() - start:.0f} s")


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock: of two calls at the same time the second waits, and then finds everything done."""
    if os.name == "nt":
        yield
        return
    import fcntl

    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def start(command: Sequence[str], **env: str) -> subprocess.Popen[str]:
    """Start a command at the repository root, its output and errors in one pipe."""
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, **env},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def run(*command: str) -> subprocess.CompletedProcess[str]:
    """Run a command at the repository root; its output, errors included, and its exit status."""
    with start(command) as process:
        output, _ = process.communicate()
    return subprocess.CompletedProcess(command, process.returncode, output)


class Progress:
    """Tells in a line now and then how far pip is, from its output."""

    def __init__(self) -> None:
        self.activity = "asking for versions"
        self.collected = 0
        self._ended = threading.Event()

    def read(self, line: str) -> None:
        """Take a line of pip's output; large downloads and the start of unpacking are told at once."""
        if line.startswith("Collecting "):
            self.collected += 1
            self.activity = f"{self.collected} packages so far"
        elif size := re.match(r"\s*Downloading (\S+?)-(\d[^-]*)-\S* \(([\d.]+) (MB|GB)\)", line):
            megabytes = float(size[3]) * (1000 if size[4] == "GB" else 1)
            if megabytes >= NAMED_MB:
                say(f"  downloading {size[1]} {size[2]}, {megabytes:,.0f} MB")
        elif line.lstrip().startswith("Building "):
            self.activity = "building"
        elif line.startswith("Installing collected packages:"):
            count = line.count(",") + 1
            self.activity = f"unpacking {count} packages"
            say(f"  {self.activity}")

    def __enter__(self) -> Progress:
        start = time.monotonic()

        def beat() -> None:
            while not self._ended.wait(HEARTBEAT):
                say(f"  {time.monotonic() - start:.0f} s: {self.activity}")

        threading.Thread(target=beat, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()


class Environment:
    """A virtual environment in a folder.

    Args:
        folder: where it is, or will be.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.bin = folder / ("Scripts" if os.name == "nt" else "bin")
        self.python = self.bin / ("python.exe" if os.name == "nt" else "python")

    def works(self) -> bool:
        return self.python.exists() and run(str(self.python), "-m", "pip", "--version").returncode == 0

    def create(self, interpreter: str = sys.executable) -> None:
        """Make it anew from an interpreter."""
        version = run(interpreter, "-c", "import platform; print(platform.python_version())").stdout.strip()
        with step(f"new environment {self.folder.name} (Python {version})"):
            done = run(interpreter, "-m", "venv", "--clear", str(self.folder))
        if done.returncode:
            print(done.stdout, file=sys.stderr)
            fail(f"{interpreter} cannot create environments; on Debian and Ubuntu install python3-venv.")

    def pip(self, *arguments: str, hint: str = "", **env: str) -> None:
        """Install with pip, telling how far it is."""
        # --no-compile: bytecode of the few modules that get imported is written at their first import
        options = ["install", "--no-compile", "--disable-pip-version-check", "--progress-bar", "off"]
        command = [str(self.python), "-m", "pip", *options, *arguments]
        output: list[str] = []
        with Progress() as progress, start(command, **env) as process:
            assert process.stdout is not None
            for line in process.stdout:
                output.append(line)
                progress.read(line)
        if process.returncode:
            print("".join(output), file=sys.stderr)
            fail(f"pip could not install {' '.join(arguments)}; its output is above. {hint}".rstrip())

    def version_of(self, package: str) -> str | None:
        """Version of an installed package, or None."""
        code = f"from importlib.metadata import version; print(version({package!r}))"
        done = run(str(self.python), "-c", code)
        return None if done.returncode else done.stdout.split()[-1]

    def install_triton(self, torch: str) -> None:
        """The triton that belongs to a version of torch, where the platform has one and torch brought none along."""
        triton = TRITON_FOR_TORCH.get(".".join(torch.split(".")[:2]))
        here = platform.system() == "Linux" and platform.machine() == "x86_64"
        if triton and here and self.version_of("triton") is None:
            with step(f"triton {triton}"):
                self.pip(f"triton=={triton}.*")

    def size(self) -> float:
        """In MB."""
        files = (Path(path, name) for path, _, names in os.walk(self.folder) for name in names)
        return sum(file.lstat().st_size for file in files) / 1e6


def interpreter_for(version: str) -> str | None:
    """Path of an interpreter of a version of Python such as "3.12": this one, from PATH, or of pyenv."""
    if platform.python_version().startswith(version + "."):
        return sys.executable
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    candidates = [shutil.which(f"python{version}"), *map(str, sorted(pyenv.glob(f"{version}.*/bin/python")))]
    for path in candidates:
        # pyenv's shims exist for versions that are not switched on, and then end with an error
        if path and run(path, "-c", "import venv").returncode == 0:
            return path
    return None
