"""Fixtures of the method's tests."""

from __future__ import annotations

import pytest
from method.paths import small_policy
from torch import nn


@pytest.fixture
def policy() -> nn.Module:
    return small_policy()
