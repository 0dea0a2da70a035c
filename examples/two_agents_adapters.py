"""Two agents with an adapter each on one small model talk in turns, and are trained in turn against an adversary.

    python examples/two_agents_adapters.py

The asker is paid for vowels, the answerer for saying again what the asker said. The adversary moves the embeddings of
what an agent hears; the penalty holds down how fast the agent's distribution changes on that way. An interrupted
training goes on from its checkpoint with the same bits.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from text import VOCABULARY, passages
from transformers import LlamaConfig, LlamaForCausalLM

from aajr_kernels.integrations.transformers import adapter_agent
from aajr_kernels.method.agents import Agents
from aajr_kernels.method.dialogue import Dialogue, play
from aajr_kernels.training import AgentsConfig, Attack, ObjectiveConfig, Penalty, fit_agents

NAMES = ("asker", "answerer")
VOWELS = torch.tensor(list(b"aeiouAEIOU"))


def turns(dialogue: Dialogue, name: str) -> torch.Tensor:
    """What one of them has said, [B, n]."""
    return dialogue.ids[:, dialogue.speakers == dialogue.names.index(name)]


def vowels(dialogue: Dialogue) -> torch.Tensor:
    return torch.isin(turns(dialogue, "asker"), VOWELS).double().mean(-1)


def said_again(dialogue: Dialogue) -> torch.Tensor:
    asked, answered = turns(dialogue, "asker"), turns(dialogue, "answerer")
    return (answered[:, :, None] == asked[:, None]).any(-1).double().mean(-1)


def adapted() -> torch.nn.Module:
    """One model, with an adapter for each."""
    torch.manual_seed(0)
    sizes = dict(hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4)
    ends = dict(pad_token_id=0, bos_token_id=None, eos_token_id=None)
    config = LlamaConfig(vocab_size=VOCABULARY, initializer_range=0.05, **sizes, **ends)
    base = LlamaForCausalLM(config)
    lora = lambda: LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base, lora(), NAMES[0])
    model.add_adapter(NAMES[1], lora())
    return model


def main(steps: int = 24, rows: int = 16, stop: int = 16) -> list[dict]:
    model = adapted()
    agents = Agents(
        [adapter_agent(model, "asker", payoff=vowels), adapter_agent(model, "answerer", payoff=said_again)]
    )
    openings = torch.tensor([list(text.encode()[:12]) for text in passages(rows)])

    def dialogues(agents: Agents, generator: torch.Generator) -> Dialogue:
        opened = Dialogue.opened(agents.names, opening=openings)
        return play(agents, opened, rounds=2, length=6, generator=generator)

    def config(steps: int) -> AgentsConfig:
        attack = Attack(radius=0.2, steps=2)  # in norms of a token
        weights = dict(clean_weight=1.0, adversarial_weight=0.0)  # the policy gradient at what was heard
        objective = ObjectiveConfig(attack=attack, penalty=Penalty(weight=0.01), **weights)
        return AgentsConfig(
            steps, objective, advantage="standardised", learning_rate=1e-2, checkpoint_every=10, seed=1
        )

    with tempfile.TemporaryDirectory() as folder:
        fit_agents(agents, dialogues, config(stop), out=Path(folder), progress=False)
        result = fit_agents(agents, dialogues, config(steps), out=Path(folder), progress=False)
    assert result.resumed_from == stop
    return result.rows


if __name__ == "__main__":
    for row in main():
        numbers = (
            f"{name} {row[name]:.3g}" for name in ("payoff", "attack_worst", "penalty", "gradient_norm")
        )
        print(f"{row['step']:3d} {row['agent']:9s}", *numbers)
