"""Every rule in bfloat16 and float16: at most twice as wrong as PyTorch's forward mode in that dtype.

The cases are those of the sweep, which compares them in float64 with finite differences; their values are ones that
both dtypes hold. A rule that no case reaches fails the last test.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from assertions import assert_within_budget
from rules import cases, cases_attention, cases_layers, cases_numbers  # noqa: F401  the last three fill the table
from rules.low import Point, Results

from aajr_kernels import dual, is_dual
from aajr_kernels.rules import registry
from aajr_kernels.testing.budgets import error_of, gradient_floors

EVERY_DAY = ((torch.bfloat16, 2), (torch.float16, 1))
THE_REST = ((torch.bfloat16, 1), (torch.float16, 2))
#: kinds of exceptions by which torch says that a function does not take a dtype
REFUSALS = (RuntimeError, TypeError, ValueError)


def _exact(point: Point) -> Results:
    """In float64; the sweep holds the rules there against finite differences."""
    try:
        return point.upstream(torch.float64) if point.case.upstream else point.ours(torch.float64)
    except REFUSALS:  # of a version of torch without forward mode of the function
        return point.ours(torch.float64)


def _reference(point: Point, dtype: torch.dtype, exact: Results) -> Results:
    """PyTorch's forward mode in the dtype where that is right, else the float32 result rounded once."""
    if point.case.upstream:
        try:
            theirs = point.upstream(dtype)
        except REFUSALS:
            theirs = {}
        if set(theirs) == set(exact) and all(x.isfinite().all() for x in theirs.values()):
            return theirs
    single = point.ours(torch.float32, rounded=dtype)
    return {name: x.to(dtype) for name, x in single.items()}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "runs", [pytest.param(EVERY_DAY, id="daily"), pytest.param(THE_REST, id="rest", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in cases.CASES if case.low])
def test_low_precision(case: cases.Case, runs: tuple[tuple[torch.dtype, int], ...]) -> None:
    for dtype, k in runs:
        point = Point.of(case, k)
        try:
            plain = point.plain(dtype)
        except REFUSALS:
            with pytest.raises(REFUSALS):
                point.ours(dtype)
            continue
        exact = _exact(point)
        ours, reference = point.ours(dtype), _reference(point, dtype, exact)
        floors = gradient_floors({name: x for name, x in exact.items() if name.startswith("gradient")})
        for i, y in enumerate(plain):
            assert ours[f"value {i}"].dtype == y.dtype, f"{dtype}: value {i} is of {ours[f'value {i}'].dtype}"
        for name, want in exact.items():
            error = error_of(ours[name], want, reference[name], dtype=dtype, floor=floors.get(name, 0.0))
            assert not error.reason, f"{dtype}, K = {k}, {name}: {error.reason}"


# -- sums that cancel -------------------------------------------------------------------------------------------------

#: name -> sum of a product and a first operand, which the test chooses so that the two cancel, and the other operands
SUMS: dict[str, tuple[Callable[..., Any], tuple[tuple[int, ...], ...]]] = {
    "F.linear": (lambda b, x, w: F.linear(x, w, b), ((1, 64), (8, 64))),
    "F.conv1d": (lambda b, x, w: F.conv1d(x, w, b), ((1, 16, 3), (8, 16, 3))),
    "F.conv_transpose2d": (lambda b, x, w: F.conv_transpose2d(x, w, b), ((1, 32, 1, 1), (32, 8, 1, 1))),
    "addmm": (torch.addmm, ((5, 64), (64, 7))),
    "addmv": (torch.addmv, ((5, 64), (64,))),
    "baddbmm": (torch.baddbmm, ((2, 5, 64), (2, 64, 3))),
    "addbmm": (torch.addbmm, ((2, 5, 64), (2, 64, 3))),
    "addcmul": (torch.addcmul, ((5, 7), (5, 7))),
    "add(alpha)": (lambda b, x, _: torch.add(b, x, alpha=0.7), ((5, 7), (1,))),
    "sub(alpha)": (lambda b, x, _: torch.sub(b, x, alpha=0.7), ((5, 7), (1,))),
}


@pytest.mark.parametrize("name", SUMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("places", [(0,), (1,), (2,), (0, 1, 2)])
def test_sums_that_cancel_are_rounded_once(name: str, dtype: torch.dtype, places: tuple[int, ...]) -> None:
    function, shapes = SUMS[name]
    generator = torch.Generator().manual_seed(2)
    x, w = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    product = function(torch.zeros(8 if name.startswith("F.") else (), dtype=dtype), x, w)
    b = -product.reshape(8) if name.startswith("F.") else -product
    operands = [dual(y, torch.ones_like(y)) if i in places else y for i, y in enumerate((b, x, w))]
    exact = function(*(y.double() for y in (b, x, w)))
    result = function(*operands)
    value = result.primal if is_dual(result) else result
    assert_within_budget(value, function(b, x, w), exact, name)


# -- no rule without a case -------------------------------------------------------------------------------------------

#: what has no derivative to round: comparisons and integers, new tensors, casts, refusals, random numbers
PLAIN = ("_plain.", "_created.", "_cast.", "_refusal.", "_drawn.", "_type")
#: names with rules of that sort, or with the very function of another name behind them
SAME = {
    "all_reduce": "a sum over processes, tests/integrations/test_sharding.py",
    "is_nonzero": "a bool",
    "native_channel_shuffle": "channel_shuffle",
    "threshold_": "F.threshold",
    "pinverse": "linalg.pinv",
    "randint_like": "integers",
    "stride": "integers",
    "detach": "the plain primal",
    "upsample": "F.interpolate by its old name",
    "trapz": "trapezoid",
    "nuclear_norm": "linalg.matrix_norm",
    "_nested_tensor_from_mask_left_aligned": "always False",
    "fill_": "a constant",
    "zero_": "a constant",
    "copy_": "a copy",
    "imag": "the property of that name",
    "istft": "after stft, which torch has in no low dtype",
    "orgqr": "linalg.householder_product",
    "lu_solve": "linalg.lu_solve",
    "_conj_copy": "conj",
    "detach_copy": "plain",
    "fractional_max_pool2d_with_indices": "fractional_max_pool2d",
    "fractional_max_pool3d_with_indices": "fractional_max_pool3d",
    "_neg_view_copy": "neg",
}


class _Seen(dict[Any, Any]):
    """A table of rules that notes what is looked up, by name and by rule."""

    def __init__(self, table: dict[Any, Any], names: set[str], rules: set[int]) -> None:
        super().__init__(table)
        self.names, self.rules = names, rules

    def get(self, key: Any, default: Any = None) -> Any:
        rule = super().get(key, default)
        self.names.add(key if isinstance(key, str) else getattr(key, "__name__", ""))
        self.rules.add(id(rule))
        return rule


def _behind(rule: Any) -> list[Any]:
    """The rule and, of an in-place form, the one that it is made from and whose result it copies."""
    cells = (rule.__closure__ or ()) if rule.__module__.endswith(".inplace") else ()
    return [rule, *(cell.cell_contents for cell in cells if callable(cell.cell_contents))]


@pytest.mark.filterwarnings("ignore")
def test_every_rule_has_a_case_in_low_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    names: set[str] = set()
    rules: set[int] = set()
    table = dict(registry.RULES)
    for attribute in ("RULES", "METHODS"):
        monkeypatch.setattr(registry, attribute, _Seen(getattr(registry, attribute), names, rules))
    for case in cases.CASES:
        try:
            Point.of(case, 1).lifted(torch.bfloat16)
        except REFUSALS:  # held against torch above
            continue
    missing = set()
    for function, rule in table.items():
        name = getattr(function, "__name__", "")
        known = {
            name,
            name.rstrip("_"),
            name.removesuffix("_copy"),
            name.partition(".")[0],
            name.removeprefix("special_"),
            f"linalg_{name}",
        } & (names | set(SAME))
        if not known and not any(id(r) in rules or r.__qualname__.startswith(PLAIN) for r in _behind(rule)):
            missing.add(name)
    assert not missing, (
        f"no case of the sweep reaches the rules of {sorted(missing)}: add `case(...)` to tests/rules/cases*.py."
    )
