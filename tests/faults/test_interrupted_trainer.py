"""A killed AAJRTrainer goes on to the same bits, or an error names its last checkpoint."""

from __future__ import annotations

import dataclasses
import os
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from faults.children import DIED, Child, Points

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from integrations.trainer.trainers import CONFIG, Rows, gpt2, rows_of, trained
from transformers.trainer_utils import get_last_checkpoint

from aajr_kernels.integrations.trainer import AAJRTrainer
from aajr_kernels.integrations.trainer.mixins import STATE
from aajr_kernels.training import Constraint, Share
from common.trust import count

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
STEPS = 4
CONSTRAINT = Constraint(gamma=Share(0.5), window=8, rate=0.5)


def whole_run(out: Path, seed: int = 3, resume: str | None = None, penalty: Constraint = CONSTRAINT):
    model = gpt2(dropout=0.2, seed=seed)
    trainer, _ = trained(
        AAJRTrainer,
        model,
        out,
        objective=dataclasses.replace(CONFIG, penalty=penalty),
        data=Rows(8),
        resume=resume,
        max_steps=STEPS,
        optim="adamw_torch",
        learning_rate=1e-2,
        save_strategy="steps",
        save_steps=1,
        save_total_limit=2,
    )
    return [p.detach() for p in model.parameters()], rows_of(trainer)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    return whole_run(tmp_path_factory.mktemp("straight"))


@pytest.fixture(scope="module")
def operations(tmp_path_factory) -> int:
    out = tmp_path_factory.mktemp("counted") / "run"

    def work() -> int:
        points = Points().operations(out)
        whole_run(out)
        return points.passed

    code, number = Child(work).result()
    assert code == 0 and int(number) > 50, number
    return int(number)


def goes_on(out: Path, straight) -> None:
    """Resume as users do: from the newest checkpoint, and without it where an error names it."""
    parameters, rows = straight
    shutil.rmtree(
        out / f"checkpoint-{STEPS}", ignore_errors=True
    )  # from the last one the trainer makes a step more
    while True:
        newest = get_last_checkpoint(str(out)) if out.exists() else None
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                resumed, resumed_rows = whole_run(out, seed=3 if newest is None else 9, resume=newest)
            break
        except (OSError, ValueError) as error:
            if newest is None or newest not in str(error):
                raise
        shutil.rmtree(newest)
    assert all(torch.equal(a, b) for a, b in zip(resumed, parameters))
    assert resumed_rows == rows


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_killed_at_any_file_operation(operations, straight, tmp_path):
    for number in range(1, operations + 1):
        out = tmp_path / str(number)

        def work(out: Path = out, number: int = number) -> None:
            Points(number).operations(out)
            whole_run(out)

        code, said = Child(work).result()
        assert code == DIED, said
        goes_on(out, straight)
        shutil.rmtree(out, ignore_errors=True)
        count("trainers", kills=1)


def test_a_checkpoint_without_the_state_of_the_objective_is_named(tmp_path):
    whole_run(tmp_path)
    newest = Path(get_last_checkpoint(str(tmp_path)))
    (newest / STATE).unlink()
    with pytest.warns(UserWarning, match=rf"There is no {newest / STATE}: the weight"):
        whole_run(tmp_path, resume=str(newest))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        whole_run(tmp_path, resume=str(newest), penalty=CONFIG.penalty)
