"""Is the constraint met? The policy of :mod:`..digits` under bounds on ‖J u‖ that bind, and under one that does not."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..base import Experiment, Task, configured
from ..store import Row
from .report import report

if TYPE_CHECKING:
    from aajr_kernels.training import Multiplier


def tasks(config: dict[str, Any]) -> list[Task]:
    """One training each."""
    return [
        Task(
            f"{followed}/{gamma:g}/{seed}",
            {"config": config, "seed": seed, "gamma": gamma, "followed": followed},
        )
        for seed in range(config["seeds"])
        for followed in config["followed"]
        for gamma in (*config["gammas"], config["loose"])
    ]


def work(config: dict[str, Any], seed: int, gamma: float, followed: str) -> list[Row]:
    """The row of a training: where λ went, and the share of the units within γ on images that it has not seen.

    λ follows the units of the ``"training"`` batch, whose hinge is minimised, or those of a ``"validation"`` batch.
    """
    import torch

    from .. import bounded
    from ..digits.data import load
    from ..digits.training import nominal

    digits = load(seed, tuple(config["sizes"]))
    path: list[dict[str, float]] = []

    def note(step: int, multiplier: Multiplier) -> None:
        if step % config["every"] == 0 and multiplier.facts:
            path.append({"step": step, **multiplier.facts})

    policy, multiplier = bounded.train(
        config, seed, digits, "aligned", gamma, followed=followed, on_step=note
    )
    assert multiplier is not None
    held_out = torch.Generator().manual_seed(4000 + seed)
    facts: Row = {"seed": seed, "gamma": gamma, "followed": followed, **multiplier.facts}
    for name, part in (("train", digits.train), ("held_out", digits.test)):
        (roots,) = bounded.roots(config, policy, part, held_out, "aligned")
        facts[f"within_{name}"] = float((roots <= gamma).double().mean())
        facts[f"quantile_{name}"] = bounded.quantile_of(roots, config["quantile"])
    return [facts | {"nominal": nominal(policy, digits.test)["nominal"], "path": path}]


EXPERIMENT = Experiment("constraint", configured(__file__), tasks, work, report)
