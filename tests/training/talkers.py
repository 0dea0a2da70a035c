"""Agents on one tiny Llama with an adapter each, and what they play, for tests of their training."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from integrations.transformers.subjects import tiny

from aajr_kernels.integrations.transformers import adapter_agent
from aajr_kernels.method.agents import Agents
from aajr_kernels.method.dialogue import Dialogue, play
from aajr_kernels.training import AgentsConfig, Attack, ObjectiveConfig, Penalty

peft = pytest.importorskip("peft")
NAMES = ("buyer", "seller", "judge")
TWO = torch.ones(2, 2, dtype=torch.long)


def adapted(*names: str, dropout: float = 0.0) -> Any:
    """A tiny Llama in float64 with one adapter for each name, all of which do something."""
    base = tiny("llama").double()
    base.generation_config.eos_token_id = None
    config = lambda: peft.LoraConfig(
        r=2,
        target_modules=["q_proj", "v_proj"],
        task_type="CAUSAL_LM",
        init_lora_weights=False,
        lora_dropout=dropout,
    )
    torch.manual_seed(5)
    model = peft.get_peft_model(base, config(), names[0], autocast_adapter_dtype=False)
    for name in names[1:]:
        model.add_adapter(name, config())
    return model.double()


def of_tokens(token: int):
    """A payoff: the share of one token among all that were said."""
    return lambda dialogue: (dialogue.ids == token).double().mean(-1)


def team(model: Any, *names: str, **options: Any) -> Agents:
    options = options or {"payoff": of_tokens(4)}
    return Agents([adapter_agent(model, name, **options) for name in names])


def opened(names: tuple[str, ...] = NAMES, rows: int = 2) -> Dialogue:
    generator = torch.Generator().manual_seed(1)
    draw = lambda length: torch.randint(4, 60, (rows, length), generator=generator)
    return Dialogue.opened(names, {names[0]: draw(3)}, draw(2))


def played(rounds: int = 2, length: int = 2):
    return lambda agents, generator: play(
        agents, opened(agents.names), rounds=rounds, length=length, generator=generator
    )


def objective(weight: float = 0.05, **options: Any) -> ObjectiveConfig:
    attack = Attack(radius=0.3, steps=2, step_size=0.2)
    return ObjectiveConfig(**(dict(attack=attack, penalty=Penalty(weight=weight, steps="last")) | options))


def config_of(steps: int, **options: Any) -> AgentsConfig:
    return AgentsConfig(
        steps, **(dict(objective=objective(), learning_rate=0.01, checkpoint_every=1) | options)
    )
