"""Nominal loss at the same bound on what each method bounds, and at the same realised sensitivity along the ascent."""

from __future__ import annotations

import functools
from typing import Any

from ..base import Experiment, Task, configured
from ..store import Row
from .report import METHODS, report


def tasks(config: dict[str, Any]) -> list[Task]:
    """One training each; those of a seed together."""
    return [
        Task(
            f"{training}/{method}/{'-' if gamma is None else format(gamma, 'g')}/{seed}",
            {"config": config, "seed": seed, "training": training, "method": method, "gamma": gamma},
        )
        for seed in range(config["seeds"])
        for training in config["mixes"]
        for method in METHODS
        for gamma in ([None] if method == "none" else config["gammas"])
    ]


def work(config: dict[str, Any], seed: int, training: str, method: str, gamma: float | None) -> list[Row]:
    """The row of a training: what it realised, its losses, and the curvature along its ascent."""
    import torch

    from .. import bounded
    from ..digits.training import nominal, robust

    digits, share = _digits(seed, tuple(config["sizes"])), config["quantile"]
    policy, multiplier = bounded.train(config, seed, digits, method, gamma, mix=config["mixes"][training])
    units = [
        bounded.roots(config, policy, part, torch.Generator().manual_seed(start + seed), *bounded.METHODS)
        for part, start in ((digits.validation, 4000), (digits.test, 5000))
    ]
    of_validation, of_test = (dict(zip(bounded.METHODS, roots)) for roots in units)
    row: Row = {
        "seed": seed,
        "training": training,
        "method": method,
        "gamma": gamma,
        "multiplier": multiplier.facts.get("multiplier") if multiplier is not None else None,
        "violated": None if gamma is None else float((of_validation[method] > gamma).double().mean()),
        "validation": {name: bounded.quantile_of(roots, share) for name, roots in of_validation.items()},
        "realised": bounded.quantile_of(of_test["aligned"], share),
        "test": nominal(policy, digits.test) | robust(config, policy, digits.test, seed),
    }
    return [row | {"stability": _stability(config, policy, digits.test[: config["images"]], seed)}]


def _stability(config: dict[str, Any], policy: Any, images: Any, seed: int) -> dict[str, float]:
    """Means over steps and images of κ⁻, κ⁺, L_eff and the expansion, along the ascent of training."""
    import torch
    import torch.nn.functional as F

    import aajr_kernels as aajr

    from ..digits.data import CLASSES
    from ..digits.training import inner_ascent

    classes = lambda x: policy(x)[:, :CLASSES]
    stability = aajr.stability_report(
        *(lambda x: F.cross_entropy(classes(x), images.y, reduction="none"), images.x),
        inner_ascent(config, policy, images, torch.Generator().manual_seed(6000 + seed)),
        samples=config["samples"],
        func=classes,
        nearby=config["nearby"] * config["radius"],
        generator=torch.Generator().manual_seed(7000 + seed),
        module=policy,
    )
    summary = stability.to_dict()["summary"]
    return {name: summary[name] for name in ("kappa", "kappa_positive", "smoothness", "expansion")}


@functools.lru_cache(maxsize=1)
def _digits(seed: int, sizes: tuple[int, int, int]) -> Any:
    from ..digits.data import load

    return load(seed, sizes)


EXPERIMENT = Experiment("equal-bound", configured(__file__), tasks, work, report)
