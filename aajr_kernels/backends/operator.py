"""Launchers as operators of torch, so that torch.compile sees one opaque call with known results.

An eager call goes straight to the launcher. While torch traces, it becomes ``torch.ops.aajr.<name>``, whose fake
implementation is the launcher itself with its launches left out: shapes, dtypes and strides cannot differ from the
real ones. These operators have no derivative: the autograd Functions above them own it.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch

from ..torch_private import mark_constant as constant

__all__ = ["Operators", "constant"]

_LIBRARY = torch.library.Library("aajr", "FRAGMENT")


class Operators:
    """Decorator of the launchers of one backend.

    Args:
        prefix: of the operators' names, before that of the launcher.
        devices: dispatch keys of the tensors that the launchers take.
        dry_run: context in which launchers allocate their results and launch nothing; tensors have no memory there.

    Attributes:
        names: ``"aajr::name"`` of every operator that was registered.
    """

    def __init__(
        self,
        prefix: str,
        devices: tuple[str, ...],
        dry_run: Callable[[], contextlib.AbstractContextManager[Any]],
    ) -> None:
        self.prefix, self.devices, self.dry_run = prefix, devices, dry_run
        self.names: list[str] = []

    def __call__(
        self, schema: str, present: Callable[..., tuple[bool, ...]] | None = None
    ) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """The decorator.

        Args:
            schema: arguments and results in torch's schema language, all results tensors:
                ``"(Tensor x, float eps) -> (Tensor, Tensor)"``.
            present: from the launcher's arguments, which of its results are tensors and which None. Without it all
                are.

        Returns:
            A decorator; the decorated function takes positional arguments only.
        """

        def decorate(launcher: Callable[..., Any]) -> Callable[..., Any]:
            name = self.prefix + launcher.__name__.lstrip("_" if self.prefix else "")

            def implementation(*args: Any) -> Any:
                results = launcher(*args)
                if present is None:
                    return results
                return tuple(args[0].new_empty(0) if t is None else t for t in results)

            def fake(*args: Any) -> Any:
                with self.dry_run():
                    return implementation(*args)

            _LIBRARY.define(name + schema)
            for device in self.devices:
                _LIBRARY.impl(name, implementation, device)
            torch.library.register_fake(f"aajr::{name}", fake, lib=_LIBRARY)
            self.names.append(f"aajr::{name}")
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
