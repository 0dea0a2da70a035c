"""One suite for every backend: where a case runs, and what is checked.

A case is written once (aajr_kernels/testing/cases) and runs on every target: each backend, each CPU capability that
runs here, each dtype, one and three tangents. Outputs and all gradients are compared with float64, under the budgets of
aajr_kernels/testing/budgets.py. A new backend joins by its line in DEVICES.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from backends import cuda_host
from ops.rounding import rounded

import aajr_kernels
from aajr_kernels.backends import choice
from aajr_kernels.backends import cpu as native
from aajr_kernels.coverage import coverage
from aajr_kernels.testing.budgets import Error
from aajr_kernels.testing.cases.case import Case, Problem, Result, errors, on_device, problem

PACKAGE = Path(aajr_kernels.__file__).parent
CSRC = PACKAGE.parent / "csrc"
#: backend -> the device its tensors live on; without a GPU, Triton's kernels run in its interpreter, and those in CUDA
#: C++ are compiled for the CPU
_GPU = "cuda" if torch.cuda.is_available() else "cpu"
DEVICES = {"reference": "cpu", "native": "cpu", "triton": _GPU, "cuda": _GPU}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


# ------------------------------------------------------------------------------------------------------- where
@dataclass(frozen=True)
class Target:
    """A backend and, for the native one, the CPU capability."""

    backend: str
    capability: str = ""

    def __str__(self) -> str:
        return f"{self.backend}-{self.capability}" if self.capability else self.backend

    @property
    def device(self) -> str:
        return DEVICES[self.backend]

    def why_not(self, op: str) -> str | None:
        """Why the op cannot run there, or None."""
        on_host = self.backend == "cuda" and self.device == "cpu"
        reason = cuda_host.why_not() if on_host else choice.backends()[self.backend]
        if reason is None and not choice._has_module(op, self.backend):
            reason = f"op {op!r} has no kernels there"
        return None if reason is None else f"{self.backend}: {reason}"

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Every operation inside the block runs there."""
        with contextlib.ExitStack() as stack:
            if self.backend == "cuda" and self.device == "cpu":
                stack.enter_context(cuda_host.loaded())
            stack.enter_context(choice.use_backend(self.backend))
            if not self.capability:
                yield
                return
            module = native.module()
            before = module.capability()
            module.set_capability(self.capability)
            try:
                yield
            finally:
                module.set_capability(before)


@functools.cache
def capabilities() -> tuple[str, ...]:
    """CPU capabilities that are built in and run here, emulated ones included; none without the native module."""
    if choice.backends()["native"] is not None:
        return ()
    return tuple(name for name, runs in native.module().capabilities() if runs)


def distinct(op: str = "") -> list[str]:
    """Capabilities under which the op (some op) may compute differently: AMX counts where there are files for it."""
    has_amx = any(CSRC.glob(f"cpu/{op}*_amx.cpp"))
    return [name for name in capabilities() if has_amx or not name.startswith("amx")]


def targets(op: str) -> list[Target]:
    """Every place where the op is tested."""
    native_ones = [Target("native", name) for name in distinct(op)] or [Target("native")]
    every = [Target(backend) for backend in DEVICES if backend != "native"] + native_ones
    # the one backend that is not for every op
    return [t for t in every if t.backend != "cuda" or (PACKAGE / "ops" / op / "cuda.py").exists()]


# -- what -----------------------------------------------------------------------------------------------------------
def check(
    case: Case,
    target: Target,
    k: int,
    dtype: torch.dtype,
    needed: Sequence[bool] | None = None,
    draws: int = 0,
) -> None:
    """Output and all gradients of the case on the target (those that are `needed`), within the budget.

    Args:
        draws: for a part over its budget, so many computations whose operations round at random take the place of the
            eager one, which of thousands is sometimes right by luck. The largest error counts.
    """
    p = problem(case, k, dtype)
    with target.active(), coverage() as seen:
        result = on_device(case, p, target.device, needed)
    assert {backend for _, backend in seen.entries} <= {target.backend, "view"}, str(seen)
    for name, leaf, gradient in zip(case.leaves, p.inputs + p.params, result.gradients):
        assert gradient is None or gradient.dtype == leaf.dtype, f"gradient of {name} is {gradient.dtype}"
    failures = _failures(case, p, result)
    for draw in range(draws):
        if failures:
            drawn = _failures(case, replace(p, eager=rounded(case.exact, p, draw)), result)
            pairs = {name: (error, drawn[name]) for name, error in failures.items() if name in drawn}
            failures = {name: min(pair, key=lambda error: error.share) for name, pair in pairs.items()}
    assert not failures, "\n".join(f"{name}: {error.reason}" for name, error in failures.items())


def _failures(case: Case, p: Problem, result: Result) -> dict[str, Error]:
    return {name: error for name, error in errors(case, p, result) if error.reason}
