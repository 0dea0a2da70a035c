"""Triton norms beyond the shared suite: tiles of rows, long rows, partial sums, strides."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
from backends.triton import budget_rules
from backends.triton.checks import DTYPES, QUIET, compare, draw, same_bits

from aajr_kernels.backends.triton import launch as gpu
from aajr_kernels.ops.norm import reference
from aajr_kernels.ops.norm import triton as ours

pytestmark = pytest.mark.filterwarnings(QUIET)


def both(x, g, weight, bias, offset=0.0, needs=(True, True, True), sum_bar=None, centred=None):
    """Compares outputs and gradients of RMS norm (no bias) or layer norm."""
    centred = bias is not None if centred is None else centred
    y, stats, _ = compare(ours, reference, "norm_fwd", (x, weight, bias, 1e-5, offset, centred))
    args = (g, x, weight, stats, offset, centred, *needs, sum_bar)
    return y, *compare(ours, Rounded, "norm_bwd", args)


class Rounded:
    """The reference, with the gradient of the weight in the dtype of the weight, as the kernels give it."""

    @staticmethod
    def norm_bwd(g, x, weight, *options):
        x_bar, w_bar, b_bar = reference.norm_bwd(g, x, weight, *options)
        return x_bar, w_bar if w_bar is None or weight is None else w_bar.to(weight.dtype), b_bar


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("size", "k"), [(3, 2), (16, 0), (37, 4), (252, 1), (507, 2)])
def test_sizes_and_tails(dtype, size, k):
    x, g, weight, bias = (draw(*s, dtype=dtype) for s in ((1 + k, 5, size),) * 2 + ((size,),) * 2)
    both(x, g, weight, None, offset=1.0)
    both(x, g, weight, bias)


@pytest.mark.parametrize(
    ("rows", "size", "k"),
    [(3, 5000, 2), pytest.param(1, 40_000, 1, marks=pytest.mark.slow), (700, 5, 1)],
)
def test_long_rows_and_many_rows(rows, size, k):
    """5000 features take the kernel of long rows backward alone, 9000 in both directions."""
    x, g, more = (draw(1 + k, rows, size) + 0.5 for _ in range(3))
    weight, bias = draw(size), draw(size)
    both(x, g, weight, bias, sum_bar=more)
    both(x, g, weight, None, offset=1.0)


@pytest.mark.parametrize("size", [5, 4100, 8200])
def test_gradients_nobody_needs(size):
    x, g, weight, bias = draw(2, 2, size), draw(2, 2, size), draw(size), draw(size)
    _, stats, _ = ours.norm_fwd(x, weight, bias, 1e-5, 0.0, True)
    for needs in ((True, False, False), (False, True, False), (False, False, True), (False, True, True)):
        compare(ours, reference, "norm_bwd", (g, x, weight, stats, 0.0, True, *needs))


@pytest.mark.slow
def test_more_rows_than_programs(monkeypatch):
    monkeypatch.setattr(ours, "_resident", lambda device, warps, tangents: 3)
    for size in (300, 5000):
        x, g, weight, bias = draw(2, 11, size), draw(2, 11, size), draw(size), draw(size)
        assert same_bits(both(x, g, weight, bias), both(x, g, weight, bias))
        both(x, g, weight, None)


@pytest.mark.parametrize(("shift", "size"), [(1e3, 384), (-1e3, 384), (1e3, 5000)])
def test_a_large_mean_cancels_nothing(shift, size):
    x, g, weight, bias = draw(3, 7, size), draw(3, 7, size), draw(size), draw(size)
    x[:, :4] += shift
    g[:, 3:] += shift
    both(x, g, weight, bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strides_are_read_in_place(dtype, monkeypatch):
    wide = draw(2, 3, 4, 5, 90, dtype=dtype)
    x, g = wide[..., 1:38].transpose(1, 2), wide.flip(0)[..., 40:77].permute(0, 3, 1, 2, 4)[:, :4, :, :3]
    g = g.reshape(2, 4, 3, 3, 37)[:, :, :, :1].expand(2, 4, 3, 5, 37)  # stride 0 within the batch
    weight, bias = draw(37, dtype=dtype), draw(37, dtype=dtype)
    expected = both(x.contiguous(), g.contiguous(), weight, bias)
    assert same_bits(both(x, g, weight, bias), expected)
    apart = x.transpose(1, -1).contiguous().transpose(1, -1)  # the last axis is not dense
    assert same_bits(both(apart, g, weight, bias), expected)
    monkeypatch.setattr(ours, "_dense", lambda t: t)
    monkeypatch.setattr(torch.Tensor, "contiguous", lambda t: pytest.fail("copied"))
    _, stats, _ = ours.norm_fwd(x, weight, bias, 1e-5, 0.0, True)
    ours.norm_bwd(g, x, weight, stats, 0.0, True, True, True, True)


@pytest.mark.parametrize(
    "shape", [(2, 0, 4), (2, 3, 0), (3, 0, 2, 4), (2, 5), (2, 1, 2, 1, 2, 1, 2, 1, 3, 10)]
)
def test_empty_no_batch_and_many_axes(shape):
    x, g, weight = draw(*shape), draw(*shape), draw(shape[-1])
    if x.numel():
        both(x, g, weight, weight)
        return
    y, stats, _ = ours.norm_fwd(x, weight, weight, 1e-5, 0.0, True)
    x_bar, w_bar, b_bar = ours.norm_bwd(g, x, weight, stats, 0.0, True, True, True, True)
    assert y.shape == x_bar.shape == shape and w_bar.shape == b_bar.shape == weight.shape
    assert not w_bar.any() and not b_bar.any()


def test_no_parameters_and_other_dtypes():
    x, g, bias = draw(2, 9, 33, dtype=torch.bfloat16), draw(2, 9, 33, dtype=torch.bfloat16), draw(33)
    both(x, g, None, None, needs=(True, False, False), centred=True)
    both(x, g, None, bias, needs=(True, False, True))
    both(x, g, bias.half(), None)
    both(x, g, draw(66)[::2], draw(1).expand(33))


@pytest.mark.parametrize("size", [37, pytest.param(8200, marks=pytest.mark.slow)])
def test_rows_that_are_not_finite_stay_alone(size):
    x, g, weight, bias = draw(2, 4, size), draw(2, 4, size), draw(size), draw(size)
    x[0, 1, 5], x[1, 2, 36], x[0, 3, 0] = float("inf"), float("nan"), float("nan")
    for b in (None, bias):
        y, stats, _ = ours.norm_fwd(x, weight, b, 1e-5, 0.0, b is not None)
        x_bar, *_ = ours.norm_bwd(g, x, weight, stats, 0.0, b is not None, True, True, True)
        expected_y, stats, _ = reference.norm_fwd(x, weight, b, 1e-5, 0.0, b is not None)
        expected, *_ = reference.norm_bwd(g, x, weight, stats, 0.0, b is not None, True, True, True)
        assert torch.equal(torch.isfinite(y), torch.isfinite(expected_y))
        assert torch.equal(torch.isfinite(x_bar), torch.isfinite(expected))
        assert torch.isfinite(y[:, 0]).all() and not torch.isfinite(y[:, 3]).any()


@pytest.mark.parametrize(
    ("size", "dtype"), [(37, torch.float16), (37, torch.float32), (8200, torch.bfloat16)]
)
@pytest.mark.parametrize("counts", [(2, 2), (1, 3), (4, 1), (1, 1)])
def test_sum_and_norm(dtype, counts, size):
    batch = (5, 3) if size < 100 else (1, 1)
    weight, bias = draw(size, dtype=dtype), draw(size, dtype=dtype)
    x = draw(counts[0], *batch, size + 3, dtype=dtype)[..., 1 : 1 + size].transpose(1, 2)
    residual = draw(counts[1], batch[1], batch[0], size, dtype=dtype)
    for b in (None, bias):
        centred = b is not None
        y, stats, summed = ours.norm_fwd(x, weight, b, 1e-5, 0.0, centred, residual)
        assert torch.equal(summed, reference.norm_fwd(x, weight, b, 1e-5, 0.0, centred, residual)[2])
        assert same_bits((y, stats), ours.norm_fwd(summed, weight, b, 1e-5, 0.0, centred)[:2])
    more = draw(max(counts), *batch, size + 7, dtype=dtype)[..., :size].transpose(1, 2)
    both(summed, draw(*summed.shape, dtype=dtype), weight, bias, sum_bar=more)


def test_columns_of_long_rows_may_lie_apart():
    size = 8200
    x, residual, g = draw(2, 2, 2 * size)[..., ::2], draw(2, 2, 3 * size)[..., ::3], draw(2, 2, size)
    weight, bias = draw(size), draw(size)
    both(x, g, weight, bias)
    y, stats, summed = ours.norm_fwd(x, weight, bias, 1e-5, 0.0, True, residual)
    assert torch.equal(summed, x + residual)
    assert same_bits((y, stats), ours.norm_fwd(summed, weight, bias, 1e-5, 0.0, True)[:2])


def test_a_backward_adds_its_partial_sums_in_one_pass_in_the_dtype_of_the_weight():
    x = torch.empty(2, 4096, 1024, dtype=torch.bfloat16, device="meta")
    weight, stats = x[0, 0], torch.empty(2, 4096, device="meta")
    with gpu.dry_run("sm_90") as launched:
        _, w_bar, _ = ours.norm_bwd(x, x, weight, stats, 0.0, False, True, True, False)
    assert [kernel.__name__ for kernel in launched] == ["_norm_bwd_kernel", "column_sum_kernel"]
    assert w_bar.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("architecture", "warps", "tangents", "programs"),
    [("sm_90", 4, 1, 4 * 132), ("sm_90", 16, 1, 132), ("sm_80", 4, 3, 2 * 108), ("gfx942", 4, 1, 4 * 304)],
)
def test_programs_share_the_rows_of_a_backward_as_far_as_registers_go(
    architecture, warps, tangents, programs
):
    with gpu.dry_run(architecture):
        assert ours._resident(torch.device("meta"), warps, tangents) == programs


def test_a_backward_takes_no_more_registers_than_its_programs_are_counted_for():
    table = budget_rules.load()
    rows = {
        (name, kernel, processor): row["registers"]
        for name, kernels in table[max(table)].items()
        for kernel, processors in kernels.items()
        for processor, row in processors.items()
        if kernel.startswith("_norm_bwd") and not processor.startswith("gfx")
    }
    assert rows
    for (name, kernel, processor), registers in rows.items():
        tangents = 3 if " K3 " in name else 1
        assert registers <= ours.REGISTERS[0] + ours.REGISTERS[1] * tangents, (name, kernel, processor)
