"""Hooks that record places and layers of a model, or perturb the one and leave out the other, for one forward."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ...backends.errors import UnsupportedOperation
from ...dual import Dual
from ...method.places import changed, first_of
from ...torch_private import COMPILED_CALL, pytree, saved_tensor_hooks
from .context_segments import segments

__all__ = ["Perturbed", "PlacesRecorded", "Recorder"]


class PlacesRecorded(Exception):
    """Ends a forward after the last place: the next layer would begin."""


class _Hooked:
    """A forward of a model with hooks on its places; what both kinds have in common.

    Args:
        model: that runs.
        modules: of the places, by name; None for the embeddings.
        around: modules that hold a place or a layer, whose compiled calls would not see hooks.
    """

    def __init__(
        self, model: nn.Module, modules: Mapping[str, nn.Module | None], around: Sequence[nn.Module]
    ) -> None:
        self.model, self.around = model, around
        self.modules = {name: module for name, module in modules.items() if module is not None}
        self.calls = dict.fromkeys(self.modules, 0)
        self._is_installed = False
        self._in_segment = 0

    def at_place(self, name: str, output: Any) -> Any:
        raise NotImplementedError

    def forwards(self) -> dict[nn.Module, Callable[..., Any]]:
        """Layers whose forward is another one, from the one they have now."""
        raise NotImplementedError

    def run(self, forward: Callable[[], Any]) -> Any:
        """``forward()`` with the hooks.

        Raises:
            UnsupportedOperation: a place runs twice, or where a backward would not meet its hook again.
        """
        self._grad, self._saved = torch.is_grad_enabled(), saved_tensor_hooks(True)
        # segments are inside what replaces the forward of a layer
        with (
            _uncompiled(self.around),
            segments(self.model, True, self._segment),
            self._installed(),
            _replaced(self.forwards()),
        ):
            return forward()

    @contextlib.contextmanager
    def _segment(self) -> Iterator[None]:
        """Around a layer that is checkpointed, in the forward and when the backward runs it again."""
        self._in_segment += 1
        try:
            with contextlib.nullcontext() if self._is_installed else self._installed():
                yield
        finally:
            self._in_segment -= 1

    @contextlib.contextmanager
    def _installed(self) -> Iterator[None]:
        handles = []
        self._is_installed = True
        self.calls = dict.fromkeys(self.modules, 0)
        try:
            for name, module in self.modules.items():
                handles.append(module.register_forward_hook(functools.partial(self._hook, name)))
            yield
        finally:
            self._is_installed = False
            for handle in handles:
                handle.remove()

    def _hook(self, name: str, module: nn.Module, args: Any, output: Any) -> Any:
        self.calls[name] += 1
        if self.calls[name] > 1:
            raise UnsupportedOperation(
                f"{name} must be called once in a forward to be a place, it is called again: name a module inside or "
                "around it that is called once."
            )
        if not self._in_segment and (
            torch.is_grad_enabled() != self._grad or saved_tensor_hooks(True) != self._saved
        ):
            raise UnsupportedOperation(
                f"{name} must not be inside a checkpoint of the model's own, or where gradients are switched off, to "
                "be a place: its backward would run again without the perturbation; disable that checkpoint, or name "
                "a module outside."
            )
        return self.at_place(name, output)


class Recorder(_Hooked):
    """A clean forward.

    Attributes:
        outputs: of the places, by name, as tensors.
        below: layers that ended before the first place, and what they returned.
    """

    def __init__(
        self,
        model: nn.Module,
        modules: Mapping[str, nn.Module | None],
        layers: Sequence[nn.Module],
        around: Sequence[nn.Module],
    ) -> None:
        super().__init__(model, modules, around)
        self._layers = layers
        self.outputs: dict[str, Any] = {}
        self.below: dict[nn.Module, Any] = {}
        self._twice: set[nn.Module] = set()
        # hooks that wait for the end of a forward: of accelerate
        self._ends_early = not any(hasattr(module, "_hf_hook") for module in model.modules())

    def at_place(self, name: str, output: Any) -> Any:
        self.outputs[name] = _plain(first_of(output, name))
        return output

    def forwards(self) -> dict[nn.Module, Callable[..., Any]]:
        return {layer: functools.partial(self._layer, layer, layer.forward) for layer in self._layers}

    def _layer(self, layer: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self._ends_early and len(self.outputs) == len(self.modules):
            raise PlacesRecorded
        output = forward(*args, **kwargs)
        if not self.outputs and layer not in self.below and layer not in self._twice:
            self.below[layer] = pytree.tree_map(_plain, output, is_leaf=lambda leaf: isinstance(leaf, Dual))
        else:  # a layer that runs again is left out nowhere
            self._twice.add(layer)
            self.below.pop(layer, None)
        return output


class Perturbed(_Hooked):
    """A forward with something added at the places, and without the layers below them.

    Args:
        model, modules, around: as for all.
        added: to the output of the place of this name.
        skipped: layers, and what they return.
    """

    def __init__(
        self,
        model: nn.Module,
        modules: Mapping[str, nn.Module | None],
        around: Sequence[nn.Module],
        added: Mapping[str, Any],
        skipped: Mapping[nn.Module, Any],
    ) -> None:
        super().__init__(model, modules, around)
        self.added, self.skipped = added, skipped

    def at_place(self, name: str, output: Any) -> Any:
        value = self.added[name]
        return changed(output, lambda y: y + value.to(y.dtype), name)

    def forwards(self) -> dict[nn.Module, Callable[..., Any]]:
        return {layer: functools.partial(_returns, output) for layer, output in self.skipped.items()}

    def run(self, forward: Callable[[], Any]) -> Any:
        result = super().run(forward)
        for name, count in self.calls.items():
            if not count:
                raise UnsupportedOperation(
                    f"{name} must be called in every forward to be a place, one did not call it: name a module that is."
                )
        return result


def _returns(output: Any, *args: Any, **kwargs: Any) -> Any:
    return output


@contextlib.contextmanager
def _uncompiled(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Inside, calls of these modules do not run what ``module.compile()`` made, which sees no hook that came later."""
    compiled = [(m, call) for m in modules if (call := m.__dict__.pop(COMPILED_CALL, None)) is not None]
    try:
        yield
    finally:
        for m, call in compiled:
            m.__dict__[COMPILED_CALL] = call


def _plain(value: Any) -> Any:
    return value.primal if isinstance(value, Dual) else value


@contextlib.contextmanager
def _replaced(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Inside, these modules have these forwards."""
    own: dict[nn.Module, Any] = {module: module.__dict__.get("forward") for module in forwards}
    try:
        for module, forward in forwards.items():
            module.__dict__["forward"] = forward
        yield
    finally:
        for module, before in own.items():
            if before is None:
                module.__dict__.pop("forward", None)
            else:
                module.__dict__["forward"] = before
