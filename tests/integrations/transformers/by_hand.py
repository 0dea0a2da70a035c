"""Attacks inside a model written out: hooks of PyTorch, and every layer in every call."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["ByHand", "hooked"]


@contextlib.contextmanager
def hooked(modules: list[nn.Module], change: Any) -> Iterator[None]:
    """Hooks written out: ``change(place, tensor)`` of what the modules return."""

    def hook(place: int, module: nn.Module, args: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (change(place, output[0]), *output[1:])
        return change(place, output)

    handles = [m.register_forward_hook(functools.partial(hook, i)) for i, m in enumerate(modules)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class ByHand:
    """The plain model as a function of δ, every layer run in every call."""

    def __init__(
        self, model: nn.Module, names: tuple[str, ...], x: Tensor, tokens: Tensor | None, **inputs: Any
    ) -> None:
        self.model, self.x, self.inputs = model, x, inputs
        self.names = names
        self.modules = [model.get_submodule(name) for name in names if name != "embedding"]
        clean: list[Tensor] = [x] if "embedding" in names else []

        def keep(_: int, y: Tensor) -> Tensor:
            clean.append(y)
            return y

        with hooked(self.modules, keep):
            model(inputs_embeds=x, **inputs)
        weights = torch.ones(x.shape[:2]).to(x) if tokens is None else tokens.to(x)
        self.widths = [y.shape[-1] for y in clean]
        self.units = [((y**2).sum(-1) * weights).sum().div(weights.sum()).sqrt() for y in clean]

    def __call__(self, delta: Tensor) -> Tensor:
        parts = delta.split(self.x.shape[1], dim=1)
        added = [u * part[..., :width] for u, part, width in zip(self.units, parts, self.widths)]
        x, first = self.x, 0
        if self.names[0] == "embedding":
            x, first = x + added[0], 1
        with hooked(self.modules, lambda place, y: y + added[first + place]):
            return self.model(inputs_embeds=x, **self.inputs).logits
