"""Axes that torch takes and refuses: 0 and -1 of 0-dimensional Duals, none at all, negative ones, too many."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from aajr_kernels import dual, is_dual

H = 1e-5  # of central differences: truncation h², rounding ε/h
ONE = torch.tensor([0])
#: of x and an axis
FUNCTIONS: dict[str, Callable[[Any, Any], Any]] = {
    name: lambda x, dim, name=name: getattr(x, name)(dim)
    for name in """squeeze flip sum mean amax amin logsumexp softmax log_softmax cumsum cumprod logcumsumexp prod nansum
    nanmean permute tile repeat reshape expand sum_to_size unsqueeze unbind""".split()
} | {
    "sum(keepdim)": lambda x, dim: x.sum(dim, keepdim=True),
    "amax(keepdim)": lambda x, dim: x.amax(dim, keepdim=True),
    "var": lambda x, dim: x.var(dim, correction=0),
    "std": lambda x, dim: x.std(dim, correction=0, keepdim=True),
    "var_mean": lambda x, dim: torch.var_mean(x, dim, correction=0),
    "norm": lambda x, dim: x.norm(2, dim),
    "norm(3, keepdim)": lambda x, dim: x.norm(3, dim, keepdim=True),
    "norm(inf)": lambda x, dim: x.norm(float("inf"), dim),
    "norm(0)": lambda x, dim: x.norm(0, dim),
    "vector_norm(1)": lambda x, dim: torch.linalg.vector_norm(x, 1, dim),
    "linalg.norm": lambda x, dim: torch.linalg.norm(x, 2, dim),
    "normalize": lambda x, dim: F.normalize(x, dim=dim),
    "softmin": lambda x, dim: F.softmin(x, dim),
    "cosine_similarity": lambda x, dim: F.cosine_similarity(x, x * x, dim),
    "max": lambda x, dim: x.max(dim),
    "min": lambda x, dim: x.min(dim, keepdim=True),
    "median": lambda x, dim: x.median(dim),
    "mode": lambda x, dim: x.mode(dim),
    "aminmax": lambda x, dim: x.aminmax(dim=dim),
    "cummax": lambda x, dim: x.cummax(dim),
    "sort": lambda x, dim: x.sort(dim),
    "topk": lambda x, dim: x.topk(1, dim),
    "kthvalue": lambda x, dim: x.kthvalue(1, dim),
    "transpose": lambda x, dim: x.transpose(dim, 0),
    "transpose_": lambda x, dim: (x * 1).transpose_(dim, 0),
    "squeeze_": lambda x, dim: (x * 1).squeeze_(dim),
    "movedim": lambda x, dim: x.movedim(dim, dim),
    "unfold": lambda x, dim: x.unfold(dim, 1, 1),
    "unfold(0)": lambda x, dim: x.unfold(dim, 0, 1),
    "flatten": lambda x, dim: x.flatten(dim, -1),
    "unflatten": lambda x, dim: x.unflatten(dim, (1, -1)),
    "roll": lambda x, dim: x.roll(1, dim),
    "rot90": lambda x, dim: x.rot90(1, dim),
    "index_select": lambda x, dim: x.index_select(dim, ONE),
    "index_select(two)": lambda x, dim: x.index_select(dim, ONE.repeat(2)),
    "index_add": lambda x, dim: x.index_add(dim, ONE, x[:1] if x.dim() else x),
    "gather": lambda x, dim: x.gather(dim, ONE.reshape((1,) * x.dim())),
    "scatter_add": lambda x, dim: x.scatter_add(dim, ONE.reshape((1,) * x.dim()), x * 2),
    "take_along_dim": lambda x, dim: x.take_along_dim(ONE.reshape((1,) * x.dim()), dim),
    "repeat_interleave": lambda x, dim: x.repeat_interleave(2, dim),
    "narrow": lambda x, dim: x.narrow(dim, 0, 1),
    "select": lambda x, dim: x.select(dim, 0),
    "chunk": lambda x, dim: x.chunk(2, dim),
    "cat": lambda x, dim: torch.cat([x, x * x], dim),
    "stack": lambda x, dim: torch.stack([x, x * x], dim),
    "diff": lambda x, dim: x.diff(dim=dim),
    "renorm": lambda x, dim: x.renorm(2, dim, 0.5),
    "quantile": lambda x, dim: x.quantile(0.5, dim),
    "glu": lambda x, dim: F.glu(x, dim),
    "mT": lambda x, dim: x.mT,
    "adjoint": lambda x, dim: x.adjoint(),
}  # fmt: skip
AXES: list[Any] = [0, -1, 1, -2, 2, -3, (0,), (-1,), (0, 1), (0, 0), (-2, 1), ()]


def _tensors(result: Any) -> list[Any]:
    leaves = result if isinstance(result, (tuple, list)) else [result]
    return [y for y in leaves if is_dual(y) or y.is_floating_point()]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("shape", [(), (2, 4)], ids=str)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_axes_mean_the_same_as_for_plain_tensors(name: str, shape: tuple[int, ...]) -> None:
    x, v = torch.rand(shape, dtype=torch.float64) + 0.5, torch.randn((2, *shape), dtype=torch.float64)
    for dim in AXES:
        function = lambda z, dim=dim: FUNCTIONS[name](z, dim)
        try:
            values = _tensors(function(x))
        except (RuntimeError, IndexError, TypeError, ValueError):
            if (name, dim) == ("logsumexp", ()):  # torch fails with its own shapes; ours is that of all axes
                continue
            with pytest.raises((RuntimeError, IndexError, TypeError, ValueError)):
                function(dual(x, v))
            continue
        results = _tensors(function(dual(x, v)))
        ends = [(_tensors(function(x + H * u)), _tensors(function(x - H * u))) for u in v]
        assert len(results) == len(values)
        for i, (y, want) in enumerate(zip(results, values)):
            assert y.shape == want.shape and is_dual(y), (dim, y, want)
            torch.testing.assert_close(y.primal, want, rtol=1e-12, atol=0)
            tangents = torch.stack([(up[i] - down[i]) / (2 * H) for up, down in ends])
            torch.testing.assert_close(y.tangents, tangents, rtol=1e-7, atol=1e-8)


def test_a_view_of_a_0_dimensional_dual_writes_through() -> None:
    x = dual(torch.tensor(2.0), torch.tensor([1.0, 3.0]))
    for view in (x.squeeze(0), x.transpose(0, -1), x.movedim(0, 0), x.unfold(0, 1, 1), x.flatten()):
        before = x.stacked.clone()
        view.mul_(2.0)
        assert torch.equal(x.stacked, before * 2)
