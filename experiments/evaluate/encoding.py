"""Tokens of examples: which of them are open to attack, and which are scored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .data import Example


@dataclass(frozen=True)
class Row:
    """Tokens of one example.

    Attributes:
        ids: of prompt and response.
        is_open: the adversary's.
        is_scored: the response's.
    """

    ids: list[int]
    is_open: list[bool]
    is_scored: list[bool]

    def __len__(self) -> int:
        return len(self.ids)

    def answered(self, reply: list[int]) -> Row:
        """With a response behind it."""
        return Row(
            self.ids + reply,
            self.is_open + [False] * len(reply),
            self.is_scored + [True] * len(reply),
        )


def prompt_of(tokenizer: Any, example: Example, system: str | None, chat: bool) -> Row:
    """The prompt, in the template of a chat or as it is.

    Raises:
        ValueError: the tokenizer says not where its tokens are; the template changes what the adversary writes.
    """
    text, theirs = example.prompt, example.attack or example.prompt
    if chat:
        messages = [{"role": "system", "content": system}] if system else []
        messages.append({"role": "user", "content": text})
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        theirs = theirs if theirs in text else theirs.strip()
    start = text.rfind(theirs)
    if start < 0:
        raise ValueError(
            f"the chat template changes what the adversary writes, {theirs[:40]!r}: pass --plain for the texts as they "
            "are."
        )
    try:
        options = {"return_offsets_mapping": True, "add_special_tokens": not chat, "verbose": False}
        encoded = tokenizer(text, **options)
    except NotImplementedError as error:
        raise ValueError(
            "the tokenizer does not say where its tokens are in the text: a fast one (of the library tokenizers) is "
            "needed."
        ) from error
    is_open = [a < start + len(theirs) and b > start for a, b in encoded["offset_mapping"]]
    return Row(list(encoded["input_ids"]), is_open, [False] * len(is_open))


def response_of(tokenizer: Any, text: str) -> list[int]:
    """Its tokens, without special ones."""
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def windows(tokenizer: Any, text: str, length: int) -> list[Row]:
    """A text in pieces of `length` tokens: the first half of each is the adversary's, the second half is scored.

    Raises:
        ValueError: it is shorter than one piece.
    """
    ids, half = response_of(tokenizer, text), length // 2
    if len(ids) < length:
        raise ValueError(
            f"the text must have at least --length={length} tokens, got {len(ids)}: give more, or a shorter length."
        )
    is_open, is_scored = [True] * half + [False] * (length - half), [False] * half + [True] * (length - half)
    starts = range(0, len(ids) - length + 1, length)
    return [Row(ids[start : start + length], is_open, is_scored) for start in starts]


def batches(rows: Sequence[Row], size: int) -> tuple[list[dict[str, Tensor]], list[int]]:
    """Batches of rows of similar length, padded on the right, and the index of every row in their order."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    groups = [order[i : i + size] for i in range(0, len(order), size)]
    return [_batch([rows[i] for i in group]) for group in groups], order


def _batch(rows: list[Row]) -> dict[str, Tensor]:
    longest = max(map(len, rows))

    def padded(values: list[list[int]], fill: int) -> Tensor:
        return torch.tensor([row + [fill] * (longest - len(row)) for row in values])

    labels = [[t if scored else -100 for t, scored in zip(row.ids, row.is_scored)] for row in rows]
    return {
        "input_ids": padded([row.ids for row in rows], 0),
        "attention_mask": padded([[1] * len(row) for row in rows], 0),
        "attack_mask": padded([list(map(int, row.is_open)) for row in rows], 0),
        "labels": padded(labels, -100),
    }
