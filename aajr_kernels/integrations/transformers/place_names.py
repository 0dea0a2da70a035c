"""Names of places, and the modules of a model that they stand for."""

from __future__ import annotations

import difflib

from torch import nn

from ...method.places import EMBEDDING, At, entries_of

__all__ = ["layer_lists", "resolved"]


def layer_lists(model: nn.Module) -> dict[str, nn.ModuleList]:
    """The lists of modules that lie in no other one, by name: layers of decoders and encoders."""
    lists = {
        name: part for name, part in model.named_modules() if isinstance(part, nn.ModuleList) and len(part)
    }
    return {
        name: part
        for name, part in lists.items()
        if not any(name.startswith(f"{other}.") for other in lists if other != name)
    }


def resolved(model: nn.Module, at: At) -> dict[str, nn.Module | None]:
    """Modules by their names in `model`, in the order of `at`; None for the embeddings.

    Raises:
        TypeError: `at` is no name, no number and no sequence of these.
        ValueError: it is empty, names nothing or the same place twice.
    """
    places: dict[str, nn.Module | None] = {}
    for entry in entries_of(at):
        for name, module in _modules(model, entry):
            if name in places or (module is not None and any(module is other for other in places.values())):
                raise ValueError(f"at must name every place once, got {name} twice in {at!r}: leave one out.")
            places[name] = module
    return places


def _modules(model: nn.Module, entry: str | int) -> list[tuple[str, nn.Module | None]]:
    """The places that one entry stands for."""
    if isinstance(entry, int):
        name, layers = _layers(model)
        if not -len(layers) <= entry < len(layers):
            raise ValueError(
                f"at must be a layer from {-len(layers)} to {len(layers) - 1}, those of {name}, got {entry}."
            )
        index = entry % len(layers)
        return [(f"{name}.{index}", layers[index])]
    if entry == EMBEDDING:
        return [(EMBEDDING, None)]
    name, module = _named(model, entry)
    if not isinstance(module, nn.ModuleList):
        return [(name, module)]
    if not len(module):
        raise ValueError(f"at must name modules, got {name}, which is an empty list.")
    return [(f"{name}.{index}", layer) for index, layer in enumerate(module)]


def _layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The one list of layers.

    Raises:
        ValueError: there is none, or there are several.
    """
    lists = layer_lists(model)
    if len(lists) != 1:
        got = f"{len(lists)} ({', '.join(lists)})" if lists else "none"
        raise ValueError(
            f"at must name modules in {type(model).__name__}: numbers go with models that have one list of layers, "
            f"this one has {got}."
        )
    return next(iter(lists.items()))


def _named(model: nn.Module, entry: str) -> tuple[str, nn.Module]:
    """The module of this name, or the one whose name ends with it.

    Raises:
        ValueError: there is none, or there are several.
    """
    modules = {name: module for name, module in model.named_modules() if name}
    wanted = entry.removeprefix("base_model.model.")  # names of a model in PEFT's wrapper
    for name in (entry, wanted):
        if name in modules:
            return name, modules[name]
    ends = [name for name in modules if name.endswith(f".{wanted}")]
    if len(ends) == 1:
        return ends[0], modules[ends[0]]
    if ends:
        shown = ", ".join(ends[:3]) + (", ..." if len(ends) > 3 else "")
        raise ValueError(
            f"at must name one module, got {entry!r}, with which {len(ends)} names end: {shown}."
        )
    # ends of names are names too
    known = {name.split(".", cut)[-1]: None for name in modules for cut in range(name.count(".") + 1)}
    near = difflib.get_close_matches(wanted, list(known), 3, 0.0)
    raise ValueError(
        f"at must name a module of {type(model).__name__}, got {entry!r}; the nearest names are {', '.join(near)}."
    )
