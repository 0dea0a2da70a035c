"""Fixtures of the kernel tests: a capability at a time, and the native module or the reason why it is missing."""

from __future__ import annotations

from types import ModuleType

import pytest
from native.suite import Target, distinct

from aajr_kernels import native, runtime


@pytest.fixture
def module() -> ModuleType:
    """The native module; skips where there is none."""
    reason = runtime.backends()["native"]
    if reason is not None:
        pytest.skip(f"native: {reason}")
    return native.module()


@pytest.fixture(params=distinct() or ("none",))
def capability(request: pytest.FixtureRequest, module: ModuleType):
    """Every capability that runs here, emulated ones included; the native backend is chosen by name."""
    with Target("native", request.param).active():
        yield request.param
