"""torch's database of operations: each entry is right in every form that torch has of it, or raises.

``python -m pytest tests/rules/test_database.py -m slow -s`` prints which are right and which raise.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from rules import database

import aajr_kernels as aajr

#: entries that support forward mode in float64, and the fewest of them that are right, by version of torch
FLOORS = {"2.13": (506, 501), "2.14": (507, 500), "2.15": (518, 501)}

#: entries with a form that is still refused with TypeError: a method of torch.Tensor called with a Dual as self
OPEN = "bernoulli cdouble __getitem__ __radd__ __rmul__ __rsub__ __rdiv__ __rpow__".split()


def _version() -> str:
    return ".".join(torch.__version__.split(".")[:2])


def _report(findings: dict[str, database.Finding]) -> tuple[list[str], list[str]]:
    """Names that are right and names that raise; fails on anything wrong and on any other exception."""
    wrong = [f"{name}: {text}" for name, finding in findings.items() for text in finding.wrong]
    wrong = [line for line in wrong if line.split(":")[0] not in OPEN or "descriptor" not in line]
    assert not wrong, "\n".join(wrong[:40])
    right = [name for name, finding in findings.items() if finding.right and not finding.wrong]
    raising = [name for name, finding in findings.items() if finding.raised and not finding.right]
    print(f"\n{len(right)} right, {len(raising)} raise: {raising}")
    return right, raising


def _accepted_errors(op: Any) -> list[str]:
    """Calls of `op` that torch refuses, and that are accepted with a Dual."""
    accepted = []
    if op.error_inputs_func is None:
        return accepted
    for number, error in enumerate(op.error_inputs("cpu")):
        sample = error.sample_input
        call = database.Call(op.op, sample, torch.float64)
        for dtype in (torch.float64, torch.float32):
            call = database.Call(op.op, sample, dtype)
            if call.places:
                break
        if not call.places:
            continue
        try:
            call(*[p.clone() for p in call.points])
        except Exception:
            pass
        else:
            continue  # refused for another reason than its arguments
        try:
            call(*[aajr.dual(p, torch.ones_like(p)) if i == 0 else p for i, p in enumerate(call.points)])
        except Exception:
            continue
        accepted.append(f"{database.title(op)}, error {number}: torch says {error.error_regex!r}")
    return accepted


def test_a_third_of_the_entries_with_one_sample() -> None:
    findings = {database.title(op): database.examine(op, 1, quick=True) for op in database.entries()[::3]}
    right, _ = _report(findings)
    assert len(right) >= 0.95 * len(findings)


@pytest.mark.slow
def test_every_form_of_every_entry() -> None:
    entries = database.entries()
    right, raising = _report({database.title(op): database.examine(op, 6) for op in entries})
    total, floor = FLOORS.get(_version(), (len(entries), FLOORS[max(FLOORS)][1]))
    assert len(entries) == total
    assert len(right) >= floor, f"{len(right)} entries are right, {floor} were: {raising}"


@pytest.mark.slow
def test_what_torch_refuses_is_refused() -> None:
    accepted = [line for op in database.entries() for line in _accepted_errors(op)]
    assert not accepted, "\n".join(accepted)


@pytest.mark.slow
def test_complex_numbers_are_right_or_raise() -> None:
    """Those of the entries that take complex128, with complex Duals, which exist inside functions."""
    entries = [op for op in database.entries() if torch.complex128 in op.supported_dtypes("cpu")]
    right, _ = _report({database.title(op): database.examine(op, 2, torch.complex128) for op in entries})
    assert len(right) >= 285
