"""A Dual whose stack holds only the primal: every rule gives the plain result, as a Dual without tangents."""

from __future__ import annotations

import pytest
import torch
import torch.utils._pytree as pytree
from rules import cases, cases_attention, cases_layers  # noqa: F401  the last two fill the table

import aajr_kernels as aajr
from aajr_kernels import Dual


def alone(x: torch.Tensor) -> Dual:
    return Dual(x.unsqueeze(0))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", cases.CASES, ids=[case.name for case in cases.CASES])
def test_function(case: cases.Case) -> None:
    clones = [x.clone() if isinstance(x, torch.Tensor) else x for x in case.inputs]
    values = [alone(x) if i in case.duals else x for i, x in enumerate(clones)]
    got = pytree.tree_leaves(case.fn(*values), is_leaf=aajr.is_dual)
    expected = pytree.tree_leaves(
        case.fn(*(x.clone() if isinstance(x, torch.Tensor) else x for x in case.inputs))
    )
    assert len(got) == len(expected)
    for y, want in zip(got, expected):
        if isinstance(y, Dual):
            assert y.num_tangents == 0
            y = y.stacked[0]
        if isinstance(want, torch.Tensor):
            torch.testing.assert_close(y, want, rtol=1e-9, atol=1e-11)


OPS = {
    "attention": lambda d, x, w: aajr.attention(d(x), d(x), x, causal=True),
    "attention, bias": lambda d, x, w: aajr.attention(x, x, x, mask=d(x @ x.mT)),
    "attention, packed": lambda d, x, w: aajr.attention(d(x)[:1], x[:1], x[:1], cu_seqlens=torch.tensor([0, 2, 5])),
    "rms_norm": lambda d, x, w: aajr.rms_norm(d(x), 4, w),
    "layer_norm": lambda d, x, w: aajr.layer_norm(d(x), 4, w, w),
    "gelu": lambda d, x, w: aajr.gelu(d(x)),
    "swiglu": lambda d, x, w: aajr.swiglu(d(x), x),
    "geglu": lambda d, x, w: aajr.geglu(x, d(x)),
    "rotary": lambda d, x, w: aajr.rotary(d(x), w.expand(2, 5, 4), w.expand(2, 5, 4)),
    "linear": lambda d, x, w: aajr.linear(d(x), w.expand(3, 4)),
    "sdpa": lambda d, x, w: torch.nn.functional.scaled_dot_product_attention(d(x), d(x), x),
}  # fmt: skip


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_our_ops_and_their_gradients(name: str, dtype: torch.dtype) -> None:
    x, w = torch.randn(2, 3, 5, 4, dtype=dtype), torch.randn(4, dtype=dtype)
    results = []
    for wrap in (alone, lambda x: x):
        leaves = [x.clone().requires_grad_(), w.clone().requires_grad_()]
        y = OPS[name](wrap, *leaves)
        assert isinstance(y, Dual) == (wrap is alone)
        y = y.stacked[0] if isinstance(y, Dual) else y
        grads = torch.autograd.grad(y, leaves, torch.linspace(-1, 1, y.numel(), dtype=dtype).view(y.shape),
                                    allow_unused=True)  # fmt: skip
        results.append([y, *(g for g in grads if g is not None)])
    for mine, plain in zip(*results, strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-4 if dtype == torch.float32 else 1e-10, atol=1e-5)


@pytest.mark.parametrize(
    "function", [torch.add, torch.mul, torch.matmul, torch.where, aajr.swiglu], ids=lambda f: f.__name__
)
@pytest.mark.parametrize("swap", [False, True])
def test_beside_a_dual_with_tangents_it_raises(function: object, swap: bool) -> None:
    x = torch.randn(3, 3)
    pair = (alone(x), aajr.dual(x, x))
    pair = pair[::-1] if swap else pair
    call = (lambda a, b: torch.where(x > 0, a, b)) if function is torch.where else function
    with pytest.raises(ValueError, match="tangents meet"):
        call(*pair)  # type: ignore[operator]
