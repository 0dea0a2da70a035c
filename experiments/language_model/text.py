"""Windows of Shakespeare in turns: the adversary has every other turn, and the other turns are what is scored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from aajr_kernels.method.evaluation import Scene
from aajr_kernels.training import Policy, prepared
from common import texts


@dataclass(frozen=True)
class Text:
    """Token ids ``[n]`` of three disjoint parts, and the ids ``[K]`` that occur in the training part, ascending."""

    train: Tensor
    validation: Tensor
    test: Tensor
    candidates: Tensor


def plays() -> Text:
    """Bytes: 5 MB of works for training; of the two plays held out, the first half validates and the second tests.

    Raises:
        MissingPackage: the package ``shakespeare`` is not installed.
    """
    corpus = texts.shakespeare()
    middle = len(corpus.valid) // 2
    return _text(corpus.train, corpus.valid[:middle], corpus.valid[middle:])


def encoded(tokenizer: Any, characters: int) -> Text:
    """The beginnings of the parts of :func:`plays` as tokens of a pretrained model.

    Args:
        tokenizer: of Hugging Face.
        characters: that are taken of the training part; of the others half as many at most.
    """
    raw = plays()

    def ids(part: Tensor, most: int) -> Tensor:
        text = bytes(part[:most].tolist()).decode(errors="ignore")
        return torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    half = characters // 2
    return _text(ids(raw.train, characters), ids(raw.validation, half), ids(raw.test, half))


def _text(train: Tensor, validation: Tensor, test: Tensor) -> Text:
    return Text(train, validation, test, train.unique())


def windows(source: Tensor, rows: int, length: int, generator: torch.Generator) -> Tensor:
    """Random windows ``[rows, length]``."""
    starts = torch.randint(len(source) - length + 1, (rows,), generator=generator)
    return torch.stack([source[start : start + length] for start in starts.tolist()])


def attackable(length: int, turn: int) -> Tensor:
    """Bool ``[length]``: the adversary's turns, the first one and every second after it."""
    return torch.arange(length).div(turn, rounding_mode="floor") % 2 == 0


def in_turns(ids: Tensor, turn: int) -> dict[str, Tensor]:
    """A batch for :func:`aajr_kernels.training.fit`: no token is both open to attack and scored as a label.

    Args:
        ids: ``[B, N]``.
        turn: tokens in a turn.
    """
    theirs = attackable(ids.shape[1], turn).expand(ids.shape)
    return {"input_ids": ids, "labels": ids.masked_fill(theirs, -100), "attack_mask": theirs}


def scene_of(model: nn.Module, policy: Policy, batch: dict[str, Tensor]) -> Scene:
    """The scene of a batch of :func:`in_turns` before a model on the CPU."""
    return Scene(policy, prepared(batch, torch.device("cpu"), shift=True), (model,))
