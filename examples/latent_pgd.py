"""Model, data and attack of the two latent_*.py: latent adversarial training in plain PyTorch, inside a Trainer."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from text import VOCABULARY, passages
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer


class LatentTrainer(Trainer):
    """Trains on the loss at the last point of projected gradient ascent on what a decoder layer returns."""

    def __init__(
        self, *arguments: Any, layer: int, radius: float, steps: int, step_size: float, **options: Any
    ) -> None:
        super().__init__(*arguments, **options)
        self.attack = dict(layer=layer, radius=radius, steps=steps, step_size=step_size)

    def compute_loss(self, model: Any, inputs: dict[str, Any], *arguments: Any, **options: Any) -> Any:
        if not model.training:
            return super().compute_loss(model, inputs, *arguments, **options)
        delta = ascend(model, inputs, **self.attack)
        with added(model.model.layers[self.attack["layer"]], delta):
            return super().compute_loss(model, inputs, *arguments, **options)


def ascend(
    model: Any, inputs: dict[str, Any], layer: int, radius: float, steps: int, step_size: float
) -> Tensor:
    """A perturbation of norm `radius` or less for every token."""
    mask = inputs["attention_mask"].unsqueeze(-1)
    delta = torch.zeros(*mask.shape[:2], model.config.hidden_size)
    for _ in range(steps):
        delta.requires_grad_()
        with added(model.model.layers[layer], delta):
            (slope,) = torch.autograd.grad(model(**inputs).loss, delta)
        moved = delta.detach() + step_size * nn.functional.normalize(slope * mask, dim=-1, eps=1e-30)
        delta = moved * (radius / moved.norm(dim=-1, keepdim=True).clamp_min(1e-30)).clamp(max=1)
    return delta


@contextlib.contextmanager
def added(layer: nn.Module, delta: Tensor) -> Iterator[None]:
    """Inside, the layer returns so much more."""

    def hook(module: nn.Module, inputs: Any, output: Any) -> Any:
        return (output[0] + delta, *output[1:]) if isinstance(output, tuple) else output + delta

    handle = layer.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def losses(model: Any, seed: int = 1) -> tuple[float, float]:
    """Held out: without an attack, and under one of ten steps."""
    model.eval()
    batch = collate(rows(16, seed))
    delta = ascend(model, batch, layer=0, radius=1.0, steps=10, step_size=0.2)
    with torch.no_grad():
        clean = float(model(**batch).loss)
        with added(model.model.layers[0], delta):
            return clean, float(model(**batch).loss)


def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **sizes))


def rows(count: int, seed: int = 0) -> list[bytes]:
    return [text.encode() for text in passages(count, seed=seed)]


def collate(rows: list[bytes]) -> dict[str, Tensor]:
    """Padded on the right; −100 is not learnt."""
    length = max(map(len, rows))
    ids = torch.tensor([[*row, *[0] * (length - len(row))] for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
