"""Language models: clean and robust perplexity under an adversary of embeddings and one of tokens.

Two parts: a small transformer over bytes, trained here, at matched clean perplexity over several seeds; and
SmolLM2-135M-Instruct with LoRA, one seed, as a check that the method runs on a pretrained model.
"""

from __future__ import annotations

from typing import Any

from ..base import Experiment, Task, configured
from .parts import ADAPTED, SCRATCH, work
from .report import report


def tasks(config: dict[str, Any]) -> list[Task]:
    """Of the adapted part, training and evaluation apart."""
    scratch: list[dict[str, Any]] = [
        {"part": "scratch", "seed": seed, "method": method}
        for seed in range(config["scratch"]["seeds"])
        for method in SCRATCH
    ]
    adapted: list[dict[str, Any]] = [
        {"part": "adapted", "seed": seed, "method": method, "stage": stage}
        for seed in range(config["adapted"]["seeds"])
        for method in ADAPTED
        for stage in ("training", "evaluation")
        if (method, stage) != ("untouched", "training")
    ]
    return [Task("/".join(map(str, one.values())), {"config": config, **one}) for one in scratch + adapted]


EXPERIMENT = Experiment("language-model", configured(__file__), tasks, work, report)
