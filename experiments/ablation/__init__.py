"""Where the penalty is measured: at the worst point or along the ascent, per token or over the row, or not at all.

The small transformer of :mod:`..language_model` at a matched clean perplexity. Every method has w, the weight of the
adversary, and λ chosen together; without a penalty it may spend its time on a longer ascent instead.
"""

from __future__ import annotations

from typing import Any

from ..base import Experiment, Task, configured
from .report import report
from .runs import METHODS, work


def tasks(config: dict[str, Any]) -> list[Task]:
    """Of one method at one seed; those of a seed share the model that they start from."""
    return [
        Task(f"{seed}/{method}", {"config": config, "seed": seed, "method": method})
        for seed in range(config["seeds"])
        for method in METHODS
    ]


EXPERIMENT = Experiment("ablation", configured(__file__), tasks, work, report)
