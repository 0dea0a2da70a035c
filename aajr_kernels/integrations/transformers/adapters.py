"""Agents that share a model of PEFT, each with an adapter of its own, and speak by transformers' ``generate``."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ...method.agents import Agent
from ...training.policy import policy_of

__all__ = ["adapter_agent", "generated"]

#: samples of the policy as it is: one that drops or moves probabilities is not what a policy gradient learns
UNCHANGED = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0}


def adapter_agent(
    model: nn.Module,
    adapter: str,
    *,
    name: str | None = None,
    payoff: str | Callable[[Any], Tensor] | None = None,
    loss: str | Callable[[Agent, Any], Tensor] | None = None,
    generate: dict[str, Any] | None = None,
) -> Agent:
    """An agent that is one adapter of a PEFT model.

    Args:
        model: ``get_peft_model(...)``, with one adapter per agent (``model.add_adapter``); others stay inactive while
            this one acts, and which one was active is put back.
        adapter: its name in the model.
        name: of the agent; that of the adapter by default.
        payoff: of :class:`~aajr_kernels.method.agents.Agent`.
        loss: of the same, in the place of a payoff.
        generate: options of ``model.generate`` for its turns; by default samples of the policy as it is, whatever the
            model's generation config says of temperature, top-k, top-p and repetitions.

    Raises:
        TypeError: `model` is not of PEFT, or the adapter learns a prompt.
        ValueError: there is no such adapter.
    """
    known = getattr(model, "peft_config", None)
    if not isinstance(known, dict):
        raise TypeError(
            f"model must be a PEFT model with an adapter per agent, got {type(model).__name__}: call "
            "peft.get_peft_model, then model.add_adapter for every further agent."
        )
    if adapter not in known:
        raise ValueError(
            f"adapter must be one of {', '.join(known)}, got {adapter!r}: add it with model.add_adapter({adapter!r}, "
            "config)."
        )
    active = functools.partial(_active, model, adapter)
    with active():
        policy = policy_of(model)
    return Agent(
        adapter if name is None else name,
        policy,
        model,
        payoff,
        loss,
        active,
        functools.partial(_own, model, adapter),
        functools.partial(generated, options=generate),
    )


def generated(
    agent: Agent,
    ids: Tensor,
    attended: Tensor,
    length: int,
    generator: torch.Generator,
    options: dict[str, Any] | None = None,
) -> tuple[Tensor, Tensor]:
    """A turn by the model's own ``generate``, with its cache: as :func:`~aajr_kernels.method.dialogue.sampled`.

    Rows whose view ends in padding are moved to the right for it. Samples are drawn from a global state that
    `generator` seeds and that is put back.

    Returns:
        Token ids ``[B, n]``, n <= `length`, and their mask: False after a token that ends the text.
    """
    model: Any = agent.module
    config = model.generation_config
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    pad = config.pad_token_id if config.pad_token_id is not None else (ends[0] if ends[0] is not None else 0)
    order = attended.long().argsort(dim=-1, stable=True)  # padding first, tokens in their order
    settings = UNCHANGED | {"max_new_tokens": length, "pad_token_id": pad} | (options or {})
    seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
    devices = [ids.device] if ids.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        whole = model.generate(
            input_ids=ids.gather(1, order), attention_mask=attended.long().gather(1, order), **settings
        )
    said = whole[:, ids.shape[1] :]
    is_end = torch.isin(
        said, torch.tensor([e for e in ends if e is not None], device=said.device, dtype=said.dtype)
    )
    return said, is_end.long().cumsum(-1) - is_end.long() == 0


@contextlib.contextmanager
def _active(model: Any, adapter: str) -> Iterator[None]:
    before, flags = model.active_adapter, [(p, p.requires_grad) for p in model.parameters()]
    model.set_adapter(adapter)
    try:
        yield
    finally:
        model.set_adapter(before)
        for p, flag in flags:
            p.requires_grad_(flag)


def _own(model: Any, adapter: str) -> list[nn.Parameter]:
    """Parameters of an adapter: those that require a gradient while it is on, and have its name as a part of theirs.

    Either would not do: an adapter may be called as a part of the model is, and other parts may be trained, too.
    """
    with _active(model, adapter):
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return [p for name, p in named if adapter in name.split(".")]
