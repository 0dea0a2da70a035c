"""``Objective`` and ``fit`` under fully_shard against one process: cases, and for ``fit`` a folder."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from shared import VOCABULARY, begin, difference, end, gradients, layers_of, model_of, say, whole
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from aajr_kernels.training import (
    Attack,
    Constraint,
    Diagnostics,
    FitConfig,
    Objective,
    ObjectiveConfig,
    Penalty,
    Share,
    fit,
    load_checkpoint,
)
from aajr_kernels.training.wrappers import reshard

rank, world, (cases, *more) = begin()
dtype = torch.float64
ATTACK = Attack(radius=0.5, steps=2, scope="token")
BASE = ObjectiveConfig(
    attack=ATTACK,
    penalty=Penalty(weight=0.2, steps="worst"),
    adversarial_weight=0.7,
    clean_weight=0.3,
    seed=3,
)


def case_of(**penalty: Any) -> ObjectiveConfig:
    return dataclasses.replace(BASE, penalty=Penalty(**{"weight": 0.2, "steps": "worst", **penalty}))


CONFIGS = {
    "base": BASE,
    "shared": dataclasses.replace(BASE, share_context=True),
    "scored": dataclasses.replace(BASE, share_context=True),
    "rows": case_of(rows=0.5),
    "points": case_of(steps="all", batch_steps=2),
    "hinge": case_of(form="hinge", gamma=0.01),
    "diagnostics": dataclasses.replace(BASE, diagnostics=Diagnostics(every=1, smoothness=True)),
    **{name: case_of(method=name, steps="last") for name in ("finite_difference", "spectral", "cure")},
}


def model() -> nn.Module:
    """GPT-2, whose norms compute in the dtype that they are given."""
    return model_of("gpt2", dtype).train()


def sharded(plain: nn.Module) -> nn.Module:
    # HSDP with one process per shard: parameters are replicated, gradients are reduced over the replicas
    names = {"replicate": world, "shard": 1}
    mesh = init_device_mesh("cpu", (*names.values(),), mesh_dim_names=(*names,)) if "hsdp" in more else None
    for layer in layers_of(plain):
        fully_shard(layer, mesh=mesh)
    if "head" in more:
        fully_shard(plain.lm_head, mesh=mesh)
    return fully_shard(plain, mesh=mesh)


def micro_batches(step: int, case: str = "base") -> list[dict[str, Tensor]]:
    """Of every process two, of unequal lengths, with padding, and with contexts that end at different tokens."""
    generator = torch.Generator().manual_seed(step)
    batches = []
    for number in range(2 * world):
        length = 8 + number
        ids = torch.randint(VOCABULARY, (2, length), generator=generator)
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}
        batch["attention_mask"][0, length - 2 :] = 0
        if case in ("shared", "scored"):
            start = 3 + number % 2
            batch["attack_mask"] = (torch.arange(length) >= start).long().expand(2, -1)
            if case == "shared":
                batch["labels"][:, : start + 1] = -100
        batches.append(batch)
    return batches


def objective_step(objective: Objective, batches: list[dict[str, Tensor]]) -> tuple[float, float]:
    """Loss and penalty of these micro-batches."""
    counts = objective.counts(batches)
    totals, reports = [], []
    for part, batch in enumerate(batches):
        terms = objective(batch, counts=counts, step=1, part=part, on_report=reports.append)
        terms.total.backward()
        totals.append([terms.total.detach() / counts.processes, terms.parts["penalty"]])
        assert ("shared" in terms.parts) == (objective.config.share_context is True)
    assert len(reports) == (objective.config.diagnostics is not None and rank == 0)
    return torch.tensor(totals).sum(0)


def against_one(case: str) -> None:
    """All processes' micro-batches in one, in the order in which their attacks draw."""
    config, plain = CONFIGS[case], model()
    micro = micro_batches(0, case)
    alone = dataclasses.replace(config, share_context=False, diagnostics=None)
    ours = micro[rank::world]
    objective = Objective(sharded(model()), config)
    for _ in range(2):  # once more: nothing is left over
        objective.model.zero_grad()
        actual = objective_step(objective, ours)
        torch.distributed.all_reduce(actual)
        found = gradients(objective.model)
    expected = objective_step(Objective(plain, alone), micro)
    error = difference(found, gradients(plain))
    error = max(error, float(((actual - expected) / expected).abs().max()))
    say(f"objective {case}", error, dtype)


def fitted(trained: nn.Module, processes: int, config: FitConfig, **options: Any) -> list[dict[str, Any]]:
    """The rows of ``fit`` on all micro-batches of three steps, or on those of this process."""
    micro = [batch for step in range(3) for batch in micro_batches(step)]
    ours = dataclasses.replace(config, accumulate=2 * world // processes)
    own = micro[rank::world] if processes > 1 else micro
    # keys have biases, whose gradients are rounding, which Adam would scale up
    optimizer = torch.optim.AdamW(trained.parameters(), lr=1e-2, eps=1e-3)
    return fit(trained, own, ours, optimizer=optimizer, progress=False, **options).rows


def fit_against_one(folder: Path) -> None:
    """Three steps of ``fit`` with both gradients clipped; the same in two calls; the checkpoint in a whole model."""
    objective = dataclasses.replace(BASE, penalty=Penalty(weight=Share(0.3), steps="worst"))
    config = FitConfig(objective=objective, steps=3, clip_norm=0.5, penalty_clip_norm=0.05)

    def run(trained: nn.Module, processes: int, steps: int = 3, **options: Any) -> list[dict[str, Any]]:
        return fitted(trained, processes, dataclasses.replace(config, steps=steps), **options)

    plain, together = model(), sharded(model())
    expected, rows = run(plain, 1), run(together, world)
    exact = {name: p.detach() for name, p in plain.named_parameters()}
    say("fit parameters", difference(parameters(together), exact), dtype)
    begun = {name: p.detach() for name, p in model().named_parameters()}
    assert difference(parameters(together), begun) > 1e-3
    for row, alone in zip(rows, expected, strict=True):
        assert row.keys() == alone.keys() and row["gradient_norm"] > 0.5
        assert row["penalty_gradient_norm"] > 0.05 or row["weight"] == 0
        for name in (name for name in row if name != "seconds" and not name.startswith("computed_")):
            error = 0 if row[name] == alone[name] else abs(row[name] / alone[name] - 1)
            assert error <= 1e-12, (name, row[name], alone[name])

    run(sharded(model()), world, steps=2, out=folder)
    again = sharded(model())
    resumed = run(again, world, out=folder)
    whole_model = model()
    assert load_checkpoint(folder, again) == load_checkpoint(folder, whole_model) == 3
    for name, p in parameters(together).items():
        assert torch.equal(parameters(again)[name], p), name
        assert torch.equal(whole_model.get_parameter(name), p), name
    timeless = lambda row: {name: value for name, value in row.items() if name != "seconds"}
    assert list(map(timeless, resumed)) == list(map(timeless, rows))[-len(resumed) :]
    assert len(resumed) == (3 if rank == 0 else 1)
    with pytest.raises(ValueError, match=f"processes must be {world} as those that wrote"):
        run(model(), 1, steps=4, out=folder)


def fit_with_held_out_rows() -> None:
    """λ follows the held-out rows of all processes, and so do the parameters."""
    penalty = Constraint(gamma=0.05, follow="validation", rate=0.5, window=20, steps="all")
    config = FitConfig(objective=dataclasses.replace(BASE, penalty=penalty), steps=3)
    generator = torch.Generator().manual_seed(9)
    held_out = torch.randint(VOCABULARY, (3, 2 * world, 10), generator=generator)

    def run(trained: nn.Module, processes: int) -> list[dict[str, Any]]:
        rows = slice(rank, None, world) if processes > 1 else slice(None)
        measured = [{"input_ids": ids[rows], "labels": ids[rows]} for ids in held_out]
        return fitted(trained, processes, config, validation=measured)

    plain, together = model(), sharded(model())
    expected, rows = run(plain, 1), run(together, world)
    say("fit validation", difference(parameters(together), dict(plain.named_parameters())), dtype)
    for name in ("weight", "violation"):
        values = [row[name] for row in expected[1:]]  # the first step finds λ at the start
        assert [row[name] for row in rows[1:]] == pytest.approx(values, rel=1e-12), name
    assert len({row["weight"] for row in expected}) == 3


def one_process_stops_all() -> None:
    """What is not finite on one process is not taken on any."""
    config = FitConfig(objective=BASE, steps=2, non_finite="skip")
    micro = [{"inputs_embeds": torch.randn(2, 5, 32, dtype=dtype), "labels": torch.ones(2, 5).long()}] * 2
    if rank:
        micro[0] = {**micro[0], "inputs_embeds": torch.full((2, 5, 32), torch.nan, dtype=dtype)}
    result = fit(sharded(model()), micro, config, progress=False)
    assert result.skipped == 1 and result.rows[-1]["loss"] > 0


def parameters(trained: nn.Module) -> dict[str, Tensor]:
    reshard(trained)
    return {name: whole(p.detach()) for name, p in trained.named_parameters()}


for case in cases.split(","):
    if case == "fit":
        fit_against_one(Path(more[0]))
        one_process_stops_all()
        fit_with_held_out_rows()
    else:
        against_one(case)
end()
