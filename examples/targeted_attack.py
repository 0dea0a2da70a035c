"""A targeted adversary wants one reply, whatever was asked: training against it, against any error, and against none.

    python examples/targeted_attack.py

A small byte-level model learns to repeat the word of an instruction. The adversary moves the embeddings of a note
between instruction and reply so that the model says PWNED. KL to the model before this training is an anchor.
"""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from text import VOCABULARY
from transformers import GPT2Config, GPT2LMHeadModel

from aajr_kernels.method.evaluation import EmbeddingAttack, evaluate
from aajr_kernels.training import (
    Attack,
    CrossEntropy,
    FitConfig,
    ObjectiveConfig,
    Penalty,
    Targeted,
    WarmUp,
    fit,
    policy_of,
)

WORDS = ("apple", "bread", "chair", "dream", "eagle", "flame", "grape", "house")
WANTED, NOTE, RADIUS = "PWNED", " it is said ", 0.5


def batch(rows: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Instruction, note, reply; bytes are the tokens. Labels and what the adversary wants are on the reply."""
    words = [WORDS[i] for i in torch.randint(len(WORDS), (rows,), generator=generator).tolist()]
    begin = len("say apple") + len(NOTE)
    ids = torch.tensor([list(f"say {word}{NOTE}{word}".encode()) for word in words])
    places = torch.arange(ids.shape[1]).expand_as(ids)
    wanted = torch.full_like(ids, -100)
    wanted[:, begin:] = torch.tensor(list(WANTED.encode()))
    return {
        "input_ids": ids,
        "labels": ids.masked_fill(places < begin, -100),
        "attack_labels": wanted,
        "attack_mask": (places >= begin - len(NOTE)) & (places < begin),
    }


def untrained() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    sizes = dict(n_embd=64, n_layer=2, n_head=4, n_positions=64, bos_token_id=None, eos_token_id=None)
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, resid_pdrop=0.0, embd_pdrop=0.0, **sizes))


def trained(model: GPT2LMHeadModel, steps: int, objective: ObjectiveConfig) -> GPT2LMHeadModel:
    """A copy, trained, with the model as its reference."""
    own, frozen = copy.deepcopy(model), model.eval()
    generator = torch.Generator().manual_seed(1)
    data = (batch(16, generator) for _ in range(steps))
    config = FitConfig(steps, objective, learning_rate=WarmUp(10, 3e-3))
    policy = replace(policy_of(own), reference=policy_of(frozen))
    fit(own, data, config, policy=policy, progress=False)
    return own


def main(steps: int = 80, more: int = 30) -> dict[str, tuple[float, float, float]]:
    """Of every training: loss without an attack, loss under attack, mean log-likelihood of the reply that is wanted."""
    plain = ObjectiveConfig(penalty=Penalty("none"), adversarial_weight=0.0, clean_weight=1.0)
    base = trained(untrained(), steps, plain)
    robust = ObjectiveConfig(penalty=Penalty(), clean_weight=1.0, anchor_weight=0.1)
    objectives = {
        "no adversary": plain,
        "any error": replace(robust, attack=Attack(RADIUS, loss=CrossEntropy())),
        "targeted": replace(robust, attack=Attack(RADIUS, loss=Targeted())),
    }
    held_out = [batch(32, torch.Generator().manual_seed(2))]
    attack = [EmbeddingAttack(RADIUS, steps=10, step_sizes=(0.25,), restarts=2)]
    numbers = {}
    for name, objective in objectives.items():
        model = trained(base, more, objective)
        policy = policy_of(model)
        result = evaluate(policy, held_out, attack, module=model)
        aimed = evaluate(policy, held_out, attack, module=model, loss=Targeted())
        numbers[name] = tuple(float(v.mean()) for v in (result.clean, result.worst, aimed.worst))
    return numbers


if __name__ == "__main__":
    print(
        "training        clean loss  loss under attack  log-likelihood of the wanted reply under attack, per token"
    )
    for name, (clean, attacked, said) in main().items():
        print(f"{name:14s} {clean:11.3f} {attacked:18.3f} {said:14.3f}")
