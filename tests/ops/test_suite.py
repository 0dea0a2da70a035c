"""Every op on every backend and capability, dtype and number of tangents, against float64."""

from __future__ import annotations

import pytest
import torch
from ops.suite import DTYPES, PACKAGE, Target, check, targets

from aajr_kernels.testing.cases import CASES
from aajr_kernels.testing.cases.case import Case

OPS = sorted({case.op for case in CASES})


def takes_long(index: int, case: Case, k: int, dtype: torch.dtype, target: Target) -> bool:
    """Whether a combination is left to `make test-all`: Triton's interpreter takes up to seconds for one.

    Every day every case runs there at least once, and every dtype and number of tangents in some case of every op.
    """
    if case.large:
        on_host = target.backend in ("triton", "cuda") and target.device == "cpu"
        return on_host or k != 1 or dtype != DTYPES[index % 3]
    if target.capability.endswith("_emulated"):  # which convert float16 as all others do
        return dtype == torch.float16
    if target.backend != "triton" or target.device != "cpu":
        return False
    if case.op == "attention":
        return dtype != DTYPES[index % 3] or k != (3 if index % 8 == 0 else 1)
    return dtype != DTYPES[index % 3] or k != (3 if dtype == torch.float16 else 1)


def runs() -> list:
    """Targets vary fastest, so that what a case expects is computed once."""
    return [
        pytest.param(
            case,
            k,
            dtype,
            target,
            id=f"{case}-K{k}-{str(dtype).removeprefix('torch.')}-{target}",
            marks=[pytest.mark.slow] if takes_long(index, case, k, dtype, target) else [],
        )
        for index, case in enumerate(CASES)
        for k in (1, 3)
        for dtype in DTYPES
        for target in targets(case.op)
    ]


def test_every_op_has_cases_with_names_of_their_own():
    packages = {path.parent.name for path in PACKAGE.glob("ops/*/reference.py")}
    assert set(OPS) == packages
    assert len({str(case) for case in CASES}) == len(CASES)


@pytest.mark.parametrize(("case", "k", "dtype", "target"), runs())
def test_within_the_budget_of_float64(case: Case, k: int, dtype: torch.dtype, target: Target):
    reason = target.why_not(case.op)
    if reason is not None:
        pytest.skip(reason)
    check(case, target, k, dtype)
