"""How much an attack tries: a slice with a fixed seed every day, everything in the slow tests."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

import pytest

from common.trust import count

T = TypeVar("T")


def scaled(quick: int) -> Any:
    """Gives a test the argument `drawn`, a function from all cases to those that are tried."""
    slice_ = lambda cases: random.Random(0).sample(cases := list(cases), min(quick, len(cases)))
    return pytest.mark.parametrize(
        "drawn",
        [
            pytest.param(slice_, id="slice"),
            pytest.param(list, id="all", marks=[pytest.mark.slow, pytest.mark.timeout(7200)]),
        ],
    )


def damages(content: bytes, place: int) -> Sequence[bytes]:
    """A file with one byte changed: a bit in it, all of it to something printable, lost, and doubled."""
    before, byte, after = content[:place], content[place], content[place + 1 :]
    flipped = byte ^ (1 << place % 8)
    printable = ord("7") if byte != ord("7") else ord("8")
    return [
        before + bytes([flipped]) + after,
        before + bytes([printable]) + after,
        before + after,
        before + bytes([byte, byte]) + after,
    ]


def each_damage(content: bytes, places: Iterable[int]) -> Iterator[tuple[int, bytes]]:
    """Every damage of a file at these places; counted when all of them were tried and passed."""
    changed, tried = 0, 0
    for place in places:
        for damaged in damages(content, place):
            yield place, damaged
            tried += 1
        changed += 1
    count("damage", files=1, bytes=changed, changes=tried)
