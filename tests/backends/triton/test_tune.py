"""Tuning without a device: candidates run in the interpreter against a clock that is made up."""

from __future__ import annotations

import pytest
import torch
from ops.suite import Target
from typer.testing import CliRunner

from aajr_kernels.ops.attention import configs
from bench import tune
from common.command import application

interpreted = pytest.mark.skipif(
    Target("triton").why_not("attention") is not None or torch.cuda.is_available(),
    reason="needs Triton's interpreter",
)


@interpreted
@pytest.mark.parametrize("kernel", ["fwd", "dkv"])
def test_times_of_the_candidates_that_are_right(kernel, monkeypatch):
    monkeypatch.setattr(tune, "HEADS", 2)
    monkeypatch.setattr(tune, "KEY_HEADS", 1)
    clock = iter([3.0, 1.0, 2.0])
    tried = [(64, 64, 1, 1), (32, 64, 1, 1), (48, 32, 1, 1), (64, 32, 1, 1)]  # 48 is no power of two
    results = tune.measure(
        kernel, 16, True, tried, length=70, dtype=torch.float32, device="cpu", timer=lambda call: next(clock)
    )
    times = {tile: time for tile, time in results.items() if isinstance(time, float)}
    assert min(times, key=times.get) == (32, 64, 1, 1) and list(times.values()) == [3.0, 1.0, 2.0]
    assert set(results) - set(times) == {(48, 32, 1, 1)}


def test_a_trial_ends_with_its_block():
    usual = configs.tile("fwd", "sm_90", torch.bfloat16, 64, 64, True)
    with configs.trial("fwd", (32, 64, 1, 1)):
        assert configs.tile("fwd", "sm_90", torch.bfloat16, 64, 64, True) == configs.Tile(32, 64, 1, 1)
        assert configs.tile("dq", "sm_90", torch.bfloat16, 64, 64, True) != configs.Tile(32, 64, 1, 1)
    assert configs.tile("fwd", "sm_90", torch.bfloat16, 64, 64, True) == usual


@interpreted
def test_a_wrong_candidate_is_left_out(monkeypatch):
    monkeypatch.setattr(tune, "HEADS", 1)
    monkeypatch.setattr(tune, "KEY_HEADS", 1)
    monkeypatch.setattr(tune, "difference", lambda results, expected: 0.5)
    results = tune.measure(
        "fwd",
        16,
        False,
        [(32, 32, 1, 1)],
        length=5,
        dtype=torch.float32,
        device="cpu",
        timer=lambda call: 1.0,
    )
    assert "differs from the default" in results[(32, 32, 1, 1)]


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "gfx942"])
@pytest.mark.parametrize("kernel", tune.NEEDS)
def test_candidates_are_few_and_sensible(kernel, arch):
    tiles = list(tune.candidates(kernel, arch))
    assert 10 < len(tiles) < 60 and len(set(tiles)) == len(tiles)
    assert all((m >= n) == (kernel in tune.QUERY_SIDE) or m == n for m, n, _, _ in tiles)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
def test_without_a_device_the_command_says_what_to_do():
    result = CliRunner().invoke(application(tune.tune), [])
    assert result.exit_code == 2 and "CUDA or ROCm device" in result.output
