"""Functions without a derivative rule, at any place of a random program: refused, and nothing stays behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fuzz import programs
from fuzz.examples import fuzzed
from fuzz.test_programs import STEPS, by_dual, drawn_leaves
from hypothesis import assume
from hypothesis import strategies as st

import aajr_kernels as aajr

#: which torch takes, of values of any shape; the gradients of their results by torch are missing or wrong
REFUSED: dict[str, Any] = {
    "bessel_j0": torch.special.bessel_j0,
    "zeta": lambda x: torch.special.zeta(x * x + 2.0, 1.5),
    "heaviside": lambda x: torch.heaviside(x, x),
    "unique": lambda x: x.reshape(-1).unique(),
    "to_sparse": lambda x: x.to_sparse().to_dense(),
    "geqrf": lambda x: torch.geqrf(programs.fitted(x, (3, 2)))[0],
    "ctc_loss": lambda x: F.ctc_loss(
        programs.fitted(x, (3, 1, 4)).log_softmax(-1),
        torch.tensor([[1]]),
        torch.tensor([3]),
        torch.tensor([1]),
    ),
}


@fuzzed("refusals", quick=10, full=500)
def test_a_function_without_a_rule_is_refused(data):
    x, v, parameters = drawn_leaves(data)
    program = programs.accepted(data.draw(STEPS, "program"), x, parameters)
    assume(program)
    name = data.draw(st.sampled_from(sorted(REFUSED)), "refused")
    place = data.draw(st.integers(0, len(program)), "place")
    function = REFUSED[name]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(programs.OPERATIONS, "refused", lambda c, value: function(value))
        refused = [*program[:place], ("refused", (0,)), *program[place:]]
        assert torch.is_tensor(programs.run(refused[: place + 1], x, parameters))  # torch takes it
        before = by_dual(program, x, v, parameters)
        with pytest.raises(aajr.UnsupportedOperation):
            by_dual(refused, x, v, parameters)
    assert torch.equal(before.nan_to_num(), by_dual(program, x, v, parameters).nan_to_num())
