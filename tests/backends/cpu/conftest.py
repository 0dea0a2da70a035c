"""Fixtures of the kernel tests: a capability at a time, and the native module or the reason why it is missing."""

from __future__ import annotations

from types import ModuleType

import pytest
from ops.suite import Target, capabilities, distinct

from aajr_kernels.backends import choice
from aajr_kernels.backends import cpu as native


@pytest.fixture
def module() -> ModuleType:
    """The native module; skips where there is none."""
    reason = choice.backends()["native"]
    if reason is not None:
        pytest.skip(f"native: {reason}")
    return native.module()


@pytest.fixture(params=distinct() or ("none",))
def capability(request: pytest.FixtureRequest, module: ModuleType):
    """Every capability that runs here, emulated ones included; the native backend is chosen by name."""
    with Target("native", request.param).active():
        yield request.param


@pytest.fixture(params=[name for name in capabilities() if not name.startswith("amx")] or ("none",))
def vectors(request: pytest.FixtureRequest, module: ModuleType):
    """Every capability with vectors of its own (AMX adds tiles to AVX-512's); `auto` goes on choosing backends."""
    before = module.capability()
    module.set_capability(request.param)
    yield request.param
    module.set_capability(before)
