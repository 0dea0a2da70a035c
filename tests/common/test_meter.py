"""Peaks of memory: what is touched between two looks is seen, and what was touched before is not."""

from __future__ import annotations

import time

import pytest
import torch

from common import meter

MEGABYTE = 1 << 20
pytestmark = pytest.mark.skipif(not meter._STATM.exists(), reason="this system has no /proc/self/statm")


def test_spread_is_that_of_the_median():
    assert meter.spread([2.0, 3.0, 9.0]) == pytest.approx(0.5)
    assert meter.spread([2.0]) is None


def touch(megabytes: int) -> None:
    held = torch.ones(megabytes * MEGABYTE, dtype=torch.uint8)
    time.sleep(0.05)  # for whoever watches from the side
    del held


@pytest.mark.parametrize("marked", [True, False], ids=["high-water mark", "watched from the side"])
def test_the_peak_of_a_call(marked, monkeypatch):
    if not marked:
        monkeypatch.setattr(meter, "_CLEAR", meter._CLEAR / "nowhere")
    elif not meter._CLEAR.exists():
        pytest.skip("this system has no /proc/self/clear_refs")
    touch(200)  # gone by then
    _, cost = meter.measure(lambda: touch(100), torch.device("cpu"))
    assert cost.peak_bytes is not None
    assert 95 * MEGABYTE <= cost.peak_bytes <= 130 * MEGABYTE
