"""The suite's own safety nets work: uninitialised memory is NaN, under compile too, and seeds repeat."""

from __future__ import annotations

import pytest
import torch

from tests.conftest import NAN_DTYPES


@pytest.mark.parametrize("dtype", NAN_DTYPES, ids=str)
def test_uninitialised_floats_are_nan(dtype):
    x = torch.ones(3, 4, dtype=dtype)
    for fresh in (
        torch.empty(5, 7, dtype=dtype),
        torch.empty((5, 7), dtype=dtype, requires_grad=True),
        torch.empty_like(x),
        torch.empty_like(x.t()),
        torch.empty_strided((2, 3), (1, 2), dtype=dtype),
        torch.empty_permuted((2, 3), (1, 0), dtype=dtype),
        x.new_empty(6),
        x.new_empty_strided((2, 3), (3, 1)),
    ):
        assert fresh.isnan().all()
    assert torch.empty_like(x.t()).stride() == x.t().stride()


def test_an_unwritten_element_fails_a_comparison():
    def broken(x):
        y = torch.empty_like(x)
        y[:-1] = 2 * x[:-1]
        return y

    with pytest.raises(AssertionError):
        torch.testing.assert_close(broken(torch.ones(9)), torch.full((9,), 2.0))


def test_integers_and_meta_tensors_are_left_alone():
    assert torch.empty(3, dtype=torch.int64).dtype == torch.int64
    assert torch.empty(3, device="meta").is_meta


def test_poison_survives_compile():
    @torch.compile(fullgraph=True, backend="aot_eager")
    def allocate(x):
        return torch.empty_like(x), torch.empty(3), x.new_empty(2)

    assert all(fresh.isnan().all() for fresh in allocate(torch.ones(4)))


@pytest.mark.parametrize("run", [1, 2])
def test_a_table_of_dynamo_that_a_test_made_anew_is_whole_in_the_next(run):
    torch._dynamo.reset()
    assert torch.compile(lambda x: torch.empty(3).add(x), backend="eager")(torch.ones(3)).isnan().all()
    torch._dynamo.trace_rules.clear_lru_cache()
    torch._dynamo.trace_rules.get_torch_obj_rule_map()


@pytest.mark.parametrize("run", [1, 2])
def test_every_test_starts_from_the_same_seed(run):
    assert torch.equal(torch.randn(3), torch.randn(3, generator=torch.Generator().manual_seed(0)))
