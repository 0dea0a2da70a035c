"""The reference of a model with adapters: the same model without them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from ..backends.errors import UnsupportedOperation
from ..method.attack_state import parameters_are_frozen
from ..method.policy import Policy
from ..sharding import is_fully_sharded

__all__ = ["without_adapters"]

#: in the names of what PEFT keeps beside the adapters' own prefix
_BESIDE = ("modules_to_save", "trainable_tokens")


def without_adapters(model: Any, policy: Policy) -> Policy:
    """A policy that calls `model`, of PEFT, as it was before it had adapters: in eval mode, with nothing changed after.

    When called it raises a ValueError where weights outside of the adapters are trained, with which it would move, and
    an UnsupportedOperation after ``fully_shard``.
    """
    before = list(_trained_outside(model))

    def off(func: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            with _switched_off(model, before):
                return func(*arguments, **options)

        return call

    embed = None if policy.embed is None else off(policy.embed)
    head = None if policy.head is None else off(policy.described_head)
    return Policy(off(policy.forward), embed, head)


@contextlib.contextmanager
def _switched_off(model: Any, before: list[str]) -> Iterator[None]:
    _check(model, before)
    modes = [(module, module.training) for module in model.modules()]
    flags = [(p, p.requires_grad) for p in model.parameters()]
    try:
        for module, _ in modes:
            module.training = False
        with model.disable_adapter():
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        for p, flag in flags:  # PEFT sets those of the adapters that it switches on
            p.requires_grad_(flag)


def _check(model: nn.Module, before: list[str]) -> None:
    if is_fully_sharded(model):
        raise UnsupportedOperation(
            "a reference without adapters needs parameters on this process, got a model after fully_shard: give "
            "dataclasses.replace(policy_of(model), reference=policy_of(frozen_model)) with a second model."
        )
    # inside an attack no parameter says whether it is trained
    for name in before if parameters_are_frozen() else _trained_outside(model):
        raise ValueError(
            f"a reference without adapters must not move, but {name} is trained: freeze what is not of an adapter, "
            "leave bias='none' in the configuration of PEFT, or give a second model: dataclasses.replace("
            "policy_of(model), reference=policy_of(frozen_model))."
        )


def _trained_outside(model: Any) -> Iterator[str]:
    """Names of trained parameters that the adapters do not switch off."""
    tuner = getattr(model, "base_model", None)
    marks = (*_BESIDE, str(getattr(tuner, "prefix", "") or "lora_"))
    for name, p in model.named_parameters():
        if p.requires_grad and not any(mark in name for mark in marks):
            yield name
