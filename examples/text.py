"""Text for the examples, from this repository: bytes are the tokens, nothing is downloaded."""

from __future__ import annotations

import random
from pathlib import Path

ROOT = Path(__file__).parents[1]
VOCABULARY = 256


def passages(count: int, longest: int = 64, seed: int = 0) -> list[str]:
    """Pieces of the documentation, of different lengths."""
    pages = sorted(ROOT.glob("docs/*.md"))
    text = "\n".join(page.read_text(encoding="ascii", errors="ignore") for page in pages)
    draw = random.Random(seed)
    lengths = [draw.randint(longest // 3, longest) for _ in range(count)]
    starts = [draw.randrange(len(text) - longest) for _ in range(count)]
    return [text[start : start + length] for start, length in zip(starts, lengths)]
