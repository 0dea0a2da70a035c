"""Texts to be attacked: a file of the user's, or prompt injections."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import texts

#: in the place of a file: the prompt injections of a package
INJECTIONS = "injections"


@dataclass(frozen=True)
class Example:
    """A prompt and its response.

    Attributes:
        prompt: what the model is given.
        response: what is scored; None for the model's own reply.
        attack: the part of the prompt that the adversary writes; None for all of it.
    """

    prompt: str
    response: str | None = None
    attack: str | None = None


def read(source: str, seed: int) -> list[Example] | str:
    """The examples of ``injections`` or of a file of JSON lines; of any other file its text.

    Args:
        source: ``"injections"``, or the path of a file. ``.jsonl`` and ``.json`` hold objects with ``prompt``, and if
            wanted ``response`` and ``attack``, one a line or in a list.
        seed: of the order of the injections.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no text, is empty, or an object lacks a prompt or has entries of another kind.
        MissingPackage: the package with the injections is not installed.
    """
    if source == INJECTIONS:
        return [Example(text) for text in texts.injections(seed)]
    path = Path(source)
    text = path.read_text(encoding="utf-8")
    if not text.strip():
        raise ValueError(f"{path} is empty: give prompts and responses, or a text.")
    if path.suffix not in (".jsonl", ".json"):
        return text
    return [_example(value, f"{path}, {place}") for place, value in _objects(text, path)]


def _objects(text: str, path: Path) -> list[tuple[str, Any]]:
    try:
        if text.lstrip().startswith("["):
            return [(f"entry {i + 1}", value) for i, value in enumerate(json.loads(text))]
        lines = enumerate(text.splitlines(), 1)
        return [(f"line {i}", json.loads(line)) for i, line in lines if line.strip()]
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path} must hold JSON, one object a line or a list of objects: {error}."
        ) from error


def _example(value: Any, place: str) -> Example:
    if not isinstance(value, dict) or not isinstance(value.get("prompt"), str) or not value["prompt"].strip():
        raise ValueError(
            f'{place} must be an object with a prompt, as {{"prompt": "...", "response": "..."}}.'
        )
    for name in ("response", "attack"):
        entry = value.get(name)
        if entry is not None and (not isinstance(entry, str) or not entry.strip()):
            raise ValueError(f"{place}: {name} must be a text, got {entry!r}: leave it out.")
    example = Example(value["prompt"], value.get("response"), value.get("attack"))
    times = 1 if example.attack is None else example.prompt.count(example.attack)
    if times != 1:
        raise ValueError(
            f"{place}: attack must occur once in the prompt, got {times} times: give the part of the prompt that the "
            "adversary writes, and enough of it."
        )
    return example
