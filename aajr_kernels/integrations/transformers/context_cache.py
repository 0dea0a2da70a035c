"""Keys and values of a context in transformers' own caches, with their graph.

The context's forward fills a cache as generation does. The suffix gets copies of it, whose update returns the
context's keys and values before the suffix's own and stores nothing: a cache serves any number of forwards, and a layer
that a checkpoint runs again gets what it got before.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...backends.errors import UnsupportedOperation
from ...dual import Dual
from .context_keys import joined
from .library import cache_classes

__all__ = ["ContextCache", "ContextIsFilled"]


class ContextIsFilled(Exception):
    """Ends a context's forward: the last layer has formed its keys and values."""


class ContextCache:
    """Keys and values that the layers of a decoder keep of its context.

    Args:
        config: of the model; its text part says which layers have a window.
        stops: the context's forward ends with :class:`ContextIsFilled` at the last layer's keys and values.

    Attributes:
        recorder: the cache that the context's forward is given. Checkpoints refer to it from the graph of the keys and
            values, so that it holds none of them once :meth:`settle` has taken them out.

    Raises:
        UnsupportedOperation: a layer keeps something else than keys and values.
    """

    def __init__(self, config: Any, stops: bool) -> None:
        dynamic, self._layer_classes = cache_classes()
        self.recorder: Any = dynamic(config=config)
        self._check(config)
        decoder = config.get_text_config(decoder=True)
        last = (len(self.recorder.layers) or decoder.num_hidden_layers) - 1
        self.recorder.last_layer = last if stops else None
        self.recorder.__class__ = _updated_by(dynamic, _recorded)
        self._layers: list[Any] = []

    def _check(self, config: Any) -> None:
        for layer in self.recorder.layers:
            if type(layer) not in self._layer_classes:
                raise UnsupportedOperation(
                    f"model {config.model_type!r} keeps a {type(layer).__name__} for its context, which is more than "
                    "keys and values: give its whole sequence without shared_context()."
                )

    def settle(self, config: Any) -> None:
        """Take the keys and values out of the cache that the context's forward has filled.

        Raises:
            UnsupportedOperation: it left a layer empty, or a layer keeps something else.
        """
        self._check(config)
        if not self.recorder.layers or not all(layer.is_initialized for layer in self.recorder.layers):
            raise UnsupportedOperation(
                f"model {config.model_type!r} put no keys and values of its context into the cache it was given: give "
                "its whole sequence without shared_context()."
            )
        for layer in self.recorder.layers:
            kept = copy.copy(layer)
            kind: Any = type(layer)
            kept.__class__ = _updated_by(kind, _appended)
            for name in ("keys", "values"):
                tensor = getattr(layer, name)
                setattr(kept, name, tensor.primal if isinstance(tensor, Dual) else tensor)
                setattr(layer, name, torch.empty(0))
            self._layers.append(kept)

    def tensors(self) -> list[Tensor]:
        """Keys and values of all layers, ``[B, HK, <= start, D]``."""
        return [tensor for layer in self._layers for tensor in (layer.keys, layer.values)]

    def for_suffix(self, repeats: int, detached: bool) -> Any:
        """A cache for one forward of the suffix, of `repeats` times as many rows."""
        cache = copy.copy(self.recorder)
        cache.__class__ = type(self.recorder).__base__
        cache.layers = [copy.copy(layer) for layer in self._layers]
        for layer in cache.layers:
            for name in ("keys", "values"):
                tensor = getattr(layer, name)
                tensor = tensor.detach() if detached else tensor
                setattr(layer, name, tensor.repeat(repeats, 1, 1, 1) if repeats > 1 else tensor)
        return cache


@functools.lru_cache(512)  # keys are of callers' classes
def _updated_by(kind: Any, update: Callable[..., Any]) -> Any:
    """`kind` with another update. In an attribute of its instances it would hold them, and they their keys."""
    return type(kind.__name__, (kind,), {"update": update})


def _recorded(cache: Any, key: Any, value: Any, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
    """The update of a cache that is empty, whose layers may run a second time for a checkpoint."""
    if layer_idx < len(cache.layers) and cache.layers[layer_idx].is_initialized:
        return key, value
    own: Any = type(cache).__base__
    result = own.update(cache, key, value, layer_idx, *args, **kwargs)
    if layer_idx == cache.last_layer:
        raise ContextIsFilled
    return result


def _appended(layer: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
    """The update of a layer that stores nothing."""
    return joined(layer.keys, key), joined(layer.values, value)
