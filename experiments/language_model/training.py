"""Training by :func:`aajr_kernels.training.fit`, the same for all methods up to what is penalised."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor, nn

from aajr_kernels.training import Attack, Cosine, FitConfig, ObjectiveConfig, Penalty, WarmUp, fit

from .text import in_turns, windows

#: method -> what fit calls it; all in the Fisher metric, at every row's worst point
PENALTIES = {
    "adversarial": "none",
    "random": "random",
    "frobenius": "frobenius",
    "spectral": "spectral",
    "aajr": "aligned",
}


def batches_of(config: dict[str, Any], source: Tensor, count: int, seed: int) -> list[dict[str, Tensor]]:
    """Training batches in turns; they depend only on the seed."""
    generator = torch.Generator().manual_seed(1000 + seed)
    drawn = (windows(source, config["batch"], config["length"], generator) for _ in range(count))
    return [in_turns(ids, config["turn"]) for ids in drawn]


def pretrain(config: dict[str, Any], model: nn.Module, source: Tensor, seed: int) -> None:
    """Plain training on every token of random windows."""
    settings = config["pretraining"]
    generator = torch.Generator().manual_seed(2000 + seed)
    steps, rate = settings["steps"], settings["learning_rate"]
    drawn = [windows(source, settings["batch"], config["length"], generator) for _ in range(steps)]
    fit_config = FitConfig(
        steps=steps,
        objective=ObjectiveConfig(penalty=Penalty(method="none"), adversarial_weight=0.0, clean_weight=1.0),
        learning_rate=WarmUp(20, Cosine(rate, rate / 10, steps)),
        seed=seed,
    )
    fit(model, drawn, fit_config, progress=False)


def tune(
    config: dict[str, Any],
    model: nn.Module,
    batches: list[dict[str, Tensor]],
    seed: int,
    method: str,
    *,
    mix: float,
    weight: float,
    every: int = 1,
) -> dict[str, Any]:
    """Train on (clean + w · adversarial) / (1 + w) + λ · penalty.

    Args:
        config: of the part of the experiment.
        model: trained in place.
        batches: one for every step, of the same number for all methods.
        seed: of random directions.
        method: one of :data:`PENALTIES`.
        mix: w; 0 is training without an adversary.
        weight: λ.
        every: k of ``Penalty(every=k)``.

    Returns:
        ``first`` and ``last``: mean clean loss, adversarial loss and penalty in the first and last fifth of the steps
        (None for what there is not); ``seconds_per_step``: median processor time; ``skipped``: steps that were not
        finite and not taken.
    """
    rows, clock = [], [time.process_time()]

    def on_step(row: dict[str, Any]) -> None:
        now = time.process_time()
        rows.append(row | {"own": now - clock[0]})
        clock[0] = now

    settings = _settings(config, seed, method, mix, weight, len(batches), every)
    fit(model, batches, settings, on_step=on_step, progress=False)
    tail = max(len(rows) // 5, 1)
    return {
        "first": _means(rows[:tail]),
        "last": _means(rows[-tail:]),
        "seconds_per_step": sorted(row["own"] for row in rows)[len(rows) // 2],
        "skipped": rows[-1]["skipped"],
    }


def penalty_at_start(
    config: dict[str, Any], model: nn.Module, batches: list[dict[str, Tensor]], seed: int, method: str
) -> tuple[float, float]:
    """Mean penalty and mean objective without it over the batches, by the training step at a learning rate of 0."""
    still = config | {"learning_rate": 0.0}
    rows = fit(model, batches, _settings(still, seed, method, 1.0, 1.0, len(batches)), progress=False).rows
    penalty = sum(row["penalty"] for row in rows) / len(rows)
    return penalty, sum(row["clean_loss"] + row["adversarial_loss"] for row in rows) / (2 * len(rows))


def _settings(
    config: dict[str, Any], seed: int, method: str, mix: float, weight: float, steps: int, every: int = 1
) -> FitConfig:
    inner = config["inner"]
    return FitConfig(
        steps=steps,
        objective=ObjectiveConfig(
            attack=Attack(
                radius=config["radius"],
                relative=True,
                steps=inner["steps"],
                step_size=inner["step"] * config["radius"],
                scope="token",
            ),
            penalty=Penalty(
                method=PENALTIES[method],
                weight=weight,
                steps="worst",
                iterations=config["power_iterations"],
                tokens="loss",
                unit="token",
                every=every,
            ),
            clean_weight=1 / (1 + mix),
            adversarial_weight=mix / (1 + mix),
        ),
        learning_rate=WarmUp(5, config["learning_rate"]),
        seed=seed,
        non_finite="skip",
    )


def _means(rows: list[dict[str, Any]]) -> dict[str, float | None]:
    means: dict[str, float | None] = {}
    for name in ("clean_loss", "adversarial_loss", "penalty"):
        values = [row[name] for row in rows if row.get(name) is not None]
        means[name] = sum(values) / len(values) if values else None
    return means
