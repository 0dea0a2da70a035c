"""Launchers as operators of torch, so that torch.compile sees one opaque call with known results.

An eager call goes straight to the launcher. While torch traces, it becomes ``torch.ops.aajr.<name>``, whose fake
implementation is the launcher itself with its launches left out: shapes, dtypes and strides cannot differ from the
real ones. These operators have no derivative: the autograd Functions above them own it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from .. import gpu

_LIBRARY = torch.library.Library("aajr", "FRAGMENT")
#: "aajr::name" of every operator that was registered
names: list[str] = []


def operator(
    schema: str, present: Callable[..., tuple[bool, ...]] | None = None
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator of a launcher.

    Args:
        schema: arguments and results in torch's schema language, all results tensors:
            ``"(Tensor x, float eps) -> (Tensor, Tensor)"``.
        present: from the launcher's arguments, which of its results are tensors and which None. Without it all are.

    Returns:
        A decorator; the decorated function takes positional arguments only.
    """

    def decorate(launcher: Callable[..., Any]) -> Callable[..., Any]:
        name = launcher.__name__

        def implementation(*args: Any) -> Any:
            results = launcher(*args)
            if present is None:
                return results
            return tuple(args[0].new_empty(0) if t is None else t for t in results)

        def fake(*args: Any) -> Any:
            with gpu.dry_run():
                return implementation(*args)

        _LIBRARY.define(name + schema)
        for device in ("CPU", "CUDA"):  # ROCm calls itself CUDA
            _LIBRARY.impl(name, implementation, device)
        torch.library.register_fake(f"aajr::{name}", fake, lib=_LIBRARY)
        names.append(f"aajr::{name}")
        opaque = getattr(torch.ops.aajr, name).default

        @functools.wraps(launcher)
        def call(*args: Any) -> Any:
            if not torch.compiler.is_compiling():
                return launcher(*args)
            results = opaque(*args)
            if present is None:
                return results
            return tuple(t if there else None for t, there in zip(results, present(*args)))

        return call

    return decorate
