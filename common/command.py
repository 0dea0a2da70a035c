"""The commands of a checkout: `python -m bench`, `python -m demo`, `python -m experiments`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from aajr_kernels.cli import main
from aajr_kernels.cli.main import application, fail

__all__ = ["application", "fail", "run"]


def run(function: Callable[..., Any], module: str, extra: str) -> None:
    """Run the command of ``python -m MODULE``; `extra` of pyproject.toml brings the packages that it needs."""
    main.run(application(function), f"python -m {module}", extra)
