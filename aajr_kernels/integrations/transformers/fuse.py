"""Fuse one model instance: its norms, gated MLPs, rotary embedding and attention run on the fused operations."""

from __future__ import annotations

import copy
import functools
import re
import types
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ...rules.registry import install_guards
from .decoder import FUSED
from .forms import Replacement, find, is_torchs
from .kinds import kind_of, line_for
from .layers import residual_sums
from .library import NAME, pretrained_model_class, register
from .projections import sharing
from .recomputed import as_it_is, recomputed
from .registry import asking
from .verify import FLOATS, signature
from .wrappers import around

__all__ = ["KNOWN", "Fusion", "fuse"]

#: ``config.model_type`` of the models whose layers were checked against the unfused model, value and gradient
KNOWN = tuple(
    """
bert gemma gemma2 gemma3_text gpt2 gpt_neox llama mistral mixtral modernbert phi3 qwen2 qwen3 qwen3_moe smollm3 t5 vit
""".split()
)

_MARK = "_aajr_fusion"


@dataclass(eq=False)
class Fusion:
    """A model's fused parts, listed, and the way back; as a context manager it undoes the fusion on exit.

    Attributes:
        replaced: module name -> what runs on a fused op.
        left: module name -> why it was left as it is. A model with everything fused has none.
        kept: module name -> why nothing there had to be replaced. Every attention, rotary embedding, norm and MLP of
            the model is in one of the three.
        active: False after :meth:`undo`.
    """

    model_name: str
    replaced: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)
    active: bool = True
    _methods: list[tuple[nn.Module, str, Any]] = field(default_factory=list)
    _configs: list[tuple[Any, Any, list[Any]]] = field(default_factory=list)
    _models: list[nn.Module] = field(default_factory=list)

    def undo(self) -> None:
        """Put everything back; a second call does nothing. The implementation stays in transformers' registry.

        Raises:
            RuntimeError: another library replaced a fused method in the meantime.
        """
        if not self.active:
            return
        for module, attribute, method in self._methods:
            if module.__dict__.get(attribute) is not method:
                raise RuntimeError(
                    f"{attribute} of a {type(module).__name__} was replaced after fuse(): undo that replacement first."
                )
        for module, attribute, _ in self._methods:
            delattr(module, attribute)
        for original, own, holders in self._configs:
            # later changes of the model's configuration stay
            later = {k: v for k, v in own.__dict__.items() if not k.startswith("_attn_implementation")}
            original.__dict__.update(later)
            for holder in holders:
                holder.__dict__["config"] = original
        for model in self._models:
            del model.__dict__[_MARK]
        self.active = False

    def __enter__(self) -> Fusion:
        return self

    def __exit__(self, *exc: object) -> None:
        self.undo()

    def rows(self) -> list[tuple[str, int, str]]:
        """(what, how many, module names with layer numbers written as ``*``), in the order of the model."""
        return [(what, n, name) for (what, name), n in _grouped(self.replaced).items()]

    def __repr__(self) -> str:
        lines = [f"Fusion of {self.model_name}" + ("" if self.active else " (undone)")]
        width = max((len(what) for what, _, _ in self.rows()), default=0)
        lines += [f"  {what:{width}}  {n:4d} x {name}" for what, n, name in self.rows()]
        for title, listing in (("left", self.left), ("kept", self.kept)):
            lines += [f"  {title}  {n:4d} x {name}: {why}" for (why, name), n in _grouped(listing).items()]
        return "\n".join(lines)


def _grouped(listing: dict[str, str]) -> Counter[tuple[str, str]]:
    return Counter((what, re.sub(r"(?<![^.])\d+(?![^.])", "*", name)) for name, what in listing.items())


def fuse(model: nn.Module, *, recompute: bool = False) -> Fusion:
    """Run the norms, gated MLPs, rotary embeddings and attention of this model instance on the fused operations.

    Layers add to their residual stream inside the norms that take it, forward and backward; projections of one input,
    such as queries, keys and values, add their gradients to one buffer. Under autocast and ``torch.compile``, where a
    projection has a hook or an adapter, and for residual streams where any module of a layer has a hook or transformers
    checkpoints the layer, these run as before. A decoder layer of attention and gated MLP is one step of autograd where
    nothing sees what is inside (:mod:`.decoder`), which takes less time of the host.

    Nothing else is touched: no other instance, no module of transformers, no parameter, no key of the state dict. A
    wrapped model (PEFT) is fine, before or after. Decorators of the replaced methods stay around the replacements.

    Layers are found by their structure, and each replacement is compared with what the module does before it is made:
    values and a directional derivative on random tokens, once per class and configuration, on a small twin of the
    module. One that differs is not made. Every attention, rotary embedding, norm and MLP is listed, as replaced, as
    left with the reason, or as kept: a ``torch.nn.LayerNorm`` runs on the fused op through the rule of its torch
    function. So do linear layers and plain activations, which are not listed. Plain tensors give the values they gave
    before, within rounding (the decomposed norms round to float32 also in a float64 model, the fused do not).

    The fused methods live on the instance and follow ``copy.deepcopy``; undo the fusion before pickling the whole
    module (``state_dict`` needs no such care).

    Args:
        model: a transformers model of a known type, or a module that wraps one.
        recompute: the norms, activations and gated products of this model run inside
            :class:`aajr_kernels.recompute`, wherever they are called from: their results are computed again in the
            backward instead of being kept. Goes with ``gradient_checkpointing_enable``.

    Returns:
        Fusion: lists what was replaced; ``undo()`` puts it back; usable as a context manager.

    Raises:
        ImportError: transformers is not installed.
        TypeError: there is no transformers model in `model`.
        ValueError: its type is not known.
        RuntimeError: it is fused already.
    """
    models = _outermost(model, pretrained_model_class())
    _check(model, models)
    register()
    install_guards()  # outside the trials, which would silence and undo what these say
    for held in (around, sharing):  # copies of the model files' globals, which may have changed since
        held.cache_clear()
    fusion = Fusion(type(model).__name__)
    fusion._models = [
        module for part in models for module in part.modules() if isinstance(module, pretrained_model_class())
    ]
    names = {module: name for name, module in model.named_modules()}
    plan: list[tuple[nn.Module, Replacement]] = []
    bypassed: set[nn.Module] = set()
    switched: list[nn.Module] = []
    for part in models:
        once, sums = _Once(part), functools.partial(residual_sums, recompute=recompute)
        attentions = {module: once(asking, module) for module in part.modules()}
        opaque = _opaque(part, attentions)
        switched += [] if opaque else [part]
        for module in part.modules():  # parents before their children
            pieces = [] if module in bypassed else attentions[module] or [once(find, module)]
            if recompute and module not in bypassed:
                pieces = [as_it_is(module) if piece is None else recomputed(piece) for piece in pieces]
            if module not in bypassed:
                pieces = [*pieces, once(sums, module)]
            what, why = [], []
            for piece in filter(None, pieces):
                if piece.reason:
                    why.append(piece.reason)
                elif piece.what == "attention" and opaque:
                    why.append(f"attention: its masks go to {opaque}")
                elif any(held is module and other.attribute == piece.attribute for held, other in plan):
                    why.append(f"{piece.what}: its {piece.attribute} is replaced already")
                elif piece.attribute in module.__dict__ and piece.function is not None:
                    why.append(f"its {piece.attribute} was replaced on the instance by something else")
                else:
                    what.append(piece.what)
                    bypassed.update(getattr(module, attribute) for attribute in piece.inside)
                    plan += [] if piece.function is None else [(module, piece)]
            if what:
                fusion.replaced[names[module]] = " + ".join(what)
            if why:
                fusion.left[names[module]] = "; ".join(why)
    _list_the_rest(fusion, names, {module for part in models for module in part.modules()})
    for module, piece in plan:
        method = types.MethodType(piece.function, module)  # type: ignore[arg-type]
        module.__dict__[piece.attribute] = method
        FUSED.add(piece.function)
        fusion._methods.append((module, piece.attribute, method))
    aside = {module for part in models if part not in switched for module in part.modules()}
    holders = [module for module in names if module not in aside]
    fusion._configs = [_own_config(config, holders) for config in _configs(switched)]
    for module in fusion._models:
        module.__dict__[_MARK] = fusion
    return fusion


class _Once:
    """Calls a finder once for every class and configuration among the modules of a model."""

    def __init__(self, model: nn.Module) -> None:
        self._results: dict[Any, Any] = {}
        self._dtype = self._dtype_of(model, torch.get_default_dtype())

    @staticmethod
    def _dtype_of(module: nn.Module, default: torch.dtype) -> torch.dtype:
        return next((p.dtype for p in module.parameters() if p.dtype in FLOATS), default)

    def __call__(self, finder: Callable[[nn.Module, torch.dtype], Any], module: nn.Module) -> Any:
        # that of an attention names its cache; `asking` makes sure that it does no more
        key = finder, signature(module, () if finder is find else ("layer_idx",))
        if key not in self._results:
            self._results[key] = finder(module, self._dtype_of(module, self._dtype))
        return self._results[key]


def _opaque(model: nn.Module, attentions: dict[nn.Module, list[Replacement]]) -> str:
    """An attention that keeps the model from switching, since its masks are those of all others, and why; or ""."""
    for name, module in model.named_modules():
        if any(piece.what == "attention" and piece.reason for piece in attentions[module]):
            return f"{name}, too, which is left"
        asks = is_torchs(module) or any(attentions[part] for part in module.modules())
        if kind_of(module) == "attention" and not asks:
            return f"{name}, too, which does not ask the registry"
    return ""


def _list_the_rest(fusion: Fusion, names: dict[nn.Module, str], within: set[nn.Module]) -> None:
    """A line for every attention, rotary embedding, norm and MLP that has none yet."""
    for module, name in names.items():
        kind = None if isinstance(module, pretrained_model_class()) else kind_of(module)
        if kind is None or name in fusion.replaced or name in fusion.left:
            continue
        needless, why = line_for(module, kind)
        if not needless and module not in within:
            why = f"{kind}: {type(module).__name__} is no part of a transformers model"
        (fusion.kept if needless else fusion.left)[name] = why


def _outermost(model: nn.Module, cls: type) -> list[nn.Module]:
    """The transformers models in `model` that are not part of another one."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}.")
    if isinstance(model, cls):
        return [model]
    return [part for child in model.children() for part in _outermost(child, cls)]


def _check(model: nn.Module, models: list[nn.Module]) -> None:
    if not models:
        raise TypeError(
            f"model must be or contain a transformers model, got {type(model).__name__}: other models run on the rules "
            "as they are, or are built from aajr_kernels.nn."
        )
    for part in models:
        kind = part.__dict__["config"].model_type
        if kind not in KNOWN:
            raise ValueError(
                f"model has the type {kind!r}, which fuse() does not know (known: {', '.join(KNOWN)}): leave it "
                "unfused, it runs on the rules as it is."
            )
        if any(_MARK in module.__dict__ for module in part.modules()):
            raise RuntimeError(
                f"{type(part).__name__} is fused already: call undo() of the handle that fuse() returned."
            )


def _configs(models: list[nn.Module]) -> list[Any]:
    """Every configuration that names an attention implementation, once."""
    configs = [module.__dict__.get("config") for part in models for module in part.modules()]
    return list({id(c): c for c in configs if hasattr(c, "_attn_implementation")}.values())


def _own_config(config: Any, modules: list[nn.Module]) -> tuple[Any, Any, list[Any]]:
    """Give these modules of this instance a configuration of their own: two instances may share one."""
    own = copy.copy(config)
    own._attn_implementation = NAME
    holders = [module for module in modules if module.__dict__.get("config") is config]
    for holder in holders:
        holder.__dict__["config"] = own
    return config, own, holders
