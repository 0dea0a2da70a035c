"""Decoder layers as one step of autograd: norms, attention and MLP in a row, from one residual stream to the next.

A layer has a :class:`Form` if it consists of an attention and an MLP, each after a norm and perhaps before one, and the
attention of four linear layers, perhaps with norms of heads and with a rotary embedding. That is read off a twin, and
compared with it (see ``verify``). The layer then runs by its form wherever nothing sees what is inside: no hook,
adapter, cache, dropout or compiler. Norms and MLP run their fused forwards. Large layers run as before: there the host
waits, and a backward in parts gives memory back earlier.
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ...dual import Dual
from ...ops.between import Heads, Joined, Turned
from ...ops.rotary import rotaries
from ...ops.tape import Programs, Untaped, in_one_step, is_undisturbed
from ...torch_private import DROPOUT, unhooked
from .attention import attend
from .library import NAME
from .masks import Visibility
from .projections import of_one_input, one_by_one
from .registry import Calls
from .residual import Residual
from .verify import LowRank, Trial, linear_sizes, undisturbed
from .wrappers import chains

__all__ = ["FUSED", "Form", "by_form", "form_of"]

#: functions that `fuse` put in the place of methods
FUSED: weakref.WeakSet[Any] = weakref.WeakSet()
#: numbers in a stream from which kernels take longer than the host
_LARGE = 2**22
#: arguments of layers that their attention by ``"aajr"`` does not look at
_UNHEEDED = ("position_ids", "use_cache", "cache_position")
_SOFTCAP = "attn_logit_softcapping"
#: types of attributes that tell by themselves whether they are another one than before
_SETTINGS = {type(None), bool, int, float, str, tuple}


@dataclass(frozen=True)
class Form:
    """Names of the parts of a layer, in the order in which they run.

    Attributes:
        norms: before the attention, perhaps after it, before the MLP, perhaps after it.
        projections: queries, keys, values.
        head_norms: of queries and keys, if any.
        turned_late: whether these see heads after positions; the sums of their gradients have that order.
        softcap: attribute of the attention, or "".
        kinds: classes of the layer and of all modules inside, each with the attributes that :meth:`run` reads.
    """

    norms: tuple[str, ...]
    attention: str
    mlp: str
    projections: tuple[str, ...]
    output: str
    head_norms: tuple[str, ...]
    turned_late: bool
    kinds: tuple[tuple[type, tuple[str, ...]], ...]
    rotates: bool = True
    softcap: str = ""

    def run(self, layer: Any, x: Dual, tables: tuple[Tensor, Tensor] | None, mask: Any) -> Dual:
        """The layer on a stream; tables of the rotary embedding have an axis of heads."""
        modules, norms = layer._modules, iter(self.norms)
        stream: Any = Residual(x.stacked)
        for name in (self.attention, self.mlp):
            y = modules[next(norms)].forward(stream)
            if name == self.attention:
                y = self._attention(modules[name], y, tables, mask)
            else:
                y = modules[name].forward(y)
            if len(self.norms) == 4:
                y = modules[next(norms)].forward(y)
            stream = stream + y
        return Dual(stream.stacked)

    def _attention(self, module: Any, x: Dual, tables: tuple[Tensor, Tensor] | None, mask: Any) -> Dual:
        modules, size = module._modules, module.head_dim
        heads = list(_products(x, [modules[name] for name in self.projections]))
        for i, y in enumerate(heads):
            normed = i < len(self.head_norms)
            late = normed and self.turned_late
            y = Dual(Heads.apply(y.stacked, size, not late))
            if normed:
                y = modules[self.head_norms[i]].forward(y)
            heads[i] = Dual(Turned.apply(y.stacked)) if late else y
        if tables is not None and self.rotates:
            heads[:2] = rotaries(heads[:2], *tables, unsqueeze_dim=None)
        softcap = getattr(module, self.softcap) if self.softcap else None
        q, k, v = heads
        y = attend(module, q, k, v, mask, module.scaling, softcap=softcap)
        return _products(Dual(Joined.apply(y.stacked)), [modules[self.output]])[0]


def _products(x: Dual, layers: list[nn.Module]) -> Any:
    return of_one_input(x, layers) or one_by_one(x, layers)


@functools.lru_cache(512)  # keys are of callers' classes
def by_form(body: Callable[..., Any], form: Form) -> Callable[..., Any]:
    """The forward `body` of a layer, by its form where nothing sees the difference."""

    programs: Programs = {}
    kinds = dict(form.kinds)

    @functools.wraps(body)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        known = None if torch.compiler.is_compiling() else _arguments(form, self, args, kwargs)
        if known is not None and (inside := _inside(kinds, self, known[0].stacked)) is not None:
            x, tables, mask = known
            parameters, key = inside
            inputs = [x.stacked, *(tables or ()), *parameters]
            if mask is not None:
                key += mask.causal, mask.window
                inputs += () if mask.mask is None else (mask.mask,)
            with contextlib.suppress(Untaped):
                return Dual(
                    in_one_step(lambda: form.run(self, x, tables, mask).stacked, inputs, programs, tuple(key))
                )
        return body(self, *args, **kwargs)

    return forward


def _arguments(form: Form, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The stream, tables and mask of a call that may run by its form, or None."""
    x = args[0] if len(args) == 1 else None if args else kwargs.get("hidden_states")
    if type(x) is not Dual or type(x.stacked) is not Tensor or x.stacked.numel() > _LARGE:
        return None
    mask, tables = kwargs.get("attention_mask"), kwargs.get("position_embeddings")
    for name, value in kwargs.items():
        if (
            value is None
            or value is False
            or name in _UNHEEDED
            or value is mask
            or value is tables
            or value is x
        ):
            continue
        return None
    if mask is not None and not (
        type(mask) is Visibility and (mask.mask is None or mask.mask.dtype == torch.bool)
    ):
        return None
    if form.rotates:
        if not (isinstance(tables, tuple) and len(tables) == 2 and all(type(t) is Tensor for t in tables)):
            return None
        tables = tables[0].unsqueeze(1), tables[1].unsqueeze(1)
    else:
        tables = None
    attention = layer._modules[form.attention]
    if "forward" not in layer._modules[form.mlp].__dict__:  # not fused: made of other things than ops
        return None
    drops = attention.training and getattr(attention, "attention_dropout", 0.0)
    checkpoints = layer.training and getattr(layer, "gradient_checkpointing", False)
    if drops or checkpoints or attention.config._attn_implementation != NAME:
        return None
    return (x, tables, mask) if is_undisturbed(x.stacked.device.type) else None


def _inside(
    kinds: dict[type, tuple[str, ...]], layer: Any, x: Tensor
) -> tuple[list[Tensor], list[Any]] | None:
    """Every parameter of a layer, and all else in it that a run by its form depends on; None where it may not run."""
    if type(layer) not in kinds or (inside := unhooked(layer)) is None:
        return None
    parameters: list[Tensor] = []
    key = [*layer._modules]
    for part in inside:
        settings, attributes = kinds.get(type(part)), part.__dict__
        if settings is None:
            return None
        key += type(part), *part._modules
        replaced = attributes.get("forward")
        if replaced is not None:
            function = getattr(replaced, "__func__", None)
            if function not in FUSED or replaced.__self__ is not part:
                return None
            key.append(function)
        for name in settings:
            value = attributes.get(name)
            if type(value) not in _SETTINGS:
                return None
            key.append(value)
        for name, p in part._parameters.items():
            if p is not None:
                if type(p) is not nn.Parameter or p.dtype != x.dtype:
                    return None
                key.append(name)
                parameters.append(p)
    return parameters, key


# -- reading ----------------------------------------------------------------------------------------------------------


def form_of(
    module: nn.Module,
    trial: Trial,
    calls: Calls,
    is_norm: Callable[[nn.Module], bool],
    replaced: Callable[[Any], contextlib.AbstractContextManager[Any]],
) -> Form | None:
    """The form of a layer, or None.

    Args:
        module: the layer.
        trial: its own forward on twins.
        calls: how that is called.
        is_norm: whether a module is a norm that is a fused op.
        replaced: context in which the norms of a twin run as in a fused model.
    """
    for part in module.modules():
        if (linear_sizes(part) and type(part) is not nn.Linear) or isinstance(part, DROPOUT):
            return None
    form = _names(module, trial, calls)
    if form is None:
        return None
    attention = getattr(module, form.attention)
    norms = [getattr(module, name) for name in form.norms]
    norms += [getattr(attention, name) for name in form.head_norms]
    if not all(map(is_norm, norms)) or not hasattr(attention, "head_dim"):
        return None
    if not all(map(_is_known, (module, attention, getattr(module, form.mlp), *norms))):
        return None
    caps = ("", _SOFTCAP) if getattr(attention, _SOFTCAP, None) is not None else ("",)
    for rotates, softcap in product((True, False), caps):
        reading = replace(form, rotates=rotates, softcap=softcap)

        def method(twin: Any, x: Any, reading: Form = reading) -> Any:
            if not isinstance(x, Dual):
                return calls.method()(twin, x)
            with replaced(twin):
                return calls.method(functools.partial(_called, reading), NAME)(twin, x)

        if trial.difference(method, "attention") is None:
            return reading
    return None


def _is_known(module: nn.Module) -> bool:
    """Whether torch or transformers wrote all of its forward: code of others may do more than it returns.

    transformers has decorators of the kernels library, too.
    """
    functions = [chain[-1] for chain in chains(type(module).forward) if chain[-1] is not None]
    owners = [getattr(function, "__globals__", {}).get("__name__", "") for function in functions]
    return all(owner.partition(".")[0] in ("torch", "transformers", "kernels") for owner in owners)


def _called(
    form: Form,
    twin: Any,
    x: Dual,
    *,
    attention_mask: Any = None,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    **others: Any,
) -> Dual:
    tables = position_embeddings and (
        position_embeddings[0].unsqueeze(1),
        position_embeddings[1].unsqueeze(1),
    )
    if others or (form.rotates and not tables):
        raise TypeError("the layer is called in another way")
    return form.run(twin, x, tables, attention_mask)


def _names(module: nn.Module, trial: Trial, calls: Calls) -> Form | None:
    """The parts of a twin in the order of their calls; None where they are others, or where it notes something."""
    twin, x, *_ = trial.runs[0]
    order: list[str] = []
    given: dict[str, Any] = {}

    def note(name: str, part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        order.append(name)
        given[name] = next(iter((*args, *kwargs.values())), None)

    before = _attributes(twin)
    hooks = [
        part.register_forward_pre_hook(functools.partial(note, name), with_kwargs=True)
        for name, part in twin.named_modules()
        if part is not twin
    ]
    call = functools.partial(calls.method(None, NAME), twin, x)
    with undisturbed(), _Drops() as drops:
        output = call()
    for hook in hooks:
        hook.remove()
    children = [name for name in order if "." not in name]
    if drops.seen or not isinstance(output, Tensor) or len(children) not in (4, 6):
        return None
    if _attributes(twin) != before or not _trains_alike(twin, twin.get_submodule(children[1]), output, call):
        return None
    attention, mlp = children[1], children[-2 if len(children) == 6 else -1]
    norms = tuple(name for name in children if name not in (attention, mlp))
    inside = [name for name in order if name.startswith(attention + ".")]
    linear = [name for name in inside if type(twin.get_submodule(name)) is LowRank]
    others = [name.split(".")[1] for name in inside if name not in linear]
    if len(linear) != 4 or len(others) not in (0, 2) or any(name.count(".") > 1 for name in inside):
        return None
    if any(given[name] is not given[linear[0]] for name in linear[:3]):
        return None
    late = any(given[f"{attention}.{name}"].is_contiguous() for name in others)
    *projections, last = (name.split(".")[1] for name in linear)
    kinds: dict[type, tuple[str, ...]] = {type(part): () for part in module.modules()}
    for name in (*norms, *(f"{attention}.{name}" for name in others)):
        norm = module.get_submodule(name)
        own = {n for n, value in vars(norm).items() if type(value) in _SETTINGS} - vars(nn.Module()).keys()
        kinds[type(norm)] = tuple(sorted(own))
    kinds[type(module.get_submodule(attention))] = ("head_dim", "scaling", "is_causal", _SOFTCAP)
    return Form(norms, attention, mlp, tuple(projections), last, tuple(others), late, tuple(kinds.items()))


class _Drops(TorchFunctionMode):
    """Whether dropout is called as a function, even one that drops nothing outside of training.

    That of attention's weights is an argument of the implementation.
    """

    seen = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen |= "dropout" in getattr(func, "__name__", "")
        return func(*args, **(kwargs or {}))


def _trains_alike(twin: nn.Module, attention: nn.Module, output: Tensor, call: Callable[[], Any]) -> bool:
    """Whether a twin gives that output in training too, but for dropout of attention's weights."""
    dropped = attention.__dict__.pop("attention_dropout", None)
    try:
        attention.__dict__ |= {} if dropped is None else {"attention_dropout": 0.0}
        twin.train()
        with undisturbed():
            return torch.equal(call(), output)
    finally:
        twin.eval()
        attention.__dict__ |= {} if dropped is None else {"attention_dropout": dropped}


def _attributes(twin: nn.Module) -> list[dict[str, int]]:
    """What is attached to modules, but for the configurations that `Calls` exchanges."""
    return [{n: id(value) for n, value in vars(part).items() if n != "config"} for part in twin.modules()]
