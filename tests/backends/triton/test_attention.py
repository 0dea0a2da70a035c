"""Triton kernels of attention beyond the shared suite, which checks them against float64."""

from __future__ import annotations

import itertools
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from assertions import assert_exact, assert_within_budget, relative_error
from ops.attention_checks import formula
from ops.op_checks import forward_mode, stacks
from ops.suite import DEVICES, Target
from torch import Tensor

import aajr_kernels as aajr
from aajr_kernels import BackendUnavailable
from aajr_kernels.backends.triton import launch as gpu
from aajr_kernels.ops.attention import reference
from aajr_kernels.ops.attention.configs import Tile
from aajr_kernels.ops.attention.options import Options, lacks_in_triton
from bench import schedule as simulation

triton_module = pytest.importorskip("aajr_kernels.ops.attention.triton", reason="triton is not installed")
triton_problem = pytest.importorskip("aajr_kernels.ops.attention.triton.problem")
schedule = pytest.importorskip("aajr_kernels.ops.attention.triton.schedule")

DEVICE = DEVICES["triton"]
pytestmark = [
    pytest.mark.skipif(Target("triton").why_not("attention") is not None, reason="Triton cannot run here"),
    *([pytest.mark.gpu] if DEVICE == "cuda" else []),
]


def leaves(sizes: tuple[int, ...], moves: tuple[int, ...] = (1, 1, 1), k: int = 1) -> list[Tensor]:
    B, H, HK, N, M, D, V = sizes
    shapes = [(B, H, N, D), (B, HK, M, D), (B, HK, M, V)]
    return [stacks(*shape, k=k if moving else 0).float() for shape, moving in zip(shapes, moves)]


def both(
    inputs: list[Tensor], mask: Tensor | None, options: Options, tolerance: float = 3e-6
) -> tuple[Any, Any]:
    """The kernels in float32 against the reference in float64: output and all gradients."""
    on = [x.to(DEVICE) for x in inputs]
    there = Options(*(x.to(DEVICE) if isinstance(x, Tensor) else x for x in options))
    put = None if mask is None else mask.to(DEVICE)
    got = triton_module.attention_fwd(*on, put, there)
    wide = [x.double() for x in inputs]
    wide_mask = mask.double() if mask is not None and mask.dtype != torch.bool else mask
    expected = reference.attention_fwd(*wide, wide_mask, options)
    assert_exact(got[0].cpu(), expected[0], "output", tolerance=tolerance, floor=1.0)
    out_bar = torch.randn(expected[0].shape, dtype=torch.float64).float()
    needs = (True, True, True, mask is not None and mask.dtype != torch.bool)
    bars = triton_module.attention_bwd(out_bar.to(DEVICE), *on, put, *got, options=there, needs=needs)
    expected_bars = reference.attention_bwd(
        out_bar.double(), *wide, wide_mask, *expected, options=options, needs=needs
    )
    for name, mine, theirs in zip(("q", "k", "v", "bias"), bars, expected_bars):
        assert (mine is None) == (theirs is None), name
        if mine is not None:
            assert_exact(mine.cpu(), theirs, f"gradient of {name}", tolerance=tolerance, floor=1.0)
    return (got, bars), (expected, expected_bars)


# -- sizes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "offset"),
    [
        ((1, 4, 1, 1, 1, 64, 64), 0),
        ((2, 2, 2, 37, 53, 80, 48), 0),
        pytest.param((1, 4, 1, 507, 507, 16, 16), 0, marks=pytest.mark.slow),
        ((2, 2, 2, 37, 53, 80, 48), None),
        pytest.param((1, 4, 1, 507, 507, 16, 16), None, marks=pytest.mark.slow),
    ],
)
def test_odd_sizes_and_one_key_head_of_four(sizes, offset, monkeypatch):
    if DEVICE == "cpu":  # fewer, larger tiles: the interpreter takes as long for a small one
        monkeypatch.setattr(triton_problem, "tile", lambda *_: Tile(128, 128, 1, 1))
    # whose budget is that of products of float32; the suite holds three of tf32 to theirs
    monkeypatch.setattr(gpu, "_TF32X3", ())
    both(leaves(sizes), None, Options(sizes[5] ** -0.5, offset=offset))


@pytest.mark.parametrize("empty", [0, 3, 4])
def test_empty_axes(empty):
    sizes = [2, 2, 1, 5, 7, 16, 16]
    sizes[empty] = 0
    both(leaves(tuple(sizes)), None, Options(0.25, offset=0))


@pytest.mark.parametrize("moves", list(itertools.product((0, 1), repeat=3)), ids=str)
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_missing_tangents(moves, softcap):
    both(leaves((1, 2, 1, 19, 40, 16, 12), moves, k=2), None, Options(0.3, softcap=softcap, offset=21))


# -- masks ------------------------------------------------------------------------------------------------------------

SUBSETS = list(itertools.product([True, False], repeat=4))


@pytest.mark.parametrize(
    "subset",
    [pytest.param(s, marks=[pytest.mark.slow] if i % 8 else []) for i, s in enumerate(SUBSETS)],
    ids=lambda s: "".join(n for n, kept in zip("BHNM", s) if kept) or "one",
)
def test_bias_gradients_on_every_subset_of_axes(subset):
    shape = [n if kept else 1 for n, kept in zip((2, 2, 37, 40), subset)]
    bias = 0.5 * torch.randn(2, *shape)
    # summed over the keys the gradient vanishes identically: what is left is the rounding of terms of size 1 to 10
    both(leaves((2, 2, 1, 37, 40, 16, 16)), bias, Options(0.3, offset=3, window=20), tolerance=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "programs", [pytest.param(1, marks=pytest.mark.slow), 5, pytest.param(1000, marks=pytest.mark.slow)]
)
def test_the_gradient_of_a_broadcast_bias_is_shared_among_programs(programs, monkeypatch):
    monkeypatch.setattr(triton_problem, "_BIAS_PROGRAMS", programs)
    bias = 0.5 * torch.randn(3, 1, 1, 37, 1)
    both(leaves((2, 2, 1, 37, 33, 16, 16), k=2), bias, Options(0.3, offset=3), tolerance=2e-5)


@pytest.mark.slow
def test_a_bias_near_the_largest_number_and_rows_without_keys():
    q, k, v = leaves((2, 2, 1, 13, 40, 16, 16))
    bias = torch.zeros(1, 2, 1, 13, 40)
    bias[..., :5, :] = torch.finfo(torch.float32).min  # what eager masks of models hold: uniform weights
    bias[..., 5:7, :] = -torch.inf
    bias[:, 1, :, 7:, :30] = torch.finfo(torch.float32).min
    (got, bars), _ = both([q, k, v], bias, Options(0.3))
    assert not got[0][:, :, :, 5:7].any() and not bars[0][:, :, :, 5:7].any()


# -- packed sequences and dropout -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(Options(0.3), marks=pytest.mark.slow),
        pytest.param(Options(0.3, offset=0), marks=pytest.mark.slow),
        pytest.param(Options(0.3, offset=0, window=7), marks=pytest.mark.slow),
        pytest.param(Options(0.3, offset=0, align_right=True), marks=pytest.mark.slow),
    ],
    ids=["full", "causal", "window", "lower right"],
)
def test_packed_sequences(options):
    queries, keys = [0, 5, 5, 45, 80], [0, 9, 30, 70, 110] if options.align_right else [0, 5, 25, 65, 100]
    starts = torch.tensor(queries), torch.tensor(keys)
    both(
        leaves((1, 4, 2, 80, keys[-1], 16, 16)), None, options._replace(q_start=starts[0], k_start=starts[1])
    )


def test_a_sequence_does_not_see_the_numbers_of_another():
    q, k, v = leaves((1, 2, 1, 40, 40, 16, 16))
    starts = torch.tensor([0, 17, 40]), torch.tensor([0, 17, 40])
    clean = triton_module.attention_fwd(
        *(x.to(DEVICE) for x in (q, k, v)), None, Options(0.3, **starts_on(starts))
    )
    for x in (q, k, v):
        x[..., 17:, :] = float("nan")
    got = triton_module.attention_fwd(
        *(x.to(DEVICE) for x in (q, k, v)), None, Options(0.3, **starts_on(starts))
    )
    assert torch.equal(got[0][..., :17, :], clean[0][..., :17, :])


def starts_on(starts: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    return {"q_start": starts[0].to(DEVICE), "k_start": starts[1].to(DEVICE)}


def drawn(seed: Tensor, probability: float, sizes: tuple[int, int, int, int]) -> Tensor:
    """The mask ``[B, H, N, M]``: with equal scores and the identity as values the output is the mask over M."""
    B, H, N, M = sizes
    zero = torch.zeros(1, B, H, N, 16, device=DEVICE)
    eye = torch.eye(M, device=DEVICE).expand(1, B, 1, M, M)
    options = Options(1.0, dropout=probability, drawn=seed)
    out = triton_module.attention_fwd(zero, zero[:, :, :1, :1].expand(1, B, 1, M, 16), eye, None, options)[0]
    return M * out[0].double().cpu()


@pytest.mark.slow
def test_dropout_is_drawn_evenly_and_once():
    seed, p = torch.tensor(1 << 50, device=DEVICE), 0.3
    mask = drawn(seed, p, (2, 3, 61, 100))
    assert torch.allclose(mask[mask != 0], torch.tensor(1 / (1 - p), dtype=torch.float64), rtol=1e-5)
    kept = (mask != 0).double()
    assert abs(kept.mean() - (1 - p)) < 4 * (p * (1 - p) / kept.numel()) ** 0.5
    for axis in range(4):  # no batch row, head, query or key is favoured, and neighbours are independent
        means = kept.mean([i for i in range(4) if i != axis])
        assert (means - (1 - p)).abs().max() < 5 * (p * (1 - p) * kept.shape[axis] / kept.numel()) ** 0.5
        a, b = (kept.narrow(axis, i, kept.shape[axis] - 1) - (1 - p) for i in (0, 1))
        assert abs((a * b).mean()) < 5 * p * (1 - p) / a.numel() ** 0.5
    other = drawn(torch.tensor((1 << 50) + 1, device=DEVICE), p, (2, 3, 61, 100))
    assert abs(((other != 0).double() - (1 - p)).mul(kept - (1 - p)).mean()) < 5 * p / kept.numel() ** 0.5


@pytest.mark.parametrize("softcap", [pytest.param(None, marks=pytest.mark.slow), 2.0])
def test_all_kernels_drop_the_same_weights(softcap):
    seed, p, sizes = torch.tensor(11, device=DEVICE), 0.4, (1, 2, 1, 37, 40, 16, 16)
    mask = torch.where(drawn(seed, p, (1, 2, 37, 40)) > 0.5, 1 / (1 - p), 0.0)
    inputs = [x.to(DEVICE) for x in leaves(sizes)]
    bias = 0.5 * torch.randn(2, 1, 2, 37, 40, device=DEVICE)
    options = Options(0.3, softcap=softcap, offset=3, dropout=p, drawn=seed)
    got = triton_module.attention_fwd(*inputs, bias, options)
    bar = torch.randn_like(got[0])
    bars = triton_module.attention_bwd(bar, *inputs, bias, *got, options=options, needs=(True,) * 4)
    wide = [x.double().cpu().requires_grad_() for x in (*inputs, bias)]

    def written(q, k, v, b):
        return formula(q, k, v, b, dropped=mask, scale=0.3, softcap=softcap, causal="lower_right")

    exact = forward_mode(written, wide, [])
    assert_exact(got[0].cpu(), exact, "output", tolerance=3e-6, floor=1.0)
    for name, mine, theirs in zip("qkvb", bars, torch.autograd.grad(exact, wide, bar.double().cpu())):
        assert_exact(mine.cpu(), theirs, name, tolerance=3e-6, floor=1.0)


# -- numbers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("offset", [0.0, 30.0, 300.0])
def test_a_common_tangent_of_all_scores_does_not_cancel(dtype, offset):
    """Keys that move together move all scores of a row alike: softmax does not see it, and neither must rounding.

    P∘Ṡ is rounded to the dtype of the values. Subtracting μO in the end, rounding Ṡ itself, gives errors of 0.66 % at
    30 and 6.6 % at 300 in bfloat16 (by the same arithmetic in PyTorch) where this gives 0.16 %.
    """
    q, k, v = leaves((1, 2, 1, 65, 80, 32, 32))
    k[1] += offset * torch.randn(32) / 32**0.5
    low = [x.to(DEVICE, dtype) for x in (q, k, v)]
    got = triton_module.attention_fwd(*low, None, Options(32**-0.5))[0].cpu()
    exact = reference.attention_fwd(*(x.double().cpu() for x in low), None, Options(32**-0.5))[0]
    assert relative_error(got[1], exact[1]) < 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("size", [10.0, 1e3])
def test_large_scores_are_as_right_as_in_eager_code(size):
    inputs = leaves((1, 2, 1, 37, 40, 16, 16))
    inputs[0][0] *= size
    options, bar = Options(0.25, offset=3), torch.randn(2, 1, 2, 37, 16)
    on = [x.to(DEVICE) for x in inputs]
    got = triton_module.attention_fwd(*on, None, options)
    bars = triton_module.attention_bwd(
        bar.to(DEVICE), *on, None, *got, options=options, needs=(True, True, True, False)
    )

    def written(q, k, v):
        return formula(q, k, v, scale=0.25, causal="lower_right")

    def eager(dtype):
        wide = [x.to(dtype).requires_grad_() for x in inputs]
        out = forward_mode(written, wide, [])
        return out.detach(), *torch.autograd.grad(out, wide, bar.to(dtype))

    names = ("output", "gradient of q", "gradient of k", "gradient of v")
    for name, mine, low, exact in zip(names, (got[0], *bars), eager(torch.float32), eager(torch.float64)):
        assert_within_budget(mine.cpu(), low, exact, name)


@pytest.mark.slow
def test_two_runs_are_bitwise_equal():
    inputs = [x.to(DEVICE) for x in leaves((1, 2, 1, 40, 40, 16, 16), k=2)]
    bias = torch.randn(1, 1, 1, 1, 40, device=DEVICE)
    results = []
    for _ in range(2):
        out = triton_module.attention_fwd(*inputs, bias, Options(0.3, offset=0))
        bars = triton_module.attention_bwd(
            torch.ones_like(out[0]), *inputs, bias, *out, options=Options(0.3, offset=0), needs=(True,) * 4
        )
        results.append((*out, *bars))
    assert all(torch.equal(a, b) for a, b in zip(*results))


@pytest.mark.parametrize(
    "bias", [None, pytest.param((2, 1, 2, 9, 11), marks=pytest.mark.slow), (2, 4, 1, 1, 11)], ids=str
)
def test_sections_of_heads(bias, monkeypatch):
    monkeypatch.setattr(schedule, "SECTION_PROGRAMS", 4)
    assert schedule.grid(4, 2, 1) == (4, 1, 2)
    mask = None if bias is None else torch.randn(bias)
    both(leaves((4, 2, 1, 9, 11, 16, 16)), mask, Options(0.3))


@pytest.mark.parametrize("kernels", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("programs", [0, 3, 200], ids=["whole", "halves", "heads"])
def test_programs_that_share_the_query_heads_of_a_key_head(programs, kernels, monkeypatch):
    monkeypatch.setattr(schedule, "SPLIT_PROGRAMS", programs)
    assert schedule.parts(2, 4) == {0: 1, 3: 2, 200: 4}[programs]
    both(leaves((1, 4, 1, 37, 40, 16, 16 if kernels == 1 else 80), k=2), None, Options(0.3, offset=0))


@pytest.mark.skipif(DEVICE != "cpu", reason="the interpreter tells which program runs")
def test_programs_take_the_places_that_the_simulation_has(monkeypatch):
    shape = simulation.Shape(3, 4, 2, 100, head_size=16)
    expected = {launch.name: launch for launch in simulation.launches(shape, "interpreter")}
    names = {
        "_attention_fwd_kernel": "forward",
        "_attention_bwd_kv_kernel": "keys and values",
        "_attention_bwd_q_kernel": "queries",
    }
    from triton.runtime.interpreter import interpreter_builder

    places = {name: {} for name in (*names, "_attention_rows_kernel")}
    own_place = schedule.own_place

    def recorded(last_first):
        head, block = own_place(last_first)
        kernel = sys._getframe(1).f_code.co_name
        x, y, z = interpreter_builder.grid_idx
        places[kernel][z, y, x] = int(head), int(block)
        return head, block

    for kernel in (triton_module._attention_fwd_kernel, triton_module._attention_bwd_q_kernel):
        monkeypatch.setitem(kernel.fn.__globals__, "own_place", recorded)
    both(leaves((3, 4, 2, 100, 100, 16, 16)), None, Options(0.3, offset=0))
    for kernel, name in names.items():
        in_order = [place for _, place in sorted(places[kernel].items())]
        assert in_order == [(program.head, program.block) for program in expected[name].programs]


def test_grids():
    for batch, heads, blocks in itertools.product((1, 2, 6, 7, 64, 65537, 70000), (1, 4, 32), (1, 3, 32)):
        width, height, depth = schedule.grid(batch, heads, blocks)
        assert (width * depth, height) == (batch * heads, blocks) and width % heads == 0
        assert depth == 1 or (depth <= schedule.GRID_LIMIT and width * blocks >= schedule.SECTION_PROGRAMS)
    assert schedule.grid(0, 4, 3) == (0, 3, 0)
    with pytest.raises(
        ValueError, match=r"65535 blocks on the triton backend, got 65536: choose backend 'ref"
    ):
        schedule.grid(1, 1, 65536)


# -- bad input --------------------------------------------------------------------------------------------------------


def test_head_sizes_above_the_limit():
    q = aajr.dual(*torch.randn(2, 1, 1, 3, 257, device=DEVICE))
    with (
        aajr.use_backend("triton"),
        pytest.raises(BackendUnavailable, match=r"attention: .*up to 256.*257.*backend 'auto'"),
    ):
        aajr.attention(q, q, q)


@pytest.mark.parametrize(("room", "limit"), [(101_376, 128), (166_912, 256), (None, 256)])
def test_float32_heads_that_do_not_fit_into_the_memory_of_a_processor(room, limit, monkeypatch):
    """The memory of the device is read from torch; where torch does not say, the kernels are tried."""
    properties = SimpleNamespace() if room is None else SimpleNamespace(shared_memory_per_block_optin=room)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    for dtype, most in ((torch.float32, limit), (torch.bfloat16, 256)):
        x = SimpleNamespace(dtype=dtype, device=torch.device("cuda"))
        ask = lambda size, x=x: lacks_in_triton(
            SimpleNamespace(**vars(x), shape=(1, size)), None, SimpleNamespace(shape=(1, 3))
        )
        assert ask(most) is None
        assert f"takes head sizes up to {most}" in ask(most + 1)


def test_statistics_of_packed_launches_allocate_nothing_large():
    """Memory linear in the length: the forward of a long sequence, with nothing launched."""
    q = torch.empty(2, 1, 32, 65536, 128, device="meta", dtype=torch.bfloat16)
    with gpu.dry_run("sm_90") as launched:
        out, stats, mu = triton_module.attention_fwd(
            q, q[:, :, :8], q[:, :, :8], None, Options(0.1, offset=0)
        )
    assert len(launched) == 1
    assert stats.nbytes + mu.nbytes < out.nbytes / 20
