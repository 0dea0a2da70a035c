"""The constraint: what λ follows, where it ends, that it is the same however it is run."""

from __future__ import annotations

import copy
import dataclasses
import math
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from training.tiny_lm import ATTACK, VOCABULARY, fit_config, plain, quiet, sequences, sgd, tiny_lm, vector

from aajr_kernels.method import ascend, trajectory_baseline, trajectory_penalty
from aajr_kernels.training import (
    Constraint,
    Linear,
    NonFiniteLossError,
    Objective,
    ObjectiveConfig,
    Penalty,
    Share,
    gamma_for_step,
    read_rows,
)

ROOT = Path(__file__).parents[2]


def counting(count: int = 4, batch: int = 16, length: int = 12) -> list[torch.Tensor]:
    """Token ids that go up by one: they can be learnt, and the output becomes steep."""
    starts = [torch.arange(batch) + 3 * n for n in range(count)]
    return [(s.unsqueeze(1) + torch.arange(length)) % VOCABULARY for s in starts]


def trained(penalty: Penalty, steps: int = 150, **options):
    """Rows of a training that ends at a rate of 0."""
    settings = dict(steps=steps, attack=ATTACK, penalty=penalty, learning_rate=Linear(0.02, 0.0, steps))
    return quiet(tiny_lm(), counting(), fit_config(**(settings | options))).rows


# -- where it ends --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def free() -> float:
    """The 95 % quantile of √q without a penalty."""
    model = tiny_lm()
    quiet(
        model,
        counting(),
        fit_config(steps=150, attack=ATTACK, penalty=Penalty("none"), learning_rate=Linear(0.02, 0.0, 150)),
    )
    return float(roots(model).quantile(0.95))


def roots(model: nn.Module) -> torch.Tensor:
    """√q of all tokens at all steps of their ascents."""
    found = []
    for ids in counting():
        x = model.embedding(ids).detach()
        loss = lambda x, ids=ids: nn.functional.cross_entropy(
            model(x).mT, ids.roll(-1, 1), reduction="none"
        ).mean(1)
        traj = ascend(loss, x, radius=0.5, steps=2, step_size=0.3, scope="token", module=model)
        with torch.no_grad():
            _, aux = trajectory_penalty(model, x, traj)
        found.append(aux.units.flatten())
    return torch.cat(found).sqrt()


@pytest.mark.parametrize("share", [0.3, 0.6])
def test_a_bound_that_binds_is_met(share, free):
    gamma, model = share * free, tiny_lm()
    penalty = Constraint(gamma=gamma, window=500)
    settings = fit_config(steps=150, attack=ATTACK, penalty=penalty, learning_rate=Linear(0.02, 0.0, 150))
    rows = quiet(model, counting(), settings).rows
    within = float((roots(model) <= gamma).float().mean())
    assert 0.91 <= within <= 0.99 and rows[-1]["binding"] == 1.0
    assert 0.02 < sum(row["violation"] for row in rows[-20:]) / 20 < 0.08


def test_a_bound_that_does_not_bind_leaves_λ_at_its_floor(free):
    rows = trained(Constraint(gamma=3 * free, weight=0.5, rate=0.1))
    assert rows[-1]["multiplier"] == pytest.approx(0.5 / 1e3) and rows[-1]["binding"] == 0.0
    assert rows[-1]["violation"] <= 0.05


def test_a_bound_that_cannot_be_met_is_reported_and_the_training_goes_on(tmp_path):
    penalty = Constraint(gamma=1e-6, weight=1.0, span=2.0, window=20, rate=0.5)
    settings = fit_config(steps=6, attack=ATTACK, penalty=penalty, learning_rate=1e-3)
    pytest.importorskip("safetensors")
    with pytest.warns(RuntimeWarning, match=r"not met at step 2: 100.0% of the units .* where 5.0% may be"):
        rows = quiet(tiny_lm(), counting(), settings, out=tmp_path).rows
    assert len(rows) == 6 and rows[-1]["multiplier"] == pytest.approx(2.0)
    page = (tmp_path / "report.md").read_text()
    assert (
        "was not met at step 6: 100.0% of the units were above γ where 5.0% may be; λ = 2, above its floor"
        in page
    )
    assert "| violation | 1 | 1 |" in page


# -- what λ follows -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("every", [1, 3])
def test_λ_is_the_integral_of_the_violations(every):
    """By hand from the shares of the steps, each of 22 tokens: a window of 50 is three steps with a penalty."""
    penalty = Constraint(gamma=0.25, weight=0.3, window=50, rate=0.2, span=10.0, quantile=0.6, every=every)
    model = tiny_lm()
    rows = quiet(model, counting(batch=2), plain(steps=24, penalty=penalty), optimizer=sgd(model, 0.3)).rows
    log, seen = 0.0, []
    for row in rows:
        if row["step"] % every:
            assert row["weight"] == 0.0 and "penalty" not in row
            continue
        assert row["weight"] == pytest.approx(every * 0.3 * math.exp(log), rel=1e-6)
        seen = [*seen, row["active"]][-3:]
        if len(seen) == 3:
            error = (sum(seen) / 3 - 0.4) / 0.4
            log = max(-math.log(10), min(math.log(10), log + 0.2 * min(error, 1.0)))
        assert row["multiplier"] == pytest.approx(0.3 * math.exp(log), rel=1e-6)
        assert row["violation"] == pytest.approx(sum(seen) / len(seen), rel=1e-6)
    assert len({row.get("multiplier") for row in rows}) > 4


def test_the_gradient_is_that_of_the_hinge():
    """In float64, of the same trajectory: loss + λ · mean relu(√q − γ)."""
    model, (ids,) = tiny_lm().double(), counting(1, batch=3, length=5)
    objective = ObjectiveConfig(
        attack=ATTACK, penalty=Constraint(gamma=0.1, weight=0.7, steps="last"), share_context=False
    )
    Objective(model, objective)(ids).total.backward()
    actual = torch.cat([p.grad.flatten() for p in model.parameters()])
    by_hand = copy.deepcopy(model)
    by_hand.zero_grad()
    x, labels = by_hand.embedding(ids), ids.roll(-1, 1).index_fill(1, torch.tensor([4]), -100)

    def forward(x):
        before = x.cumsum(1) / torch.arange(1, 6).to(x).unsqueeze(-1)
        return by_hand.head(torch.tanh(by_hand.up(x + torch.tanh(by_hand.mix(before)))))

    cross_entropy = lambda x: nn.functional.cross_entropy(forward(x).mT, labels, reduction="none")
    row_losses = lambda x: cross_entropy(x).sum(1) / 4
    traj = ascend(row_losses, x.detach(), radius=0.5, steps=2, step_size=0.3, scope="token", module=by_hand)
    z, z_tan = torch.func.jvp(forward, (traj.points[1] + x - x.detach(),), (traj.directions[1],))
    p = z.softmax(-1)
    centred = z_tan - (p * z_tan).sum(-1, keepdim=True)
    root = (p * centred.square()).sum(-1)[:, :4].sqrt()
    assert (root > 0.1).any() and (root < 0.1).any()
    worst = cross_entropy(traj.worst + x - x.detach()).sum() / 12
    (worst + 0.7 * torch.relu(root - 0.1).mean()).backward()
    torch.testing.assert_close(
        actual, torch.cat([p.grad.flatten() for p in by_hand.parameters()]), rtol=1e-10, atol=1e-12
    )


@pytest.mark.parametrize("method", ["aligned", "spectral", "frobenius", "input_gradient"])
def test_units_of_every_method_are_those_of_its_penalty(method):
    model, (ids,) = tiny_lm(), counting(1, batch=3)
    objective = Objective(
        model, ObjectiveConfig(attack=ATTACK, penalty=Constraint(method, gamma=0.2, weight=1.0, window=1))
    )
    seen = []
    objective.multiplier.add = lambda step, loss, penalty, units, gamma: seen.append((penalty, units, gamma))
    terms = objective(ids)
    ((penalty, units, gamma),) = seen
    of_rows = method != "aligned"  # sequences, or rows of a loss
    assert units.shape[-1] == (3 if of_rows else 36) and int((~units.isnan()).sum()) == (3 if of_rows else 33)
    assert gamma == 0.2 and "units" not in terms.parts
    expected = torch.relu(units[~units.isnan()].sqrt() - 0.2).mean()
    torch.testing.assert_close(penalty, expected.to(penalty), rtol=1e-5, atol=1e-7)


def test_units_of_a_trajectory_are_nan_where_masked():
    model, (ids,) = tiny_lm(), counting(1, batch=3, length=4)
    x = model.embedding(ids).detach()
    traj = ascend(lambda x: model(x).square().mean((1, 2)), x, radius=0.5, steps=2, scope="token")
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]])
    for size in (1, 2):
        _, aux = trajectory_penalty(model, x, traj, mask=mask, batch_steps=size)
        assert aux.units.shape == (2, 1, 12) and torch.equal(aux.units.isnan()[1, 0], mask.flatten() == 0)
        torch.testing.assert_close(aux.units.nanmean(-1), aux.q)
    _, aux = trajectory_baseline(
        "spectral", model, traj, mask=mask, generator=torch.Generator().manual_seed(0)
    )
    assert aux["units"].shape == (2, 1, 3) and aux["units"].isnan().tolist() == [[[False, False, True]]] * 2


# -- the same however it is run -------------------------------------------------------------------------------------

MOVING = Constraint(gamma=Share(0.5), window=60, rate=0.3, every=2, rows=0.5)


@pytest.mark.parametrize("stop", [2, 9], ids=["while it looks for gamma", "while λ moves"])
def test_a_resumed_training_goes_on_bit_by_bit(stop, tmp_path):
    pytest.importorskip("safetensors")

    class Stop(Exception):
        pass

    def at(row):
        if row["step"] == stop + 1:
            raise Stop

    settings = fit_config(
        steps=16, attack=ATTACK, penalty=MOVING, accumulate=2, learning_rate=1e-2, checkpoint_every=stop
    )
    straight, again = tiny_lm(dropout=0.2), tiny_lm(dropout=0.2, seed=5)
    expected = quiet(straight, counting(), settings).rows
    with pytest.raises(Stop):
        quiet(tiny_lm(dropout=0.2), counting(), settings, out=tmp_path, on_step=at)
    result = quiet(again, counting(), settings, out=tmp_path)
    assert result.resumed_from == stop and torch.equal(vector(again), vector(straight))
    timeless = [{k: v for k, v in row.items() if k != "seconds"} for row in result.rows]
    assert timeless == [{k: v for k, v in row.items() if k != "seconds"} for row in expected]
    assert len({row.get("multiplier") for row in expected}) > 4 and read_rows(tmp_path / "metrics.jsonl")


def accumulated(objective: Objective, optimizer, micro_batches, step: int) -> None:
    """A step of the optimizer from the gradients of all micro-batches."""
    counts = objective.counts(micro_batches)
    for part, batch in enumerate(micro_batches):
        objective(batch, counts=counts, step=step, part=part).total.backward()
    optimizer.step()
    optimizer.zero_grad()


def test_micro_batches_have_the_λ_of_one_batch():
    penalty = dataclasses.replace(MOVING, rows=1.0, every=1, steps="worst", window=100)
    wholes, splits = [], []
    for rows, count in ((wholes, 1), (splits, 4)):
        model = tiny_lm().double()
        objective = Objective(model, ObjectiveConfig(attack=ATTACK, penalty=penalty))
        optimizer = sgd(model, 0.3)
        for step, ids in enumerate(counting() + counting()):
            accumulated(objective, optimizer, ids.chunk(count), step)
            rows.append(objective.scheduled(step + 1).weight)
    assert splits == pytest.approx(wholes, rel=1e-9) and len(set(wholes)) > 5


def test_a_shared_context_has_the_λ_of_none():
    from integrations.transformers.subjects import tiny

    pytest.importorskip("transformers")
    batch = {"input_ids": torch.arange(24).view(2, 12) % 31, "attack_mask": torch.ones(2, 12).long()}
    batch["attack_mask"][:, :6] = 0
    seen = []
    for share_context in (True, False):
        model = tiny("llama").double()
        penalty = Constraint(gamma=0.05, weight=0.1, window=10, rate=0.3, steps="last")
        config = ObjectiveConfig(attack=ATTACK, penalty=penalty, share_context=share_context)
        objective = Objective(model, config)
        for step in range(3):
            objective(batch, step=step)
        seen.append((objective.scheduled(3).weight, objective.multiplier.violation))
    assert seen[0] == pytest.approx(seen[1], rel=1e-9) and seen[0][0] != 0.1


WORKER = """
import sys, torch
from torch.nn.parallel import DistributedDataParallel
from training.test_constraint import in_a_loop, counting
torch.set_num_threads(1)
torch.distributed.init_process_group("gloo")
rank = torch.distributed.get_rank()
torch.save(in_a_loop(DistributedDataParallel, rank), sys.argv[1] + f"/{rank}.pt")
torch.distributed.destroy_process_group()
"""


def in_a_loop(wrap=None, rank: int = 0) -> list[float]:
    """λ after every step, of two micro-batches on each of two processes or of four in one."""
    model = tiny_lm().double()
    wrapped = model if wrap is None else wrap(model)
    penalty = dataclasses.replace(MOVING, rows=1.0, every=1, steps="worst", window=100)
    objective, weights = Objective(wrapped, ObjectiveConfig(attack=ATTACK, penalty=penalty)), []
    optimizer = sgd(model, 0.3)
    for step, ids in enumerate(counting()):
        micro = ids.split([3, 5, 4, 4])
        ours = micro if wrap is None else micro[2 * rank : 2 * rank + 2]
        accumulated(objective, optimizer, ours, step)
        weights.append(objective.scheduled(step + 1).weight)
    return [*weights, objective.state_dict()["multiplier"]["log"]]


@pytest.mark.slow
def test_two_processes_have_the_λ_of_one(tmp_path):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = str(unused.getsockname()[1])
    workers = []
    for rank in range(2):
        environment = dict(
            MASTER_ADDR="127.0.0.1", MASTER_PORT=port, WORLD_SIZE="2", RANK=str(rank), OMP_NUM_THREADS="1"
        )
        environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
        command = [sys.executable, "-W", "ignore", "-c", WORKER, str(tmp_path)]
        workers.append(subprocess.Popen(command, env={**os.environ, **environment}))
    try:
        assert [worker.wait(timeout=200) for worker in workers] == [0, 0]
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert first == second and len(set(first)) > 3
    assert first == pytest.approx(in_a_loop(), rel=1e-9)


# -- the gradient of the penalty, clipped apart ---------------------------------------------------------------------


def test_the_penalty_is_clipped_apart():
    """By hand: each gradient scaled to its own limit, and then their sum."""
    options = dict(attack=ATTACK, learning_rate=1.0)
    penalty = Constraint(gamma=0.01, weight=3.0, steps="last")

    def gradient(**weights) -> torch.Tensor:
        model = tiny_lm().double()
        objective = Objective(model, ObjectiveConfig(attack=ATTACK, **weights))
        for part, batch in enumerate(counting(2)):
            objective(batch, counts=objective.counts(counting(2)), part=part).total.backward()
        return torch.cat(
            [p.grad.flatten() if p.grad is not None else 0 * p.flatten() for p in model.parameters()]
        ).detach()

    of_loss = gradient(penalty=Penalty("none"))
    of_penalty = gradient(penalty=penalty) - of_loss
    model = tiny_lm().double()
    before = vector(model)
    settings = plain(**options, penalty=penalty, accumulate=2, clip_norm=0.02, penalty_clip_norm=0.05)
    (row,) = quiet(model, counting(2), settings, optimizer=sgd(model)).rows
    expected = 0.02 * of_loss / of_loss.norm() + 0.05 * of_penalty / of_penalty.norm()
    torch.testing.assert_close(before - vector(model), expected, rtol=1e-4, atol=1e-8)
    assert row["gradient_norm"] == pytest.approx(float(of_loss.norm()))
    assert row["penalty_gradient_norm"] == pytest.approx(float(of_penalty.norm()))
    free = dataclasses.replace(settings, clip_norm=None, penalty_clip_norm=1e9)
    model = tiny_lm().double()
    quiet(model, counting(2), free, optimizer=sgd(model))
    torch.testing.assert_close(before - vector(model), of_loss + of_penalty, rtol=1e-9, atol=1e-12)


# -- numbers of a step, bad input -----------------------------------------------------------------------------------


def test_gamma_for_step():
    """L_out γ² + C = 1/η; none where C is larger."""
    assert gamma_for_step(0.01, 19.0, 0.5) == pytest.approx(math.sqrt((100 - 19) / 0.5))
    assert gamma_for_step(0.01, 0.0) == pytest.approx(10.0)
    assert gamma_for_step(0.01, 100.5) is None
    with pytest.raises(ValueError, match="step_size must be positive, got 0"):
        gamma_for_step(0, 1.0)
    with pytest.raises(ValueError, match="second_order must be a finite number >= 0, got -1"):
        gamma_for_step(0.1, -1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: Constraint(),
            "gamma of a Constraint must be a positive number, a schedule or a Share, got None",
        ),
        (lambda: Constraint(gamma=0), "gamma of a Constraint must be > 0, got 0"),
        (lambda: Constraint(gamma=-1.0), "gamma must be finite and >= 0 at every step, got -1.0"),
        (lambda: Constraint(gamma=Share(0.0)), "gamma of a Constraint must be > 0, got 0.0"),
        (lambda: Constraint(gamma=1.0, quantile=1.0), r"quantile must be in \(0, 1\), got 1.0"),
        (lambda: Constraint(gamma=1.0, quantile=0), r"quantile must be in \(0, 1\), got 0"),
        (lambda: Constraint(gamma=1.0, rate=0.0), "rate must be positive, got 0.0"),
        (lambda: Constraint(gamma=1.0, span=1.0), "span must be larger than 1, got 1.0"),
        (lambda: Constraint(gamma=1.0, window=0), "window must be an integer >= 1, got 0"),
        (lambda: Constraint("none", gamma=1.0), "method of a Constraint must measure something, got 'none'"),
        (
            lambda: Constraint(gamma=1.0, form="squared"),
            "form of a Constraint must be 'hinge', got 'squared'",
        ),
        (
            lambda: Penalty(gamma=Share()),
            "gamma must be a number or a function from the step to one, got Share",
        ),
        (lambda: Share(-0.1), "share must be finite and >= 0 at every step, got -0.1"),
        (lambda: Share(within=0), "within must be an integer >= 1, got 0"),
        (
            lambda: ObjectiveConfig(adversarial_weight=0.0),
            r"weight must be a number where no loss has a weight to be a share of, got Share\(share=0.1",
        ),
        (
            lambda: Objective(tiny_lm(), ObjectiveConfig()).penalty(sequences(1)[0]),
            "weight must be a number where no loss",
        ),
        (
            lambda: fit_config(steps=1, penalty_clip_norm=0),
            "penalty_clip_norm must be positive or None, got 0",
        ),
        (
            lambda: quiet(tiny_lm(), sequences(1), plain(penalty=Constraint(gamma=lambda step: 0.0))),
            "gamma of a Constraint must be > 0 at every step, got 0.0 at step 0",
        ),
    ],
)
def test_bad_input(call, message):
    with pytest.raises((TypeError, ValueError), match=message) as caught:
        call()
    assert str(caught.value).count(". ") == 0


def test_a_step_that_is_not_taken_moves_nothing():
    good, bad = counting(1)[0], {"inputs_embeds": torch.full((16, 12, 6), math.nan), "labels": counting(1)[0]}
    penalty = Constraint(gamma=0.01, weight=1.0, window=10)
    rows = quiet(tiny_lm(), [good, bad, good], plain(steps=3, penalty=penalty, non_finite="skip")).rows
    assert rows[0]["multiplier"] == rows[1]["multiplier"] < rows[2]["multiplier"]
    with pytest.raises(NonFiniteLossError, match="norm of the embedded tokens is nan"):
        quiet(tiny_lm(), [bad], fit_config(steps=1))
