"""Peak memory of one variant, run in a process of its own: `python -m bench.peak ...`.

A process that has run other variants keeps freed memory that the next one would live on unseen.
"""

from __future__ import annotations

import json
import sys

import torch

from common.meter import measure

from .case import Selection
from .gate import on_backend
from .suites import SUITES


def main(
    suite: str, family: str, dtype: str, length: str, part: str, device: str, name: str, threads: str
) -> None:
    """Print the bytes as JSON, or null where the system does not tell."""
    torch.set_num_threads(int(threads))
    (case,) = SUITES[suite].cases(Selection((dtype,), (int(length),), (family,), part, device))
    variant = case.variant(name)
    with on_backend(variant):
        warm = variant.make(case.warm_length)
        warm.call()
        if warm.reset:
            warm.reset()
        del warm
        _, cost = measure(variant.make(case.length).call, torch.device(case.device))
    print(json.dumps(cost.peak_bytes))


if __name__ == "__main__":
    main(*sys.argv[1:])
