"""Nested state as named tensors and JSON, for safetensors, without pickle."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch

__all__ = ["pack", "unpack"]

#: kinds of containers, by the key that marks them
KINDS = {"dict": dict, "counter": Counter, "list": list, "tuple": tuple}


def pack(tree: Any, name: str = "state") -> tuple[dict[str, torch.Tensor], Any]:
    """Separate the tensors of a tree from the rest.

    Args:
        tree: of dicts, lists and tuples, with tensors, numbers, strings, booleans and None as leaves.
        name: of the root, where the names of tensors begin.

    Returns:
        Tensors by name, and JSON (with Python's ``Infinity`` and ``NaN``) that :func:`unpack` takes.

    Raises:
        TypeError: something else is in it.
    """
    tensors: dict[str, torch.Tensor] = {}

    def walk(value: Any, path: str) -> Any:
        if isinstance(value, torch.Tensor):
            tensors[path] = value.detach()
            return {"tensor": path}
        if value is None or type(value) in (bool, int, float, str):
            return value
        for kind, cls in KINDS.items():
            if type(value) is cls or (
                kind == "dict" and type(value).__name__ in ("OrderedDict", "defaultdict")
            ):
                if isinstance(value, dict):
                    return {kind: [[walk(k, path), walk(v, f"{path}/{k}")] for k, v in value.items()]}
                return {kind: [walk(v, f"{path}/{i}") for i, v in enumerate(value)]}
        if hasattr(value, "item") and type(value).__module__ == "numpy":
            return walk(value.item(), path)
        raise TypeError(
            f"{path} holds a {type(value).__name__}, which a checkpoint cannot: tensors, numbers, strings and None in "
            "dicts, lists and tuples can be kept."
        )

    return tensors, walk(tree, name)


def unpack(tensors: dict[str, torch.Tensor], json: Any) -> Any:
    """The tree again."""
    if not isinstance(json, dict):
        return json
    ((kind, value),) = json.items()
    if kind == "tensor":
        return tensors[value]
    if kind in ("dict", "counter"):
        return KINDS[kind]({unpack(tensors, k): unpack(tensors, v) for k, v in value})
    return KINDS[kind](unpack(tensors, v) for v in value)
