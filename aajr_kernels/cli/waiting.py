"""Threads that wait without spinning for long, in the `aajr` command.

At the end of a parallel loop an OpenMP thread spins before it sleeps, in GNU's library for milliseconds. On a busy
machine it spins away the processor time that the thread it waits for needs. The library reads its variables when it is
loaded, that is when torch is imported: the first line of the package is the last moment to set them. Only the command
does; a program of the user's own sets them itself (docs/troubleshooting.md).
"""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import MutableMapping, Sequence
from pathlib import Path, PurePath

#: variable -> value. GNU's library, which torch's packages bring, takes the first: about 50 µs, less than two threads
#: take to meet on an idle machine, and more than falling asleep costs. Intel's and LLVM's take the second.
SETTINGS = {"GOMP_SPINCOUNT": "1000", "OMP_WAIT_POLICY": "passive"}
#: packages of a checkout that are commands
PROGRAMS = ("bench", "demo", "experiments")
ROOT = Path(__file__).resolve().parent.parent.parent
#: what a user may have decided; then nothing is changed
DECISIONS = (*SETTINGS, "KMP_BLOCKTIME")


def is_command(arguments: Sequence[str], original: Sequence[str]) -> bool:
    """Whether a process is `aajr`, `python -m aajr_kernels` or a command of the checkout (``python -m bench``).

    Args:
        arguments: its ``sys.argv``, which begins with "-m" while Python looks for the module to run.
        original: its ``sys.orig_argv``.
    """
    name = PurePath(arguments[0]).name if arguments else ""
    if name not in ("-m", "__main__.py"):
        return name in ("aajr", "aajr.exe", "aajr-script.py")
    modules = [
        module
        for option, module in itertools.pairwise(original)
        if option.startswith("-") and option.endswith("m")
    ]
    package = modules[0].split(".")[0] if modules else ""
    return package == "aajr_kernels" or (package in PROGRAMS and (ROOT / package / "__main__.py").exists())


def shorten(environment: MutableMapping[str, str]) -> None:
    """Set the variables, unless the user has set one of them."""
    if not any(name in environment for name in DECISIONS):
        environment.update(SETTINGS)


if is_command(sys.argv, sys.orig_argv):
    shorten(os.environ)
