"""Part (b): a small language model trained from scratch, with and without the penalty, and attacked.

Both runs see the same initial weights, the same batches and the same number of steps. Sizes of perturbations are
fractions of the mean norm of the model's own embeddings, in training and attack alike: a model gains nothing by
inflating its embeddings.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

import aajr_kernels as aajr
from common.texts import Corpus, small_llama

from .embeddings import ascent_direction, loss_of, streamed_penalty


@dataclass(frozen=True)
class ScratchConfig:
    """Sizes and hyperparameters of part (b).

    Attributes:
        hidden, layers, heads, kv_heads, intermediate: of an unmodified ``LlamaForCausalLM`` over bytes.
        context: bytes a training window holds.
        batch: windows per step.
        steps: optimizer steps of each run.
        learning_rate: peak; linear warm-up over the first tenth, cosine to a tenth of it after that.
        weight: factor of the penalty in the loss of the penalised run.
        attack_steps: gradient steps of the attack that draws the curve.
        radii: of that attack, per byte, as fractions of the mean embedding norm.
        eval_windows: held-out windows that the curve is measured on.
    """

    hidden: int = 128
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    intermediate: int = 384
    context: int = 64
    batch: int = 16
    steps: int = 160
    learning_rate: float = 4e-3
    weight: float = 0.1
    attack_steps: int = 6
    radii: tuple[float, ...] = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5)
    eval_windows: int = 32


@dataclass
class ScratchRun:
    """Results of one training run.

    Attributes:
        weight: factor of the penalty; 0 for the ordinary run.
        loss: training cross-entropy per step, nats per byte.
        sensitivity: ``(step, Fisher penalty along the ascent direction)``, on held-out text.
        robust_loss: held-out cross-entropy under attack, one entry per radius.
        seconds: of the training loop.
        step_seconds: of each step; the first, which warms up, is left out.
    """

    weight: float
    loss: list[float] = field(default_factory=list)
    sensitivity: list[tuple[int, float]] = field(default_factory=list)
    robust_loss: list[float] = field(default_factory=list)
    seconds: float = 0.0
    step_seconds: list[float] = field(default_factory=list)

    @property
    def name(self) -> str:
        return f"penalty x {self.weight:g}" if self.weight else "no penalty"


def build(config: ScratchConfig, seed: int) -> Any:
    """An unmodified Hugging Face Llama over 256 byte values, initialised from `seed`."""
    return small_llama(
        seed,
        vocab_size=256,
        hidden_size=config.hidden,
        intermediate_size=config.intermediate,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.kv_heads,
        max_position_embeddings=256,
        tie_word_embeddings=False,
    )


def embedding_norm(model: Any) -> torch.Tensor:
    """Mean norm of the model's embedding vectors: the unit of perturbations."""
    return model.get_input_embeddings().weight.norm(dim=-1).mean()


def penalised_loss(model: Any, windows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Penalty along the ascent direction and task loss from one forward, both attached.

    Args:
        windows: ``[B, S + 1]`` bytes.

    Returns:
        The mean Fisher sensitivity per byte for a perturbation of one embedding norm per byte, and the cross-entropy.
    """
    x, labels = model.get_input_embeddings()(windows[:, :-1]), windows[:, 1:]
    direction = ascent_direction(model, x, labels, "token") * embedding_norm(model)
    return streamed_penalty(model, x, direction, labels)


def attack(
    model: Any, x: torch.Tensor, labels: torch.Tensor, radius: torch.Tensor | float, steps: int
) -> torch.Tensor:
    """Projected gradient ascent on the loss, within an l2 ball of `radius` around every embedding.

    Returns:
        The perturbed embeddings, detached, like `x`.
    """

    def loss(x: torch.Tensor) -> torch.Tensor:
        logits = model(inputs_embeds=x, use_cache=False).logits
        return F.cross_entropy(logits.mT, labels, reduction="none").mean(-1)

    size = float(radius)
    options: dict[str, Any] = {"scope": "token", "evaluate_last": False, "module": model}
    return aajr.ascend(loss, x, radius=size, steps=steps, step_size=2.5 * size / steps, **options).points[-1]


def robustness(model: Any, windows: torch.Tensor, config: ScratchConfig) -> list[float]:
    """Held-out loss under the attack, one entry per radius of the configuration."""
    with torch.no_grad():
        x = model.get_input_embeddings()(windows[:, :-1])
        unit = embedding_norm(model)
    labels, losses = windows[:, 1:], []
    for radius in config.radii:
        attacked = attack(model, x, labels, radius * unit, config.attack_steps) if radius else x
        with torch.no_grad():
            losses.append(loss_of(model, attacked, labels).item())
    return losses


def train(
    corpus: Corpus,
    config: ScratchConfig,
    *,
    weight: float,
    seed: int,
    device: torch.device,
    on_step: Callable[[float], None] = lambda loss: None,
) -> tuple[Any, ScratchRun]:
    """Train one model.

    Args:
        weight: factor of the penalty; with 0 it is not computed.
        seed: of the initial weights and of the batches.
        on_step: told the training loss after every step.
    """
    model = build(config, seed).to(device)
    batches, held_out = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed + 1)
    probe = corpus.batch("valid", config.batch // 2, config.context, held_out).to(device)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.learning_rate, betas=(0.9, 0.98), weight_decay=0.01
    )
    warm_up = max(1, config.steps // 10)

    def rate(step: int) -> float:
        decay = 0.55 + 0.45 * math.cos(math.pi * step / config.steps)
        return min(1.0, (step + 1) / warm_up) * decay

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    run, start = ScratchRun(weight), time.perf_counter()
    embed = model.get_input_embeddings()
    for step in range(config.steps):
        if step % max(1, config.steps // 8) == 0:
            run.sensitivity.append((step, penalised_loss(model, probe)[0].item()))
        begun = time.perf_counter()
        windows = corpus.batch("train", config.batch, config.context, batches).to(device)
        if weight:
            penalty, task = penalised_loss(model, windows)
        else:
            task = loss_of(model, embed(windows[:, :-1]), windows[:, 1:])
            penalty = torch.zeros_like(task)
        optimizer.zero_grad(set_to_none=True)
        (task + weight * penalty).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        run.loss.append(task.item())
        if step:
            run.step_seconds.append(time.perf_counter() - begun)
        on_step(run.loss[-1])
    run.seconds = time.perf_counter() - start
    run.sensitivity.append((config.steps, penalised_loss(model, probe)[0].item()))
    windows = corpus.batch("valid", config.eval_windows, config.context, held_out).to(device)
    run.robust_loss = robustness(model, windows, config)
    return model, run
