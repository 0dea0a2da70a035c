"""The CUDA C++ kernels on the host, beyond the shared suite: their choice, odd memory, sizes, barriers, tracing."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from assertions import assert_within_budget
from backends import cuda_host, operator_calls
from ops.suite import DTYPES, Target, check

import aajr_kernels as aajr
from aajr_kernels import BackendUnavailable, Dual
from aajr_kernels.backends import choice, cuda
from aajr_kernels.backends import cpu as native
from aajr_kernels.ops.norm import cuda as norm
from aajr_kernels.ops.norm import reference as norm_reference
from aajr_kernels.ops.sensitivity import cuda as reduce
from aajr_kernels.ops.sensitivity import sensitivity, softmax
from aajr_kernels.testing.cases.case import outcome
from aajr_kernels.testing.cases.rows import layer, reduction, rms

TARGET = Target("cuda")
on_host = pytest.mark.skipif(
    cuda_host.why_not() is not None or TARGET.device != "cpu",
    reason=cuda_host.why_not() or "with a device the kernels run there",
)


def everywhere(test):
    """On the device too, where there is one, and under compute-sanitizer: blocks of many warps, several tiles."""
    marks = [
        pytest.mark.sanitizer,
        pytest.mark.skipif(TARGET.why_not("norm") is not None, reason=str(TARGET.why_not("norm"))),
    ]
    return pytest.mark.parametrize("target", [pytest.param(TARGET, id="cuda", marks=marks)])(test)


@pytest.fixture
def host():
    """The module for the host, chosen by name."""
    with cuda_host.loaded() as module, aajr.use_backend("cuda"):
        yield module


# --------------------------------------------------------------------------------------------------- the choice
@pytest.mark.skipif(cuda.missing() is None, reason="the CUDA module can run here")
def test_without_the_module_the_name_is_refused_with_the_reason():
    reason = choice.backends()["cuda"]
    assert reason
    with pytest.raises(BackendUnavailable, match="backend 'cuda' cannot run here: ") as error:
        aajr.use_backend("cuda")
    assert reason.rstrip(".") in str(error.value)


@pytest.mark.parametrize("reason", [None, "no CUDA compiler was found"])
def test_a_module_that_was_not_built_says_why(monkeypatch, reason):
    def absent():
        raise ModuleNotFoundError("No module named 'aajr_kernels._cuda'", name="aajr_kernels._cuda")

    monkeypatch.setattr(cuda, "module", absent)
    monkeypatch.setattr(native, "build_info", lambda: {"cuda_reason": reason})
    assert cuda.missing() == f"this installation has no CUDA module: {reason or cuda.UNBUILT}"


def test_a_file_that_is_no_module_is_named(monkeypatch, tmp_path):
    path = tmp_path / "_cuda.so"
    path.write_bytes(b"no library")
    monkeypatch.setenv("AAJR_CUDA_MODULE", str(path))
    cuda.module.cache_clear()
    try:
        assert f"AAJR_CUDA_MODULE={path}: " in str(cuda.missing())
    finally:
        cuda.module.cache_clear()


@on_host
def test_what_has_no_such_kernels_goes_where_auto_sends_it(host):
    x = Dual(torch.randn(2, 3, 5, 8))
    with aajr.coverage() as seen:
        y = aajr.rms_norm(x, 8)
        aajr.gelu(y)
        softmax(y)
        sensitivity(y, "fisher")
    ran = dict(seen.entries.keys())
    assert ran["rms_norm"] == ran["sensitivity"] == "cuda"
    with aajr.use_backend("auto"):
        expected = choice.select_backend("activation", x.stacked)
    assert ran["gelu"] == ran["softmax"] == expected != "cuda"


@on_host
@pytest.mark.parametrize(
    ("tensor", "words"),
    [
        (torch.zeros(2, 3, 8, dtype=torch.float64), "a tensor of torch.float64: cast it to float32"),
        (torch.zeros(2, 3, 8, device="meta"), "a tensor on meta: move it to a cpu device"),
    ],
    ids=["float64", "meta"],
)
def test_tensors_that_they_do_not_take_are_refused(host, tensor, words):
    with pytest.raises(BackendUnavailable, match=words):
        aajr.rms_norm(Dual(tensor), 8)


@on_host
def test_for_devices_a_tensor_on_the_cpu_is_refused(monkeypatch):
    monkeypatch.setattr(cuda, "module", lambda: type("Module", (), {"host": False}))
    assert cuda.why_not(torch.zeros(2)) == "a tensor on cpu: move it to a CUDA device"


@on_host
def test_a_wrong_device_is_an_error(host):
    x, y = torch.randn(2, 3, 8), torch.empty(2, 3, 8)
    views = [*map(native.view, (x, y, torch.empty(2, 3))), None, None, None, None]
    for device, words in (
        (3, "there is no device 3"),
        (-1, "must be an ordinal, got -1"),
        (2**40, "ordinal"),
    ):
        with pytest.raises(ValueError, match=words):
            host.norm_fwd(tuple(views), (0, device, 0), (1e-5, 0.0), 1)


# --------------------------------------------------------------------------------------------- memory and sizes
@on_host
@pytest.mark.parametrize("shape", [(2, 0, 8), (1, 3, 8), (2, 3, 0), (3, 2, 0, 8)])
def test_no_rows_no_columns_and_no_tangents(host, shape):
    x = torch.randn(shape, requires_grad=True)
    w = torch.randn(shape[-1], requires_grad=True)
    y = aajr.rms_norm(Dual(x), shape[-1], w)
    grads = torch.autograd.grad(y.stacked.sum(), (x, w))
    assert y.stacked.shape == x.shape and all(torch.isfinite(g).all() for g in grads)
    q = sensitivity(Dual(x), "l2")
    assert q.shape == (shape[0] - 1, *shape[1:-1])
    (grad,) = torch.autograd.grad(q.sum(), x)
    assert torch.equal(grad[0], torch.zeros_like(grad[0]))


@on_host
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_memory_that_is_not_aligned_to_sixteen_bytes(host, dtype):
    """The results of an aligned copy, bit by bit or within the rounding of another order of sums."""

    def crooked(t):
        return torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape)

    x, w = torch.randn(3, 5, 64).to(dtype), torch.randn(64)
    assert crooked(x).data_ptr() % 16 and crooked(w).data_ptr() % 16
    y, stats, _ = norm.norm_fwd(x, w, None, 1e-5, 0.0, True)
    for inputs in ((crooked(x), w), (x, crooked(w)), (crooked(x), crooked(w))):
        actual = norm.norm_fwd(*inputs, None, 1e-5, 0.0, True)
        torch.testing.assert_close(actual[0], y, rtol=8e-3 if dtype == torch.bfloat16 else 1e-3, atol=1e-3)
        torch.testing.assert_close(actual[1], stats, rtol=1e-5, atol=1e-5)
    q = reduce.sensitivity_fwd(x, "fisher")
    torch.testing.assert_close(reduce.sensitivity_fwd(crooked(x), "fisher"), q, rtol=1e-5, atol=1e-6)


@on_host
def test_elements_past_two_to_the_31(host):
    """Rows that lie 2^30 elements apart, in memory whose other pages are never touched."""
    far = 2**30
    memory = torch.from_numpy(np.zeros(2 * (5 * far + 64), dtype=np.uint8)).view(torch.bfloat16)
    x = memory.as_strided((2, 3, 64), (far, 2 * far, 1))
    near = torch.randn(2, 3, 64).bfloat16()
    x.copy_(near)
    w = torch.randn(64)
    for got, expected in zip(
        norm.norm_fwd(x, w, None, 1e-5, 0.0, False)[:2], norm.norm_fwd(near, w, None, 1e-5, 0.0, False)[:2]
    ):
        assert torch.equal(got, expected)
    bar = torch.randn(2, 3, 64).bfloat16()
    stats = norm.norm_fwd(near, w, None, 1e-5, 0.0, False)[1]
    for got, expected in zip(
        norm.norm_bwd(bar, x, w, stats, 0.0, False, True, True, False),
        norm.norm_bwd(bar, near, w, stats, 0.0, False, True, True, False),
    ):
        assert (got is None and expected is None) or torch.equal(got, expected)
    q_bar = torch.randn(1, 3)
    assert torch.equal(reduce.sensitivity_fwd(x, "fisher"), reduce.sensitivity_fwd(near, "fisher"))
    assert torch.equal(
        reduce.sensitivity_bwd(q_bar, x, "fisher"), reduce.sensitivity_bwd(q_bar, near, "fisher")
    )


@on_host
def test_more_rows_than_a_grid_has_blocks_are_refused(host):
    rows = torch.zeros(8).as_strided((2, 2**31, 8), (0, 0, 1))
    with pytest.raises(
        ValueError, match=r"at most 2147483647 rows of this length, got 2147483648: split the batch"
    ):
        cuda.call("sensitivity_fwd", (rows, torch.zeros(1), torch.zeros(1)), (0,))


@on_host
def test_more_tangents_than_a_block_has_memory_are_refused(host):
    with pytest.raises(ValueError, match="at most 2048 tangents, got 2049"):
        aajr.rms_norm(Dual(torch.zeros(2050, 1, 8)), 8)


@everywhere
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("metric", ["l2", "fisher", "probs"])
@pytest.mark.parametrize("size", [8191, 8192, 8193, 20000])
def test_rows_of_one_tile_and_of_several(metric, size, k, target):
    check(reduction(metric, f"{size}", 2, size, scale=4.0), target, k, torch.float32)


@everywhere
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("size", [640, 4096, 4104, 9000, 16392])
def test_rows_that_registers_hold_and_longer_ones(size, k, target):
    for case in (rms(f"{size}", size, batch=(3,)), layer(f"{size}", size, batch=(3,))):
        check(case, target, k, torch.bfloat16)


@on_host
@pytest.mark.parametrize("shift", [1e3, -1e3])
def test_large_means_of_a_row_and_its_tangents_cancel_nothing(host, shift):
    x, weight, bias = torch.randn(3, 7, 640), torch.randn(640), torch.randn(640)
    x += shift
    got, eager, exact = (
        backend.norm_fwd(*args, 1e-5, 0.0, True)[0]
        for backend, args in (
            (norm, (x, weight, bias)),
            (norm_reference, (x, weight, bias)),
            (norm_reference, (x.double(), weight.double(), bias.double())),
        )
    )
    assert_within_budget(got, eager, exact, "y")


@on_host
def test_a_block_reads_no_peak_of_a_larger_one_before(host):
    small = torch.randn(2, 1, 2050)
    with aajr.use_backend("reference"):
        expected = sensitivity(Dual(small.double()), "fisher").float()
    for size in (8192, 4096, 3000):
        sensitivity(Dual(1e4 + torch.randn(2, 1, size)), "fisher")
        torch.testing.assert_close(sensitivity(Dual(small), "fisher"), expected, rtol=1e-5, atol=1e-6)


@on_host
def test_words_that_cannot_be_chosen(host):
    """A vocabulary that is masked in part, even all of a tile; a row with no finite logit is NaN, as in torch."""
    y = torch.randn(2, 3, 20000)
    y[0, :2, 5000:] = -torch.inf
    y[0, 1, :17] = -torch.inf
    q = sensitivity(Dual(y), "fisher")
    with aajr.use_backend("reference"):
        expected = sensitivity(Dual(y.double()), "fisher").float()
    torch.testing.assert_close(q, expected, rtol=1e-5, atol=1e-6)
    assert sensitivity(
        Dual(torch.full((2, 1, 9000), -torch.inf).index_fill(0, torch.tensor(1), 1.0)), "fisher"
    ).isnan()


@on_host
def test_a_common_offset_of_logits_or_tangents_cancels_no_digits(host):
    torch.manual_seed(0)
    y = torch.randn(2, 2, 9001)
    q = sensitivity(Dual(y), "fisher")
    for shift in ((3e3, 0.0), (0.0, 3e3)):
        moved = (y.double() + torch.tensor(shift, dtype=torch.float64).view(2, 1, 1)).float()
        back = moved.double() - torch.tensor(shift, dtype=torch.float64).view(2, 1, 1)
        with aajr.use_backend("reference"):
            exact = sensitivity(Dual(back), "fisher").float()
        torch.testing.assert_close(sensitivity(Dual(moved), "fisher"), exact, rtol=2e-6, atol=0.0)
    assert q.shape == (1, 2)


# --------------------------------------------------------------------------------------- order, barriers, tracing
@on_host
@pytest.mark.parametrize(
    "case",
    [rms("order", 640, batch=(19,)), layer("order", 8200, batch=(5,)), reduction("probs", "order", 3, 9001)],
    ids=str,
)
def test_the_order_of_threads_between_barriers_does_not_matter(host, case):
    """Bit by bit: a barrier that is missing would let a thread read what another has not written yet."""
    inputs, params = ([t.float() for t in ts] for ts in case.build(3))
    cotangent = torch.randn(case.ours(inputs, params).shape)
    forwards = outcome(case.ours, inputs, params, cotangent)
    host.run_backwards(True)
    try:
        backwards = outcome(case.ours, inputs, params, cotangent)
    finally:
        host.run_backwards(False)
    assert torch.equal(forwards.y, backwards.y)
    assert all(torch.equal(a, b) for a, b in zip(forwards.gradients, backwards.gradients))


@on_host
@pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)], ids=str
)
def test_every_operator_passes_opcheck(host, dtype):
    calls = [
        (func, args)
        for func, args in operator_calls.calls_on("cuda", dtype, ("norm", "sensitivity"))
        if operator_calls.name_of(func).startswith("aajr::cuda_")
    ]
    assert {operator_calls.name_of(func) for func, _ in calls} == set(cuda.operator.names)
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    for func, args in calls:
        report = torch.library.opcheck(
            func, operator_calls.plain(args), test_utils=checks, raise_exception=False
        )
        assert report == dict.fromkeys(checks, "SUCCESS"), (str(func), report)


@on_host
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # raised by Dynamo
def test_compiled_through_the_door_that_users_take(monkeypatch):
    """The module is imported, not put in place; one graph for all numbers of rows, and the gradients of eager code."""
    module = cuda_host.module()
    monkeypatch.setitem(sys.modules, "aajr_kernels._cuda", module)
    monkeypatch.delenv("AAJR_CUDA_MODULE", raising=False)
    cuda.module.cache_clear()
    torch.compiler.reset()
    try:
        with aajr.use_backend("cuda"):
            assert cuda.module() is module

            def loss(x, v, w):
                d = aajr.rms_norm(aajr.dual(x, v), 8, w)
                return sensitivity(d, "fisher").sum() + d.primal.square().mean()

            step = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
            w = torch.randn(8, requires_grad=True)
            with torch._dynamo.config.patch(error_on_recompile=True):
                for rows in (3, 7, 100):
                    leaves = [*(t.requires_grad_() for t in torch.randn(2, rows, 8).unbind()), w]
                    leaves = [t.detach().requires_grad_() for t in leaves]
                    got, expected = step(*leaves), loss(*leaves)
                    assert torch.equal(got, expected)
                    for a, b in zip(torch.autograd.grad(got, leaves), torch.autograd.grad(expected, leaves)):
                        assert torch.equal(a, b)
    finally:
        cuda.module.cache_clear()
        torch.compiler.reset()


@pytest.mark.parametrize(
    ("architectures", "capability", "runs"),
    [
        (["80-real", "90-real"], (8, 6), True),
        (["80-real", "90-real"], (9, 0), True),
        (["90-real"], (8, 0), False),
        (["80-real", "90-real"], (12, 0), False),
        (["80-real", "90-virtual"], (12, 0), True),
        (["90"], (11, 0), True),
        (["120-real", "120-virtual"], (11, 0), False),
    ],
)
def test_processors_that_a_module_has_code_for(architectures, capability, runs):
    assert cuda.covers(architectures, capability) is runs


@on_host
def test_tensors_in_different_places_never_become_addresses(host):
    x = torch.randn(2, 3, 8)
    with pytest.raises(ValueError, match="norm_fwd: all tensors must be on one cpu device, got cpu, meta"):
        norm.norm_fwd(x, torch.empty(8, device="meta"), None, 1e-5, 0.0, False)


@on_host
def test_integers_are_refused_with_the_remedy(host):
    with pytest.raises(BackendUnavailable, match="a tensor of torch.int32: cast it to float32"):
        sensitivity(Dual(torch.ones(2, 3, 4, dtype=torch.int32)), "l2")


@on_host
@pytest.mark.parametrize("size", [300, 20000])
def test_large_tangents_of_words_that_cannot_be_chosen(host, size):
    """No probability of zero is multiplied with an overflow."""
    y = torch.randn(2, 3, size)
    y[0, :, size // 2 :] = -torch.inf
    y[1, :, size // 2 :] = 1e20
    y.requires_grad_()
    q = sensitivity(Dual(y), "fisher")
    (grad,) = torch.autograd.grad(q.sum(), y)
    kept = y.detach()[:, :, : size // 2].double().requires_grad_()
    with aajr.use_backend("reference"):
        exact = sensitivity(Dual(kept), "fisher")
    (exact_grad,) = torch.autograd.grad(exact.sum(), kept)
    torch.testing.assert_close(q.double(), exact, rtol=1e-5, atol=0)
    torch.testing.assert_close(grad[:, :, : size // 2].double(), exact_grad, rtol=1e-4, atol=1e-8)
    assert not grad[:, :, size // 2 :].any()


@on_host
def test_a_residual_of_one_stack(host):
    """x or the residual may be a constant beside the other's tangents."""
    x, r, w = torch.randn(3, 2, 40), torch.randn(3, 2, 40), torch.randn(40)
    for a, b in ((x, r[:1]), (x[:1], r)):
        actual = norm.norm_fwd(a, w, None, 1e-5, 0.0, False, b)
        wide = norm_reference.norm_fwd(a.double(), w.double(), None, 1e-5, 0.0, False, b.double())
        for got, exact in zip(actual, wide):
            torch.testing.assert_close(got.double(), exact.view(got.shape), rtol=1e-5, atol=1e-5)
