"""Every op on every backend and capability, dtype and number of tangents, against float64."""

from __future__ import annotations

import pytest
import torch
from native import cases_products, cases_rows
from native.suite import DTYPES, PACKAGE, Case, Target, check, targets

CASES = [*cases_rows.CASES, *cases_products.CASES]
OPS = sorted({case.op for case in CASES})


def takes_long(index: int, case: Case, k: int, dtype: torch.dtype, target: Target) -> bool:
    """Attention in Triton's interpreter takes seconds a run; a share of the combinations is enough for every day."""
    if target.backend != "triton" or target.device != "cpu" or case.op != "attention":
        return False
    turn = DTYPES[index % len(DTYPES)]
    return not (
        dtype == torch.float32 if k == 1 and index % 2 else dtype == turn and (k == 1 or index % 3 == 0)
    )


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
