"""Description of the machine, the versions and the commit that a measurement was made with."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import aajr_kernels
from aajr_kernels.backends import cpu as native
from aajr_kernels.cli.info import cpu_model, package_version

#: the checkout
ROOT = Path(__file__).resolve().parent.parent
#: environment variables that decide how fast something runs; those that are set go into every row
SETTINGS = (
    "AAJR_BACKEND",
    "AAJR_CPU_CAPABILITY",
    "ATEN_CPU_CAPABILITY",
    "MKL_DEBUG_CPU_TYPE",
    "MKL_ENABLE_INSTRUCTIONS",
    "MKL_NUM_THREADS",
    "OMP_NUM_THREADS",
    "OMP_PROC_BIND",
    "ONEDNN_MAX_CPU_ISA",
)


def describe(
    sources: Sequence[str] = ("aajr_kernels", "csrc"), environ: Mapping[str, str] = os.environ
) -> dict[str, Any]:
    """Processor, settings, versions and commit, as plain data.

    Args:
        sources: files of the checkout whose changes make the commit ``dirty``, as git's pathspecs.
        environ: environment variables.
    """
    commit, dirty = _commit(sources)
    return {
        "machine": platform.machine(),
        "cpu": cpu_model(),
        "torch_capability": torch.backends.cpu.get_cpu_capability(),
        "native_capability": native_capability(),
        "threads": torch.get_num_threads(),
        "settings": {name: environ[name] for name in SETTINGS if name in environ},
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "transformers": package_version("transformers"),
        "triton": package_version("triton"),
        "device_name": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "aajr_kernels": aajr_kernels.__version__,
        "commit": commit,
        "dirty": dirty,
    }


def native_capability() -> str | None:
    """The instruction set that the native module uses, or None without the module."""
    try:
        return str(native.info()["capability"])
    except ImportError:
        return None


def _commit(sources: Sequence[str]) -> tuple[str | None, bool | None]:
    """Commit of the checkout, and whether its code differs from it."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], check=True, cwd=ROOT, capture_output=True, text=True)
        return done.stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != ROOT:
            return None, None  # an environment inside another repository
        return git("rev-parse", "--short", "HEAD"), bool(git("status", "--porcelain", "--", *sources))
    except (OSError, subprocess.CalledProcessError):
        return None, None
