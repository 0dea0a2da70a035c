"""Attacks on a trained model: a short one that chooses among the runs of a method, and all that test the chosen one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from aajr_kernels.method.evaluation import (
    EmbeddingAttack,
    SuffixSearch,
    TokenSubstitution,
    UniversalPerturbation,
    evaluate,
)
from aajr_kernels.training import policy_of

from .dialogues import Data, Encode, batch_of
from .hidden import LayerAttack

Batch = dict[str, Tensor]


def clean_loss(model: nn.Module, batch: Batch) -> float:
    """Mean over the dialogues of the mean cross-entropy of their replies, in eval mode."""
    return float(evaluate(policy_of(model), batch, {}, module=model).clean.mean())


def short_attack(config: dict[str, Any], model: nn.Module, batch: Batch, seed: int) -> float:
    """Mean loss under the embedding attack that chooses among the runs."""
    attack = EmbeddingAttack(config["radius"], **config["selection"]["attack"])
    found = evaluate(policy_of(model), batch, [attack], module=model, share_context=True, seed=seed)
    return float(found.worst.mean())


def losses_under_attack(
    config: dict[str, Any], model: nn.Module, encode: Encode, data: Data, seed: int
) -> dict[str, Any]:
    """Losses (nats per scored token) of test dialogues, without and under every attack.

    The universal perturbation is learnt on as many validation dialogues.

    Returns:
        ``clean``, every attack, and ``worst``, the mean over the dialogues of the largest of them; ``rows``: under the
        same names the losses of the dialogues.
    """
    policy, settings, radius = policy_of(model), config["evaluation"], config["radius"]
    tested, learnt = (batch_of(encode, part[: settings["rows"]]) for part in (data.test, data.validation))
    options, candidates = settings["attacks"], injected_tokens(encode, data)
    universal = UniversalPerturbation(radius, **options["universal"])
    attacks: dict[str, Any] = {
        "embedding": EmbeddingAttack(radius, **options["embedding"]),
        "hidden": LayerAttack(**options["hidden"]),
        "universal": universal.fit(policy, learnt, module=model, share_context=True),
        "substitution": TokenSubstitution(candidates=candidates, **options["substitution"]),
        "suffix": SuffixSearch(candidates=candidates, initial=int(candidates[0]), **options["suffix"]),
    }
    found = evaluate(policy, tested, attacks, module=model, share_context=True, seed=seed)
    rows = {name: found.losses(name) for name in ("clean", *attacks, "worst")}
    means: dict[str, Any] = {name: float(losses.mean()) for name, losses in rows.items()}
    return means | {"rows": {name: losses.tolist() for name, losses in rows.items()}}


def injected_tokens(encode: Encode, data: Data) -> Tensor:
    """Ids ``[K]`` that occur in the injected texts of any part, ascending: what an attacker may put in."""
    lines = [line for part in data.texts.values() for line in part]
    return torch.tensor(sorted({token for line in lines for token in encode(f" {line}", False)}))
