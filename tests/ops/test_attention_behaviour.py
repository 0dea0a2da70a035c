"""Attention beside its formula: plain tensors, transforms, memory, autocast, determinism, compilation, messages."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from assertions import assert_exact
from ops.attention_checks import OPTIONS, formula, make
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from aajr_kernels.dual import Dual
from aajr_kernels.ops.attention import attention, tiling
from aajr_kernels.ops.attention.options import visible_pairs


@pytest.mark.parametrize("sizes", [(0, 2, 1, 3, 3), (1, 2, 1, 0, 3), (1, 2, 1, 3, 0)], ids=str)
def test_empty_inputs(sizes):
    case = make(sizes=(*sizes, 4, 5))
    out = case.ours(causal=True)
    assert out.shape == (2, sizes[0], 2, sizes[3], 5) and not out.any()
    grads = case.gradients(out, torch.ones_like(out))
    assert all(grads[n].shape == x.shape and not grads[n].any() for n, x in case.leaves.items())


@pytest.mark.parametrize("options", [*OPTIONS, {"causal": True, "mask": "random"}], ids=str)
def test_plain_tensors_in_plain_tensors_out(options):
    if "mask" in options:
        options = {**options, "mask": torch.rand(13, 11) > 0.3}
    case = make()
    q, k, v = (x[0].detach().requires_grad_() for x in case.leaves.values())
    out = attention(q, k, v, **options)
    assert isinstance(out, Tensor)
    expected = formula(q, k, v, **options)
    assert_exact(out, expected, tolerance=1e-12)
    assert torch.allclose(attention(Dual(case.leaves["q"]), k, v, **options).primal, out)
    out_bar = torch.randn_like(out)
    for got, expected_gradient in zip(
        torch.autograd.grad(out, (q, k, v), out_bar),
        torch.autograd.grad(expected, (q, k, v), out_bar),
        strict=True,
    ):
        assert_exact(got, expected_gradient, tolerance=1e-11)


def test_plain_tensors_with_bias_and_no_keys():
    case = make((0, 0, 0), (4, 13, 11))
    q, k, v, bias = (x[0] for x in case.leaves.values())
    assert_exact(attention(q, k, v, mask=bias, causal=True), formula(q, k, v, bias, causal=True))
    longer = attention(v.repeat_interleave(2, 1), v[:, :, :4], v[:, :, :4], causal="lower_right")
    assert not longer[:, :, :7].any() and longer[:, :, 7:].all()


def test_transforms_of_torch_give_the_right_tangent_or_an_error():
    case = make()
    q, k, v = (x[0].detach() for x in case.leaves.values())
    for options in ({}, {"softcap": 2.0}, {"causal": True, "window": 2}):
        try:
            tangent = torch.func.jvp(
                lambda x, o=options: attention(x, k, v, **o), (q,), (torch.ones_like(q),)
            )[1]
        except (RuntimeError, NotImplementedError):
            continue
        expected = torch.func.jvp(lambda x, o=options: formula(x, k, v, **o), (q,), (torch.ones_like(q),))[1]
        assert_exact(tangent, expected)
    with torch.autograd.forward_ad.dual_level():
        x = torch.autograd.forward_ad.make_dual(q, torch.ones_like(q))
        with pytest.raises((RuntimeError, NotImplementedError)):
            attention(x, k, v, softcap=2.0)
    with pytest.raises(RuntimeError):
        torch.func.vmap(lambda x: attention(x, k, v, softcap=2.0))(torch.stack([q, q]))


class _Largest(TorchDispatchMode):
    """The largest tensor any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(x, Tensor):
                self.numel = max(self.numel, x.untyped_storage().nbytes() // max(1, x.element_size()))
        return result


def test_memory_is_linear_in_the_length(monkeypatch):
    monkeypatch.setattr(tiling, "TILE_ROWS", 16)
    monkeypatch.setattr(tiling, "TILE_NUMEL", 1 << 12)
    largest = {}
    for n in (256, 512):
        case = make(sizes=(1, 2, 1, n, n, 4, 4)).to(torch.float32)
        with _Largest() as recorder:
            out = case.ours(causal=True)
            case.gradients(out, out.detach())
        largest[n] = recorder.numel
    assert largest[512] <= 16 * 512 < 512 * 512 // 16
    assert largest[512] <= 2 * largest[256]


def test_autocast_casts_products_and_keeps_the_mask():
    case = make(sizes=(1, 2, 1, 9, 9, 8, 8)).to(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = case.ours(causal=True)
    assert out.dtype == torch.bfloat16
    low = case.to(torch.bfloat16)
    assert torch.equal(out, low.ours(causal=True))
    got = case.gradients(out, torch.ones_like(out))
    assert all(got[n].dtype == torch.float32 for n in "qkv")


def test_two_runs_are_bitwise_equal():
    case = make((2, 2, 2), "square").to(torch.float32)
    runs = []
    for _ in range(2):
        out = case.ours(softcap=3.0)
        runs.append([out, *case.gradients(out, torch.ones_like(out)).values()])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # raised inside Dynamo
def test_compiles_without_a_graph_break():
    case = make(sizes=(1, 4, 2, 9, 9, 4, 4))
    leaves = list(case.leaves.values())

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(Dual(q), Dual(k), Dual(v), causal=True, softcap=2.0).stacked

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    out, expected = compiled(*leaves), call(*leaves)
    assert_exact(out, expected)
    for got, expected_gradient in zip(
        torch.autograd.grad(out, leaves, out.detach()),
        torch.autograd.grad(expected, leaves, out.detach()),
        strict=True,
    ):
        assert_exact(got, expected_gradient)


def _bad() -> list[tuple[str, type[Exception], dict[str, Any], str]]:
    q, k = torch.randn(2, 1, 4, 5, 6), torch.randn(2, 1, 2, 7, 6)
    good: dict[str, Any] = {"q": Dual(q), "k": Dual(k), "v": Dual(k)}
    return [
        ("no tensor", TypeError, {**good, "v": 3}, "v must be a Tensor or a Dual, got int"),
        ("integers", TypeError, {**good, "k": k[0].long()}, "k must be float64"),
        ("dtype", TypeError, {**good, "k": Dual(k.double())}, "k must have the dtype of q"),
        ("two axes", ValueError, {**good, "q": Dual(q[:, 0, 0])}, "q must be .*heads"),
        ("batch", ValueError, {**good, "k": Dual(k.expand(2, 3, 2, 7, 6))}, "batch axes"),
        ("length", ValueError, {**good, "v": Dual(k[..., :3, :])}, "k and v must agree"),
        ("features", ValueError, {**good, "k": Dual(k[..., :4])}, "equally many features"),
        ("heads", ValueError, {**good, "q": Dual(q[:, :, :3])}, "multiple"),
        ("K", ValueError, {**good, "k": Dual(k[[0, 1, 1]])}, "1 and 2 tangents"),
        (
            "mask shape",
            ValueError,
            {**good, "mask": torch.zeros(5, 6)},
            r"mask must be broadcastable .*\(5, 6\)",
        ),
        ("mask axes", ValueError, {**good, "mask": torch.zeros(1, 1, 1, 5, 7)}, "mask must be broadcastable"),
        ("mask dtype", TypeError, {**good, "mask": torch.ones(5, 7).long()}, "mask must be bool"),
        ("mask type", TypeError, {**good, "mask": [[True]]}, "mask must be a Tensor"),
        ("causal", ValueError, {**good, "causal": "left"}, "causal must be"),
        ("softcap", ValueError, {**good, "softcap": 0.0}, "softcap must be positive"),
        ("window", ValueError, {**good, "window": 3}, "needs causal"),
        ("window size", ValueError, {**good, "window": 0, "causal": True}, "window must be a positive int"),
        ("dropout", ValueError, {**good, "dropout": 1.5}, "dropout must be a probability"),
        ("device", ValueError, {**good, "k": Dual(k.to("meta"))}, "k must be on the device of q"),
    ]


@pytest.mark.parametrize("bad", _bad(), ids=lambda bad: bad[0])
def test_error_messages(bad):
    _, error, arguments, message = bad
    with pytest.raises(error, match=message) as caught:
        attention(**arguments)
    assert str(caught.value).startswith(("attention: ", "Duals with")) and "\n" not in str(caught.value)


@pytest.mark.parametrize("offset", [None, 0, -3, 4])
@pytest.mark.parametrize("window", [None, 1, 5])
def test_visible_pairs_counts_what_the_mask_leaves(offset, window):
    key, last = torch.arange(7), torch.arange(9)[:, None] + (offset or 0)
    if offset is None:
        assert visible_pairs(9, 7, None, None) == 63
        return
    allowed = (key <= last) & (key > last - (window or 100))
    assert visible_pairs(9, 7, offset, window) == allowed.sum().item()
