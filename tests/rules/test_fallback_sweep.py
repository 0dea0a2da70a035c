"""Every torch function with a rule or on the fallback's list, against finite differences of value and gradients."""

from __future__ import annotations

import pytest
import torch
from rules import cases, cases_attention, cases_layers, cases_numbers  # noqa: F401  the last three fill the table
from rules.check import check

import aajr_kernels as aajr
from aajr_kernels.rules import fallback

CONSTANT = {"angle", "fix", "floor", "ceil", "round", "trunc", "sign", "sgn", "div(floor)", "floor_divide"}
#: entries of the list that other names cover: the method, or the module, of the same function
ALIASES = {
    "trapz": "trapezoid", "nuclear_norm": "linalg.matrix_norm(nuc)", "cholesky": "linalg.cholesky",
    "pinverse": "linalg.pinv", "linalg.vander": "vander",
    "linalg.cholesky_ex": "linalg.cholesky", "linalg.lu_factor_ex": "linalg.lu_factor",
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("index", range(len(cases.CASES)), ids=[case.name for case in cases.CASES])
def test_function(index: int) -> None:
    case = cases.CASES[index]
    k = (1, 3, 2)[index % 3]
    check(case.fn, case.inputs, k, duals=case.duals, upstream=case.upstream, moves=case.name not in CONSTANT)


def _functions() -> set[str]:
    return {case.name.split("(")[0] for case in cases.CASES}


def test_at_least_150_functions_are_verified() -> None:
    assert len(_functions()) >= 150, len(_functions())


@pytest.mark.parametrize("name", fallback.ALLOWED)
def test_every_allowed_function_is_in_the_table(name: str) -> None:
    names = {name, f"linalg.{name}", f"special.{name}", f"F.{name}", ALIASES.get(name, name)}
    assert names & (_functions() | {case.name for case in cases.CASES}), f"{name} is allowed but not verified"
    assert fallback.functions_allowed(name), f"{name} names no torch function"


def test_the_fallback_is_recorded() -> None:
    x = torch.randn(3, 3, dtype=torch.float64)
    with aajr.coverage() as coverage:
        torch.linalg.inv(aajr.dual(x, x))
        torch.tanh(aajr.dual(x, x))
    assert coverage.fallbacks == ["torch.linalg_inv"]
