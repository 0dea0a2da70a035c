"""Errors of the method name the argument that the caller gave, what came, and what was expected."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import aajr_kernels as aajr
from aajr_kernels.method import baseline_penalty
from aajr_kernels.training import Attack, FitConfig, Linear, Penalty, WarmUp
from aajr_kernels.training.schedules import value_at

X = torch.linspace(-1.0, 1.0, 60).reshape(3, 5, 4)
NET = torch.nn.Linear(4, 4)


def _penalty(**options: Any) -> Any:
    return aajr.aligned_penalty(NET, X, X, **options)


def _loss(z: torch.Tensor) -> torch.Tensor:
    return z.square().sum((1, 2))


def _ascent(**options: Any) -> Any:
    return aajr.ascend(_loss, X, **(dict(radius=1.0, steps=1) | options))


CASES: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "gamma, NumPy": (lambda: _penalty(gamma=np.float32(0.1)), TypeError, "gamma must be a Python number, got float32"),
    "gamma, tensor": (lambda: _penalty(gamma=torch.tensor(0.1)), TypeError, "gamma must be a Python number, got T"),
    "gamma, text": (lambda: _penalty(gamma="1"), TypeError, "gamma must be a Python number, got str"),
    "gamma, negative": (lambda: _penalty(gamma=-1.0), ValueError, "gamma must be a finite number >= 0, got -1"),
    "denominator, text": (lambda: _penalty(denominator="3"), TypeError, "a number or a tensor, got str"),
    "denominator, vector": (
        lambda: _penalty(denominator=torch.tensor([1.0, 2.0])),
        ValueError,
        r"denominator must be a number or a tensor of one element, got shape \(2,\)",
    ),
    "denominator, zero": (lambda: _penalty(denominator=0), ValueError, "denominator must be positive, got 0"),
    "project, integers": (
        lambda: _ascent(project=lambda z: z.int()),
        TypeError,
        r"project must return a floating-point perturbation, got torch\.int32",
    ),
    "option of trajectory_penalty": (
        lambda: aajr.trajectory_penalty(NET, X, _ascent(), bogus=1),
        TypeError,
        r"trajectory_penalty\(\) has no option bogus",
    ),
    "weights, text": (
        lambda: aajr.trajectory_penalty(NET, X, _ascent(), weights="x"),
        TypeError,
        "weights must be 1 finite numbers >= 0 with a positive sum, got 'x'",
    ),
    "weights, a number": (lambda: aajr.trajectory_penalty(NET, X, _ascent(), weights=1.0), ValueError, "weights must"),
    "batch_steps, NumPy": (
        lambda: aajr.trajectory_penalty(NET, X, _ascent(), batch_steps=np.int64(1)),
        TypeError,
        r"batch_steps must be a Python integer, got int64: pass int\(batch_steps\)\.",
    ),
    "penalty_weight, text": (
        lambda: aajr.trajectory_penalty(NET, X, _ascent(), penalty_weight="1"),
        TypeError,
        "penalty_weight must be a number or a tensor, got str",
    ),
    "penalty_weight, nan": (
        lambda: _penalty(penalty_weight=float("nan")),
        ValueError,
        "penalty_weight must be a finite number, got nan",
    ),
    "denominator, inf": (
        lambda: _penalty(denominator=float("inf")),
        ValueError,
        "denominator must be a finite number, got inf",
    ),
    "penalty_weight, array": (
        lambda: _penalty(penalty_weight=np.ones(2)),
        TypeError,
        "penalty_weight must be a number or a tensor, got ndarray",
    ),
    "denominator, Dual": (
        lambda: _penalty(denominator=aajr.dual(X, X).sum()),
        TypeError,
        r"denominator must be a number or a tensor, got Dual: pass y\.primal",
    ),
    "steps, NumPy": (
        lambda: aajr.ascend(_loss, X, radius=1.0, steps=np.int64(1)),
        TypeError,
        r"steps must be a Python integer, got int64: pass int\(steps\)\.",
    ),
    "restarts, tensor": (
        lambda: _ascent(restarts=torch.tensor(2)),
        TypeError,
        r"restarts must be a Python integer, got Tensor: pass int\(restarts\)\.",
    ),
    "radius, array": (
        lambda: aajr.ascend(_loss, X, radius=np.ones(3), steps=1),
        TypeError,
        "radius must be a number or a floating point tensor, got ndarray",
    ),
    "samples of a report": (
        lambda: aajr.stability_report(_loss, X, _ascent(), samples=np.int32(2)),
        TypeError,
        r"samples must be a Python integer, got int32: pass int\(samples\)\.",
    ),
    "gamma of a report": (
        lambda: aajr.stability_report(_loss, X, _ascent(), func=NET, gamma=torch.tensor(0.1)),
        TypeError,
        r"gamma must be a Python number, got Tensor: pass float\(gamma\)\.",
    ),
    "tolerance of a report": (
        lambda: aajr.stability_report(_loss, X, _ascent(), tolerance="1"),
        TypeError,
        r"tolerance must be a Python number, got str\.",
    ),
    "iterations of a baseline": (
        lambda: baseline_penalty("spectral", NET, X, iterations=torch.tensor(1)),
        TypeError,
        r"iterations must be a Python integer, got Tensor: pass int\(iterations\)\.",
    ),
    "h of a baseline": (
        lambda: baseline_penalty("finite_difference", NET, X, X, h="1"),
        TypeError,
        r"h must be a Python number, got str\.",
    ),
    "gamma of a baseline": (
        lambda: baseline_penalty("random", NET, X, gamma="1"),
        TypeError,
        "gamma must be a Python number, got str",
    ),
    "form of a baseline": (
        lambda: baseline_penalty("random", NET, X, gamma=0.1, form="bogus"),
        ValueError,
        "form must be one of squared, hinge, hinge2, got 'bogus'",
    ),
    "denominator of a baseline": (
        lambda: baseline_penalty("random", NET, X, denominator=torch.ones(2)),
        ValueError,
        r"denominator must be a number or a tensor of one element, got shape \(2,\)",
    ),
    "schedule": (lambda: Linear(0.0, np.float32(1), 5), TypeError, r"end must be a Python number, .* float\(end\)\."),
    "schedule, value": (
        lambda: value_at(lambda step: "1", 7, "radius"),
        TypeError,
        r"radius must be a number at every step, got str at step 7\.",
    ),
    "schedule, steps": (lambda: WarmUp(torch.tensor(5), 1.0), TypeError, r"steps must be a Python number, got Tensor"),
    "betas, one": (lambda: FitConfig(3, betas=0.9), TypeError, r"betas must be two numbers, got 0\.9"),
    "steps of a training": (lambda: FitConfig(np.int64(3)), TypeError, r"pass int\(steps\)\."),
    "clip_norm": (lambda: FitConfig(3, clip_norm="1"), TypeError, "clip_norm must be a Python number, got str"),
    "betas": (lambda: FitConfig(3, betas=(0.9, np.float32(1))), TypeError, r"pass float\(betas\[1\]\)\."),
    "radius of a training": (
        lambda: Attack(radius=np.float32(1)),
        TypeError,
        r"radius must be a number or a function from the step to one, got float32: pass float\(radius\)\.",
    ),
    "step_size of a training": (
        lambda: Attack(step_size=torch.tensor(0.1)),
        TypeError,
        r"step_size must be a Python number, got Tensor: pass float\(step_size\)\.",
    ),
    "step_size of a training, text": (lambda: Attack(step_size="big"), ValueError, "step_size must be 'auto' or a pos"),
    "samples of a training": (lambda: Penalty(samples=np.int64(2)), TypeError, r"pass int\(samples\)\."),
    "as_tensor": (lambda: torch.as_tensor(aajr.dual(X, X)), TypeError, "a Dual is a tensor already"),
    "tensor": (lambda: torch.tensor(aajr.dual(X, X)), TypeError, "a Dual is a tensor already"),
    "nested": (lambda: torch.nested.nested_tensor([aajr.dual(X, X)]), TypeError, "no rule for nested tensors"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_the_message_says_what_is_wrong(name: str) -> None:
    call, error, message = CASES[name]
    with pytest.raises(error, match=message):
        call()


def test_a_denominator_of_one_element_is_a_number() -> None:
    want = _penalty(denominator=3.0)
    for same in (torch.tensor(3.0), torch.tensor([3.0]), np.float64(3.0), np.float32(3.0), np.int64(3), 3):
        torch.testing.assert_close(_penalty(denominator=same), want)


@pytest.mark.parametrize("kind", [np.float32, np.float64, torch.tensor])
def test_lengths_may_be_scalars_of_numpy_and_tensors(kind: Callable[[float], Any]) -> None:
    want = _ascent(radius=0.5, step_size=0.25)
    same = _ascent(radius=kind(0.5), step_size=kind(0.25))
    assert torch.equal(want.points, same.points) and same.radius == 0.5
    assert torch.equal(_ascent(radius=np.int64(2)).points, _ascent(radius=2.0).points)


def test_weights_may_come_from_numpy() -> None:
    way = _ascent(steps=2)
    want, _ = aajr.trajectory_penalty(NET, X, way, weights=(1.0, 3.0))
    for same in (np.array([1, 3]), [np.float32(1), np.float64(3)], [torch.tensor(1.0), torch.tensor(3)]):
        torch.testing.assert_close(aajr.trajectory_penalty(NET, X, way, weights=same)[0], want)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # by Dynamo
def test_a_denominator_that_changes_is_checked_in_one_graph() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(_penalty, backend="eager", fullgraph=True, dynamic=True)
    for denominator in (3, 4, 2.5):
        torch.testing.assert_close(compiled(denominator=denominator), _penalty(denominator=denominator))
