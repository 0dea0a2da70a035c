"""Training by :func:`aajr_kernels.training.fit` with a shared context: the same for all methods up to the objective."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from aajr_kernels.training import (
    Attack,
    Constraint,
    FitConfig,
    ObjectiveConfig,
    Penalty,
    Share,
    WarmUp,
    fit,
)
from common import texts

from .dialogues import Dialogue, Encode, batches_of

State = dict[str, Tensor]
#: sizes of the stand-in, a Llama over bytes with random weights
SIZES = dict(
    vocab_size=256,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=1024,
)


def model_of(config: dict[str, Any], seed: int) -> tuple[Any, Encode]:
    """A model with fresh adapters on query and value projections, fused; and from text to its tokens.

    Args:
        config: ``model`` is ``"smollm2"``, or ``"stand-in"`` for a random Llama over bytes that takes the same way.
        seed: of the adapters.

    Raises:
        MissingPackage: peft, transformers, gguf or the package with the weights is not installed.
    """
    if config["model"] == "smollm2":
        base, tokenizer = texts.smollm2()

        def encode(text: str, marks: bool) -> list[int]:
            options = dict(add_special_tokens=False, split_special_tokens=not marks)
            return list(tokenizer(text, **options)["input_ids"])
    else:
        base = texts.small_llama(0, **SIZES)

        def encode(text: str, marks: bool) -> list[int]:
            return list(text.encode())

    return texts.adapted(base, config["rank"], seed), encode


def state_of(model: nn.Module) -> State:
    """A copy of what is trained: the adapters."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


@torch.no_grad()
def put(model: nn.Module, state: State) -> None:
    """Set the adapters."""
    for name, p in model.named_parameters():
        if p.requires_grad:
            p.copy_(state[name])


def objective_of(config: dict[str, Any], mix: float, gamma: float | None) -> ObjectiveConfig:
    """(clean + w · adversarial) / (1 + w), and with γ the constraint √q ≤ γ along the ascent.

    Args:
        config: ``radius``, ``inner``, ``constraint``.
        mix: w; 0 is training without an adversary.
        gamma: of the quantile of √q in the first steps; None for no constraint.
    """
    inner = config["inner"]
    attack = Attack(
        radius=config["radius"],
        relative=True,
        steps=inner["steps"],
        step_size=inner["step"] * config["radius"],
        scope="token",
    )
    penalty = Penalty(method="none")
    if gamma is not None:
        penalty = Constraint(gamma=Share(gamma), **config["constraint"])
    return ObjectiveConfig(
        attack=attack,
        penalty=penalty,
        clean_weight=1 / (1 + mix),
        adversarial_weight=mix / (1 + mix),
        share_context=True,
    )


def tune(
    config: dict[str, Any],
    model: nn.Module,
    encode: Encode,
    dialogues: Sequence[Dialogue],
    seed: int,
    *,
    mix: float,
    gamma: float | None = None,
) -> dict[str, Any]:
    """Train the adapters, a batch of dialogues a step, each of which is used once.

    Returns:
        ``last``: mean clean and adversarial loss of the last quarter of the steps (None for what there is not);
        ``seconds_per_step``: median processor time; of a constraint ``bound``, γ in the unit of the attack, and
        ``multiplier`` and ``violation`` of the last step.
    """
    batches = batches_of(encode, dialogues, config["batch"])
    settings = FitConfig(
        steps=len(batches),
        objective=objective_of(config, mix, gamma),
        learning_rate=WarmUp(config["warm_up"], config["learning_rate"]),
        seed=seed,
    )
    rows, seconds, clock = [], [], [time.process_time()]

    def on_step(row: dict[str, Any]) -> None:
        now = time.process_time()
        seconds.append(now - clock[0])
        clock[0] = now
        rows.append(row)

    fit(model, batches, settings, on_step=on_step, progress=False)
    tail = rows[-max(len(rows) // 4, 1) :]
    losses = {
        name: sum(row[name] for row in tail) / len(tail) if name in tail[0] else None
        for name in ("clean_loss", "adversarial_loss")
    }
    names = {"bound": "gamma", "multiplier": "multiplier", "violation": "violation"}
    held = {} if gamma is None else {ours: rows[-1].get(name) for ours, name in names.items()}
    return {"last": losses, "seconds_per_step": sorted(seconds)[len(seconds) // 2], **held}
