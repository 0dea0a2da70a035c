"""Results of first-use checks on disk: a file of JSON lines per device and versions, shared by all processes.

The folder is ``aajr_kernels/selfcheck`` below XDG_CACHE_HOME, by default ``~/.cache``. Lines are only appended, each in
one write; of several with one key the last counts, and what cannot be read is left out. Where the folder cannot be
written, every process checks anew.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import platform
import re
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from . import cuda

_PACKAGE = Path(__file__).parent.parent


def folder() -> Path:
    """Where the files are, whether or not it exists."""
    return (
        Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
        / "aajr_kernels"
        / "selfcheck"
    )


@functools.cache
def _versions() -> str:
    """Of everything that decides on the machine code of a kernel, as a short digest; sources by their contents."""
    digest = hashlib.sha256(f"{torch.__version__} {torch.version.cuda} {torch.version.hip}".encode())
    with contextlib.suppress(metadata.PackageNotFoundError):
        digest.update(metadata.version("triton").encode())
    for path in sorted([*(_PACKAGE / "ops").rglob("*.py"), *(_PACKAGE / "backends").rglob("*.py")]):
        digest.update(path.read_bytes())
    with contextlib.suppress(ImportError, ValueError, OSError):
        built = Path(cuda.module().__file__ or "").stat()
        digest.update(f"{built.st_size} {built.st_mtime_ns}".encode())
    return digest.hexdigest()[:16]


class Record:
    """The results of one device.

    Args:
        device: its name.
        file: with the results, which need not exist.
    """

    def __init__(self, device: str, file: Path) -> None:
        self.device, self.file = device, file
        self._process = [platform.node(), os.getpid()]
        self._lines: dict[str, dict[str, Any]] = {}
        with contextlib.suppress(OSError):
            for line in file.read_bytes().split(b"\n"):
                with contextlib.suppress(ValueError, TypeError, KeyError):
                    entry = json.loads(line)
                    self._lines[str(entry["key"])] = {"state": str(entry["state"]), **entry}

    def outcome(self, key: str) -> str | None:
        """Empty where the check passed, else the reason of its failure; None where it has to be made."""
        entry = self._lines.get(key, {})
        if entry.get("state") == "passed":
            return ""
        if entry.get("state") == "failed":
            return str(entry.get("reason"))
        if entry.get("state") == "started" and self._died(entry.get("process")):
            return f"a process ended while it was checked (delete {self.file} to check again)"
        return None

    def _died(self, process: Any) -> bool:
        """Whether it ran here and does no more; of other machines nothing is known."""
        try:
            node, pid = process
            if node != platform.node():
                return False
            os.kill(int(pid), 0)
        except ProcessLookupError:
            return True
        except (TypeError, ValueError, OSError):
            return False
        return False

    def begin(self, key: str) -> None:
        """Note that a check begins."""
        self._append({"key": key, "state": "started", "process": self._process})

    def end(self, key: str, reason: str | None, seconds: float = 0.0) -> None:
        """Note its result: empty passed, None not made, else the reason of the failure."""
        state = "open" if reason is None else "failed" if reason else "passed"
        self._append({"key": key, "state": state, "reason": reason or None, "seconds": round(seconds, 3)})

    def _append(self, entry: dict[str, Any]) -> None:
        self._lines[entry["key"]] = entry
        with contextlib.suppress(OSError):
            self.file.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            try:
                os.write(descriptor, f"\n{json.dumps(entry)}\n".encode())
            finally:
                os.close(descriptor)

    def rows(self) -> list[dict[str, Any]]:
        """Every check: ``key``, ``state`` (passed, failed, started, open), ``reason`` and ``seconds``."""
        return list(self._lines.values())


@functools.cache
def _record(device: str, file: Path) -> Record:
    return Record(device, file)


def record_of(device: torch.device) -> Record:
    """The results of the kernels on a device."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "Triton's interpreter"
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    return _record(name, folder() / f"{slug}-{_versions()}.jsonl")
