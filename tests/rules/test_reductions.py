"""Reductions over no axes, over all and over one, with every order and option, for one tangent and for several.

A 0-dimensional Dual has no axis of its own but still a stack axis, which no reduction may touch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree
from ops.op_checks import check_low
from torch import Tensor, linalg

from aajr_kernels import Dual, dual, is_dual
from aajr_kernels.torch_private import VERSION

INF = float("inf")
ORDERS = (0, 0.5, 1, 1.5, 2, 3, -0.5, -1, -2, INF, -INF)
ZERO = torch.zeros((), dtype=torch.float64)

#: name -> function of x and the keywords of one reduction
REDUCTIONS: dict[str, Callable[..., Any]] = {
    name: getattr(torch, name)
    for name in """sum mean amax amin logsumexp nansum nanmean prod var std var_mean std_mean max min median nanmedian
    cumsum cumprod cummax cummin logcumsumexp softmax log_softmax sort mode""".split()
}
if VERSION > (2, 11):  # which has no forward mode of it
    REDUCTIONS["aminmax"] = torch.aminmax
for _order in ORDERS:
    REDUCTIONS[f"linalg.vector_norm({_order})"] = lambda x, p=_order, **named: linalg.vector_norm(
        x, p, **named
    )
    REDUCTIONS[f"dist({_order})"] = lambda x, p=_order: torch.dist(x, ZERO + 0.1, p)
for _order in (0, 3, INF):
    REDUCTIONS[f"norm({_order})"] = lambda x, p=_order, **named: torch.norm(x, p, **named)
    REDUCTIONS[f"linalg.norm({_order})"] = lambda x, p=_order, **named: linalg.norm(x, p, **named)
    REDUCTIONS[f"F.normalize({_order})"] = lambda x, p=_order, **named: F.normalize(x, p, **named)
REDUCTIONS |= {
    "linalg.norm": linalg.norm,
    "kthvalue": lambda x, **named: x.kthvalue(1, **named),
    "topk": lambda x, **named: x.topk(1, **named),
    "F.softmin": F.softmin,
    "F.cosine_similarity": lambda x, **named: F.cosine_similarity(x, 2 * x + 0.1, **named),
    "var(correction=0)": lambda x, **named: torch.var(x, correction=0, **named),
    "std(correction=0.5)": lambda x, **named: torch.std(x, correction=0.5, **named),
    "sum(float32)": lambda x, **named: torch.sum(x, dtype=torch.float32, **named),
    "prod(float32)": lambda x, **named: torch.prod(x, dtype=torch.float32, **named),
    "norm(float64)": lambda x, **named: torch.norm(x.float(), 3, dtype=torch.float64, **named),
    "roll": lambda x, dim=None: x.roll(1, dim),
}
SHAPES: tuple[tuple[int, ...], ...] = ((), (2, 3))
AXES: tuple[dict[str, Any], ...] = ({}, *({"dim": dim} for dim in (None, (), [], 0, -1, (-1,), (0, 1))))
#: upstream's forward mode of a moment over an empty list of axes divides by one element instead of by all
MOMENTS = ("var", "std")


def _floats(result: Any) -> list[Any]:
    leaves = pytree.tree_leaves(result, is_leaf=is_dual)
    return [y for y in leaves if isinstance(y, (Tensor, Dual)) and y.is_floating_point()]


def _upstream(f: Callable[[Tensor], Any], x: Tensor, v: Tensor) -> list[tuple[Tensor, Tensor]] | None:
    """(value, tangents) of every output by torch.func.jvp; None for what torch refuses."""
    try:
        runs = [torch.func.jvp(lambda z: tuple(_floats(f(z))), (x,), (direction,)) for direction in v]
    except (RuntimeError, IndexError, TypeError, ValueError):
        return None
    return [(y, torch.stack([run[1][i] for run in runs])) for i, y in enumerate(runs[0][0])]


@pytest.mark.filterwarnings("ignore:.*degrees of freedom", "ignore:Implicit dimension choice")
@pytest.mark.parametrize("name", REDUCTIONS)
def test_no_reduction_touches_the_stack_axis(name: str) -> None:
    """Values, tangents and gradients are torch's for every shape, every form of the axes and K of 1 and 2."""
    generator, function, compared = torch.Generator().manual_seed(4), REDUCTIONS[name], 0
    for shape in SHAPES:
        x = torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
        for axes in AXES:
            same = {"dim": None} if name.startswith(MOMENTS) and axes.get("dim") in ((), []) else axes
            for keep in ({}, {"keepdim": True}):
                v = torch.randn(2, *shape, generator=generator, dtype=torch.float64).requires_grad_()
                expected = _upstream(lambda z: function(z, **same, **keep), x, v)
                if expected is None:
                    continue
                for k in (1, 2):
                    ours = _floats(function(dual(x, v[:k]), **axes, **keep))
                    assert len(ours) == len(expected)
                    where = f"{name} of {shape} with {axes | keep}, K = {k}"
                    for y, (value, tangents) in zip(ours, expected):
                        compared += 1
                        assert y.dtype == value.dtype, where
                        _same(f"{where}: value", y.primal, value)
                        _same(f"{where}: tangents", y.tangents, tangents[:k])
                        if value.requires_grad and tangents.requires_grad and value.isfinite().all():
                            _same_gradients(where, (y.primal, y.tangents), (value, tangents[:k]), (x, v))
    assert compared >= 4, f"{name}: torch accepted {compared} of the calls."


def _same(where: str, got: Tensor, want: Tensor) -> None:
    assert got.shape == want.shape, f"{where}: shape {tuple(got.shape)}, expected {tuple(want.shape)}"
    tolerance = 1e-6 if "float" in where else 1e-10  # of the dtypes that the names of the calls hold
    want = want.to(got.dtype)  # upstream's tangent has the dtype of x where the result has another
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance, equal_nan=True, msg=where)


def _same_gradients(where: str, ours: Any, upstream: Any, leaves: Any) -> None:
    """Of a functional that is quadratic in the tangents; upstream's own is compared where it is finite."""
    gradients = [
        torch.autograd.grad(
            y.double().cos().sum() + 0.5 * t.double().square().sum() + (3 * t.double()).sin().sum(),
            leaves,
            retain_graph=True,
            allow_unused=True,
        )
        for y, t in (ours, upstream)
    ]
    for name, got, want in zip(("x", "v"), *gradients):
        want = torch.zeros(()) if want is None else want
        if want.isfinite().all():
            got = torch.zeros_like(want) if got is None else got
            _same(f"{where}: gradient of {name}", got, want.expand(got.shape))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("level", [10.0, 100.0, 1e4])
def test_weights_of_a_logsumexp_sum_to_one_at_any_level(dtype: torch.dtype, level: float) -> None:
    """Shifting all logits by t shifts every logsumexp by t, so a direction of ones has a tangent of ones."""
    x = torch.full((5,), level, dtype=dtype) + torch.arange(5).to(dtype) * 0.25
    d = dual(x, torch.ones_like(x))
    for y in (torch.logsumexp(d, 0), torch.logcumsumexp(d, 0), torch.logaddexp(d[:2], d[3:])):
        assert y.dtype == dtype
        torch.testing.assert_close(
            y.tangent.double(), torch.ones_like(y.tangent).double(), rtol=0, atol=2 * torch.finfo(dtype).eps
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [2, 3, 5, 700])
@pytest.mark.parametrize(("mean", "along"), [(0.0, 0.0), (10.0, 0.0), (0.0, 1e3), (10.0, 10.0), (1e3, 1e3)])
def test_moments_beside_large_means(dtype: torch.dtype, size: int, mean: float, along: float) -> None:
    """Centred values add up to zero but for the rounding of their mean, which a mean of the tangents must not meet."""
    torch.manual_seed(11)
    x = torch.randn(3, 8, size, dtype=torch.float64)
    x[0] = torch.linspace(-4, 4, size) * (1 + torch.rand(8, 1))  # not constant in any dtype
    x += torch.tensor([mean, along, -along]).view(3, 1, 1)

    def variance(z: Tensor) -> Tensor:
        return (z - z.mean(-1, keepdim=True)).square().sum(-1) / (size - 1)

    widened = lambda formula: lambda z: formula(z.float()).to(z.dtype)
    for op, formula in ((torch.var, variance), (torch.std, lambda z: variance(z).sqrt())):
        check_low(lambda z, f=op: f(z, -1), widened(formula), [x], [], dtype, formula)


@pytest.mark.parametrize("p", [order for order in ORDERS if order >= 0])
@pytest.mark.parametrize("k", [1, 3])
def test_distances_of_every_order_keep_k(p: float, k: int) -> None:
    generator = torch.Generator().manual_seed(7)
    x, y = (torch.randn(3, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    v = torch.randn(k, 3, 4, generator=generator, dtype=torch.float64)

    def lengths(difference: Tensor) -> Tensor:
        return linalg.vector_norm(difference, p, dim=-1)

    i, j = torch.triu_indices(3, 3, 1)
    for function, reference in (
        (lambda x: torch.cdist(x, y, p), lambda x: lengths(x.unsqueeze(1) - y)),
        (lambda x: F.pdist(x, p), lambda x: lengths(x[i] - x[j])),
        (lambda x: F.pairwise_distance(x, y, p), lambda x: lengths(x - y + 1e-6)),
    ):
        got, expected = function(dual(x, v)), _upstream(reference, x, v)
        assert expected is not None
        _same("value", got.primal, expected[0][0])
        _same("tangents", got.tangents, expected[0][1])


def test_a_product_and_a_median_of_nothing_are_torchs() -> None:
    x = dual(torch.ones(2, 0), torch.ones(3, 2, 0))
    assert x.prod().primal == 1 and (x.prod().tangents == torch.zeros(3)).all()
    assert x.median().primal.isnan() and x.median().tangents.isnan().all()


@pytest.mark.parametrize("ord", [1, 3])
def test_linalg_norm_refuses_what_torch_refuses(ord: int) -> None:
    x, cube = (dual(torch.ones(shape), torch.ones(shape)) for shape in ((), (2, 2, 2)))
    for call in (
        lambda: linalg.norm(x, ord),
        lambda: linalg.norm(cube, ord),
        lambda: linalg.norm(cube, ord, dim=()),
        lambda: linalg.norm(cube, ord, dim=(0, 1, 2)),
    ):
        with pytest.raises(ValueError, match="dim of linalg.norm"):
            call()
    with pytest.raises(ValueError, match="dtype of a norm"):
        linalg.norm(dual(torch.ones(3).double(), torch.ones(3).double()), ord, dtype=torch.float32)
