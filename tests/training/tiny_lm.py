"""A language model of a few hundred parameters, with dropout, and short calls, for tests of the training loop."""

from __future__ import annotations

import dataclasses

import torch
from torch import nn

from aajr_kernels.training import Attack, FitConfig, ObjectiveConfig, fit

VOCABULARY, WIDTH = 13, 6
ATTACK = Attack(radius=0.5, relative=False, steps=2, step_size=0.3, scope="token")


class TinyLM(nn.Module):
    """Called with ``inputs_embeds`` and ``attention_mask``; a causal mean of what came before, and one layer."""

    def __init__(self, dropout: float = 0.0, tied: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.mix, self.up = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 8)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(8, VOCABULARY)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("scratch", torch.ones(2), persistent=False)
        if tied:
            self.other = self.up  # the same module under a second name

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def forward(self, inputs_embeds, attention_mask=None):
        self.calls += self.training
        x = inputs_embeds
        if attention_mask is not None:
            x = x * attention_mask.to(x.dtype).unsqueeze(-1)
        before = torch.cumsum(x, 1) / torch.arange(1, x.shape[1] + 1).to(x.dtype).unsqueeze(-1)
        h = torch.tanh(self.up(self.dropout(x + torch.tanh(self.mix(before)))))
        return self.head(h)


def tiny_lm(seed: int = 0, dropout: float = 0.0, **options) -> TinyLM:
    torch.manual_seed(seed)
    return TinyLM(dropout, **options)


def sequences(count: int, batch: int = 2, length: int = 5, seed: int = 7) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(VOCABULARY, (batch, length), generator=generator) for _ in range(count)]


def sgd(model, rate=1.0):
    return torch.optim.SGD(model.parameters(), lr=rate)


def plain(**options) -> FitConfig:
    """One step of plain gradient descent, unless said otherwise."""
    return fit_config(**(dict(steps=1, attack=ATTACK, clip_norm=None) | options))


def fit_config(**options) -> FitConfig:
    """A configuration whose objective takes the options that are its own."""
    own = {f.name for f in dataclasses.fields(ObjectiveConfig)} - {"seed"}
    objective = ObjectiveConfig(**{name: options.pop(name) for name in own & options.keys()})
    return FitConfig(objective=objective, **options)


def quiet(*arguments, **options):
    return fit(*arguments, progress=False, **options)


def vector(model) -> torch.Tensor:
    return torch.nn.utils.parameters_to_vector(model.parameters()).detach()
