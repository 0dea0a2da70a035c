"""Arguments and models that can be split into a context and a suffix, and the numerical check of a split."""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ...backends.errors import UnsupportedOperation
from ...coverage import paused
from ...dual import dual, is_dual
from ...method.attack_state import RandomState, frozen_parameters
from ...method.checks import check_integers, first_included, included, kind_of

__all__ = [
    "cache_argument",
    "check_embeddings",
    "check_inputs",
    "check_rotary",
    "check_split",
    "plain_model",
    "start_of",
]

#: the cache's name among the arguments of a model, newest first
CACHES = ("cache", "past_key_values")
#: tokens and rows of the comparison; relative differences that rounding makes, many norms being in float32
_TOKENS, _ROWS, _WIDE, _LOW = 8, 2, 1e-3, 0.1
#: model -> the ways of attention with which its split was compared
_compared: weakref.WeakKeyDictionary[nn.Module, set[Any]] = weakref.WeakKeyDictionary()


def check_embeddings(x: Any) -> None:
    """Raise unless `x` is a plain tensor ``[B, S, C]``."""
    if is_dual(x) or not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(f"x must be a plain tensor of embeddings [B, S, C], got {kind_of(x)}.")
    if x.dim() != 3 or x.numel() == 0:
        raise ValueError(f"x must be embeddings [B, S, C] and not empty, got shape {tuple(x.shape)}.")


def check_inputs(x: Tensor, attention_mask: Any, position_ids: Any, inputs: dict[str, Any]) -> None:
    """Raise where an input of the model cannot be split at a token."""
    for name in inputs:
        if name in CACHES:
            raise ValueError(
                f"{name} must not be given, the context makes its own cache: give the whole sequence in x."
            )
        raise TypeError(
            f"shared_context() has no argument {name}: the model gets embeddings, attention_mask and position_ids."
        )
    rows, length = x.shape[:2]
    if attention_mask is not None:
        if not isinstance(attention_mask, Tensor) or tuple(attention_mask.shape) != (rows, length):
            got = (
                tuple(attention_mask.shape) if isinstance(attention_mask, Tensor) else kind_of(attention_mask)
            )
            raise ValueError(
                f"attention_mask must be the padding [{rows}, {length}], got {got}: masks of queries and keys may let "
                "the context see the suffix."
            )
        if attention_mask.is_floating_point():
            raise TypeError(
                f"attention_mask must be bool or integer (nonzero = a token), got {attention_mask.dtype}."
            )
    if position_ids is None:
        return
    if not isinstance(position_ids, Tensor) or tuple(position_ids.shape) not in {(rows, length), (1, length)}:
        got = tuple(position_ids.shape) if isinstance(position_ids, Tensor) else kind_of(position_ids)
        raise ValueError(f"position_ids must be [{rows}, {length}] or [1, {length}], got {got}.")
    if attention_mask is None and bool((position_ids.diff(dim=-1) != 1).any()):
        raise ValueError(
            "position_ids must rise by 1 without an attention_mask, got packed sequences, which share no context: give "
            "one sequence per row."
        )


def start_of(x: Tensor, mask: Any, start: int | None) -> int:
    """The number of tokens before the first that may be attacked in any row, or `start`.

    Raises:
        TypeError, ValueError: neither or a wrong one is given, no token may be attacked, or `start` is past one.
    """
    rows, length = x.shape[:2]
    first = length
    if mask is not None:
        first = first_included(included(mask, (rows, length), "mask"))
        if first == length:
            raise ValueError("mask must leave at least one token to attack, got none in the whole batch.")
    elif start is None:
        raise TypeError(
            "shared_context() needs mask=, the attackable tokens, or start=, the length of the context."
        )
    if start is None:
        return first
    check_integers(0, start=start)
    if start >= length:
        raise ValueError(
            f"start must be below the {length} tokens of x, got {start}: the suffix would be empty."
        )
    if start > first:
        raise ValueError(
            f"mask lets token {first} be attacked, inside the context of start={start} tokens: leave start out, or "
            "mask that token."
        )
    return start


def check_rotary(model: nn.Module, length: int, start: int, position_ids: Tensor | None) -> None:
    """Raise where the model's rotary frequencies depend on the length of what it is given, and would change.

    Raises:
        ValueError: those of the whole sequence are not those of its context.
    """
    inner: Any = plain_model(model)
    config = inner.config.get_text_config(decoder=True)
    parameters = getattr(config, "rope_parameters", None) or {}
    # of a model whose layers have different ones: by kind of layer
    for one in (parameters, *(value for value in parameters.values() if isinstance(value, dict))):
        kind = one.get("rope_type")
        if kind not in ("dynamic", "longrope"):
            continue
        limit = config.max_position_embeddings
        if kind == "longrope":
            limit = one.get("original_max_position_embeddings") or limit
        ends = [start, length]
        if position_ids is not None:
            ends = [int(position_ids[:, :end].max()) + 1 for end in ends]
        # "dynamic" has others for every length beyond the limit, "longrope" one more set of them
        if ends[1] > limit and (kind == "dynamic" or ends[0] <= limit):
            raise ValueError(
                f"x must end within the {limit} positions after which the {kind!r} rotary frequencies of "
                f"{config.model_type!r} depend on the length, got {ends[1]} with a context of {ends[0]}: give the "
                "whole sequence without shared_context()."
            )


def plain_model(model: Any) -> nn.Module:
    """The module of transformers, without an adapter's wrapper.

    Raises:
        TypeError: `model` is something else.
        UnsupportedOperation: it is not a decoder, or not causal.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a decoder of transformers, got {type(model).__name__}.")
    if hasattr(model, "_orig_mod"):
        raise TypeError(
            "model must be a decoder of transformers, got what torch.compile made of one: give its _orig_mod, and "
            "compile its layers (layer.compile())."
        )
    peft: Any = getattr(model, "peft_config", None)
    unwrap: Any = getattr(model, "get_base_model", None)
    if peft is not None and unwrap is not None:
        if any(getattr(one, "is_prompt_learning", False) for one in peft.values()):
            raise UnsupportedOperation(
                "model learns a prompt (PEFT), which comes before the context: use LoRA, or leave shared_context() out."
            )
        model = unwrap()
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "get_text_config"):
        raise TypeError(
            f"model must be a decoder of transformers with a config, got {type(model).__name__}: unwrap it (.module)."
        )
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedOperation(
            f"model {config.model_type!r} has an encoder, which sees all tokens: shared_context() needs a causal "
            "decoder."
        )
    return model


@functools.lru_cache(512)  # keys are of callers' classes
def _parameters_of(forward: Callable[..., Any]) -> tuple[str, ...]:
    return tuple(inspect.signature(inspect.unwrap(forward)).parameters)


def cache_argument(model: nn.Module) -> str:
    """The name of the argument that takes a cache.

    Raises:
        UnsupportedOperation: there is none.
    """
    taken = _parameters_of(type(model).forward)
    for name in CACHES:
        if name in taken:
            return name
    raise UnsupportedOperation(
        f"{type(model).__name__} takes no cache, so that nothing of its context can be kept: leave shared_context() "
        "out."
    )


def check_split(make: Callable[..., Any], model: nn.Module, x: Tensor) -> None:
    """Compare the split of a few random tokens with the whole, once for a model and its way of attention.

    Raises:
        UnsupportedOperation: values or a directional derivative differ.
    """
    inner = plain_model(model)
    key = getattr(inner.config, "_attn_implementation", None), x.dtype
    if key in _compared.setdefault(inner, set()):
        return
    random = RandomState(x.device)
    generator = torch.Generator("cpu").manual_seed(0)
    shape = (_ROWS, _TOKENS, x.shape[-1])
    size = x.detach().float().square().mean().sqrt().clamp_min(1e-3).cpu()
    tokens, v = (torch.randn(shape, generator=generator) for _ in range(2))
    tokens, v = (size * tokens).to(x), v.to(x)
    half = _TOKENS // 2
    v[:, :half] = 0
    try:
        exact = torch.autocast(x.device.type, enabled=False)  # its rounding would look like a difference
        with exact, torch.inference_mode(False), torch.no_grad(), paused(), frozen_parameters((inner,), True):
            whole = make(model, tokens, 0, None, None, False)(dual(tokens, v))
            expected = whole[:, half:]
            try:
                split = make(model, tokens, half, None, None, False)(dual(tokens[:, half:], v[:, half:]))
            except UnsupportedOperation:
                raise
            except Exception as error:
                raise UnsupportedOperation(
                    f"{type(inner).__name__} computes the whole, but not a suffix after its context "
                    f"({type(error).__name__}: {error}): leave shared_context() out."
                ) from error
    finally:
        random.restore()
    limit = _WIDE if x.dtype in (torch.float64, torch.float32) else _LOW
    for part, name in (("primal", "value"), ("tangent", "derivative")):
        a, b = (getattr(y, part).double() for y in (split, expected))
        difference = float((a - b).norm() / b.norm().clamp_min(1e-30))
        if not difference <= limit:
            raise UnsupportedOperation(
                f"{type(inner).__name__} gives another {name} for a suffix after its context than in the whole "
                f"(relative difference {difference:.0e}): it is not causal, so leave shared_context() out."
            )
    _compared[inner].add(key)
