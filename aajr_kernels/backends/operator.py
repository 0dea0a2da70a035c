"""Launchers as operators of torch, so that torch.compile sees one opaque call with known results.

An op writes its schemas once, in ``ops/<op>/operators.py``; the launchers of its backends register against them. An
eager call goes straight to the launcher. While torch traces, it becomes ``torch.ops.aajr.<backend>_<name>``. The fake
implementation of all of them is the launcher itself with its launches left out: shapes, dtypes and strides cannot
differ from the real ones. These operators have no derivative: the autograd Functions above them own it.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Callable
from typing import Any

import torch

from ..torch_private import has_dispatch_modes
from ..torch_private import mark_constant as constant

__all__ = ["Operator", "Registry", "constant"]

_LIBRARY = torch.library.Library("aajr", "FRAGMENT")


class Operator:
    """The schema of a launcher, the same on every backend.

    Args:
        schema: name, arguments and results in torch's schema language, all results tensors:
            ``"norm_fwd(Tensor x, float eps) -> (Tensor, Tensor)"``.
        present: for every result, the argument that decides whether it is a tensor (True or a tensor) or None. Without
            it all are tensors.
    """

    def __init__(self, schema: str, present: tuple[str, ...] | None = None) -> None:
        self.name, self.schema = schema[: schema.index("(")], schema
        names = re.findall(r"(\w+)(?:=\w+)?[,)]", schema[: schema.index("->")])
        self.deciding = None if present is None else tuple(names.index(name) for name in present)

    def masked(self, results: Any, args: tuple[Any, ...]) -> Any:
        """The results of a call with `args`, with None in place of those that are no tensors."""
        if self.deciding is None:
            return results
        deciding = (args[index] for index in self.deciding)
        return tuple(None if d is None or d is False else t for t, d in zip(results, deciding))


class Registry:
    """Decorator of the launchers of one backend: ``@registry(operators.NORM_FWD)``.

    Args:
        backend: its name, with which the names of its operators begin.
        devices: dispatch keys of the tensors that the launchers take.
        dry_run: context in which launchers allocate their results and launch nothing; tensors have no memory there.
        eager: decorator of the launchers where they are called straight.

    Attributes:
        names: ``"aajr::name"`` of every operator that was registered.
    """

    def __init__(
        self,
        backend: str,
        devices: tuple[str, ...],
        dry_run: Callable[[], contextlib.AbstractContextManager[Any]],
        eager: Callable[[Callable[..., Any]], Callable[..., Any]] = lambda launcher: launcher,
    ) -> None:
        self.backend, self.devices, self.dry_run, self.eager = backend, devices, dry_run, eager
        self.names: list[str] = []

    def __call__(self, op: Operator) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """A decorator; the decorated launcher takes positional arguments only."""

        def decorate(launcher: Callable[..., Any]) -> Callable[..., Any]:
            name, eager = f"{self.backend}_{op.name}", self.eager(launcher)

            def implementation(*args: Any) -> Any:
                results = eager(*args)
                if op.deciding is None:
                    return results
                return tuple(args[0].new_empty(0) if t is None else t for t in results)

            def fake(*args: Any) -> Any:
                with self.dry_run():
                    return implementation(*args)

            _LIBRARY.define(f"{self.backend}_{op.schema}")
            for device in self.devices:
                _LIBRARY.impl(name, implementation, device)
            torch.library.register_fake(f"aajr::{name}", fake, lib=_LIBRARY)
            self.names.append(f"aajr::{name}")
            opaque = getattr(torch.ops.aajr, name).default

            @functools.wraps(launcher)
            def call(*args: Any) -> Any:
                if not torch.compiler.is_compiling() and not has_dispatch_modes():
                    return eager(*args)
                return op.masked(opaque(*args), args)

            return call

        return decorate
