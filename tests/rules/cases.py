"""One line per torch function: `case(name, fn, inputs...)`. The sweep checks each against finite differences.

Inputs are float64 tensors; values keep clear of kinks (|x| > 0.1, no ties) so that differences mean something.
`duals` says which inputs become Duals (default the first), `up=False` that upstream's own reverse-over-forward is
wrong, missing or imprecise, so that only finite differences are the oracle, `low=False` that torch has too few kernels
of complex32 for a comparison in low precision.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, linalg, special

from aajr_kernels.torch_private import VERSION


@dataclass
class Case:
    name: str
    fn: Callable[..., Any]
    inputs: tuple[Any, ...]
    duals: tuple[int, ...]
    upstream: bool
    low: bool


CASES: list[Case] = []
_g = torch.Generator().manual_seed(20)


def rand(*shape: int, low: float = 0.15, high: float = 0.85, generator: torch.Generator = _g) -> Tensor:
    """Distinct values in (low, high) that bfloat16 and float16 hold."""
    n = int(torch.tensor(shape).prod()) if shape else 1
    places = torch.randperm(n, generator=generator) + 0.5
    jitter = 0.6 * (torch.rand(n, generator=generator) - 0.5)
    values = (places + (jitter if n < 100 else 0.0)).double() / n  # many values must not tie when rounded
    return (low + (high - low) * values).reshape(shape).bfloat16().double()


def real(*shape: int, generator: torch.Generator = _g) -> Tensor:
    """Values of both signs with distinct sizes in (0.15, 2)."""
    size = rand(*shape, low=0.15, high=2.0, generator=generator)
    return size * (2 * torch.randint(0, 2, shape, generator=generator) - 1)


def case(
    name: str,
    fn: Callable[..., Any],
    *inputs: Any,
    duals: tuple[int, ...] = (0,),
    up: bool = True,
    low: bool = True,
) -> None:
    CASES.append(Case(name, fn, inputs, duals, up, low))


def given(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Callable[..., Any]:
    """`function` with all arguments but the first."""
    return lambda x: function(x, *args, **kwargs)


X, Y, Z, U, P = real(3, 4), real(3, 4), real(3, 4), rand(3, 4), rand(3, 4, low=0.5, high=3.0)
ROW, COL, V, W = real(4), real(3, 1), real(4), real(4)
S = real(3, 3) * 0.5 + 3 * torch.eye(3, dtype=torch.float64)
SPD = S @ S.mT + torch.eye(3, dtype=torch.float64)
B3, C3, IMG, SEQ = real(2, 3, 4), real(2, 4, 5), real(2, 4, 4, 6), real(2, 4, 7)
# e^x of the first two underflows beside the third
LATE = torch.tensor([0.0, 1.0, 800.0, 700.0], dtype=torch.float64)
GAPS = torch.tensor([float("nan"), 0.0625, float("nan"), -0.0625], dtype=torch.float64)
# quotients with 0.53 and 2.41 are far from integers
QUOTIENTS = torch.tensor([0.75, 1.375, -0.625, 2.75], dtype=torch.float64)
IDX = torch.tensor([2, 0, 2])
AT = torch.tensor([[0, 2, 1, 0], [1, 1, 0, 2]])
MASK = torch.tensor([[1, 0, 1, 1], [0, 0, 1, 0], [1, 1, 0, 1]], dtype=torch.bool)
BOTH = (0, 1)

# -- pointwise ------------------------------------------------------------------------------------------------------
SMOOTH = """abs absolute asinh arcsinh atan arctan cos cosh deg2rad rad2deg erf erfc exp exp2 expm1 frac neg negative
positive sigmoid sin sinc sinh square tanh relu selu nan_to_num angle"""
STEPS = "fix floor ceil round trunc sign sgn"
for _name in (SMOOTH + " " + STEPS).split():
    case(_name, getattr(torch, _name), X)
for _name in "tan acos arccos asin arcsin atanh arctanh erfinv logit log1p".split():
    case(_name, getattr(torch, _name), U)
for _name in "log log10 log2 lgamma digamma reciprocal rsqrt sqrt".split():
    case(_name, getattr(torch, _name), P)
for _name in "acosh arccosh".split():
    case(_name, getattr(torch, _name), P + 1)
for _name in "expit i0 i0e i1 i1e erfcx log_ndtr ndtr expm1".split():
    case("special." + _name, getattr(special, _name), X)
for _name in "entr gammaln psi ndtri".split():
    case("special." + _name, getattr(special, _name), U)
for (
    _name
) in """celu elu gelu hardshrink hardsigmoid hardswish hardtanh leaky_relu logsigmoid mish relu6 selu silu
softplus softshrink softsign tanhshrink""".split():
    case(
        "F." + _name,
        getattr(F, _name),
        X,
        up=_name != "hardsigmoid",
    )
for _name, _arguments in {
    "celu": (0.5,),  # torch rounds 1 / alpha to float32
    "elu": (0.7,),
    "hardshrink": (0.3,),
    "hardtanh": (-0.6, 0.7),
    "leaky_relu": (0.3,),
    "softplus": (1.5, 1.6),
    "softshrink": (0.3,),
}.items():
    case(f"F.{_name}{_arguments}", given(getattr(F, _name), *_arguments), X)
case("F.gelu(tanh)", lambda x: F.gelu(x, approximate="tanh"), X)
case("F.threshold", lambda x: F.threshold(x, 0.1, 20.0), X)
case("torch.threshold", lambda x: torch.threshold(x, 0.1, 20.0), X)
case("F.glu", F.glu, X, up=False)
case("F.prelu", F.prelu, X, rand(4), duals=BOTH)
case("F.rrelu", lambda x: F.rrelu(x, 0.2, 0.2, training=True), X)
case("add", lambda x, y: torch.add(x, y, alpha=2), X, ROW, duals=BOTH)
case("sub", lambda x, y: 3 - torch.sub(x, y, alpha=2), X, COL, duals=BOTH)
case("rsub", lambda x, y: torch.rsub(x, y), X, COL)
case("mul", torch.mul, X, COL, duals=BOTH)
case("div", torch.div, X, P, duals=BOTH)
case("Tensor.__rtruediv__", lambda x: 2 / x, X)
case("div(floor)", lambda x, y: torch.div(x, y, rounding_mode="floor"), X, P)
case("pow", torch.pow, P, X, duals=BOTH)
case("pow(number)", lambda x: x**3 + x**-1 + x**0 + x**2, X)
case("Tensor.__rpow__", lambda x: 1.7**x, X)
case("float_power", lambda x: torch.float_power(x, 1.5), P)
case("maximum", torch.maximum, X, Y, duals=BOTH)
case("minimum", torch.minimum, X, Y, duals=(1,))
case("fmax", torch.fmax, X, Y, duals=BOTH)
case("fmin", torch.fmin, X, Y)
# torch 2.14 gives a gradient to the NaN too, or none to the other argument; 2.13 and 2.15 are right
_right = not torch.__version__.startswith("2.14.")
case("fmax(NaN)", lambda x: torch.fmax(x, GAPS) + torch.fmin(GAPS, x), X, up=_right)
case("fmin(NaN)", lambda x, y: torch.fmin(x, y + GAPS) + torch.fmax(GAPS + y, x), X, Y, duals=BOTH, up=_right)
case("clamp", lambda x: x.clamp(-0.6, 0.9), X)
case("clamp(tensor)", lambda x, a, b: torch.clamp(x, a, b), X, -P, P, duals=(0, 1, 2))
case("clamp_min", lambda x: x.clamp_min(0.4), X)
case("clamp_max", lambda x: x.clamp_max(0.4), X)
case("remainder", torch.remainder, X, P, duals=BOTH)
case("fmod", torch.fmod, X, P, duals=BOTH)
case("atan2", torch.atan2, X, Y, duals=BOTH)
case("hypot", torch.hypot, X, Y, duals=BOTH)
case("logaddexp", torch.logaddexp, X, Y, duals=BOTH)
case("logaddexp2", torch.logaddexp2, X, Y, duals=BOTH)
case("xlogy", torch.xlogy, X, P, duals=BOTH)
case("special.xlog1py", special.xlog1py, X, P, duals=BOTH)
case("copysign", torch.copysign, X, Y)
case("ldexp", torch.ldexp, X, Y)
case("lerp", torch.lerp, X, Y, Z, duals=(0, 1, 2))
case("addcmul", lambda x, y, z: torch.addcmul(x, y, z, value=0.5), X, Y, Z, duals=(0, 2))
case("addcdiv", lambda x, y, z: torch.addcdiv(x, y, z, value=0.5), X, Y, P, duals=(0, 1, 2))
case("polygamma", lambda x: torch.polygamma(1, x), P)
case("mvlgamma", lambda x: torch.mvlgamma(x, 2), P + 1)
case("special.multigammaln", lambda x: special.multigammaln(x, 2), P + 1)
case("where", lambda x, y: torch.where(MASK, x, y), X, COL, duals=BOTH)
case("masked_fill", lambda x: x.masked_fill(MASK, 2.0), X)
case("conj", lambda x: x.conj().resolve_conj().conj_physical(), X)
case("real", lambda x: torch.real(x) + x.real, X)
case("resolve_neg", torch.resolve_neg, X)
case("i0", torch.i0, X)
case("floor_divide", lambda x: (x // 0.53, 2.41 // x), QUOTIENTS, up=False)
case("Tensor.__rmod__", lambda x: 2.41 % x, QUOTIENTS, up=False)

# -- shapes ---------------------------------------------------------------------------------------------------------
for _name, _fn in {
    "view": lambda x: x.view(4, 3),
    "reshape": lambda x: x.reshape(2, -1),
    "expand": lambda x: x[:, :1].expand(3, 5),
    "permute": lambda x: x.permute(1, 0),
    "transpose": lambda x: x.transpose(0, 1),
    "t": lambda x: x.t(),
    "movedim": lambda x: x.movedim(0, 1),
    "squeeze": lambda x: x[:, :1].squeeze(1),
    "unsqueeze": lambda x: x.unsqueeze(-1),
    "flatten": lambda x: x.flatten(),
    "unflatten": lambda x: x.unflatten(1, (2, 2)),
    "narrow": lambda x: x.narrow(1, 1, 2),
    "select": lambda x: x.select(0, 1),
    "diagonal": lambda x: x.diagonal(1),
    "linalg.diagonal": lambda x: linalg.diagonal(torch.stack([x, x * x]), offset=1),
    "Tensor.unfold": lambda x: x.unfold(1, 2, 1),
    "split": lambda x: x.split(3, 1),
    "chunk": lambda x: x.chunk(2, 1),
    "unbind": lambda x: x.unbind(1),
    "tensor_split": lambda x: x.tensor_split(3, 1),
    "flip": lambda x: x.flip(0),
    "roll": lambda x: x.roll((1, 2), (0, 1)),
    "repeat": lambda x: x.repeat(2, 1, 2),
    "tile": lambda x: x.tile((2,)),
    "rot90": lambda x: x.rot90(),
    "repeat_interleave": lambda x: x.repeat_interleave(2, 1),
    "tril": lambda x: x.tril(),
    "triu": lambda x: x.triu(1),
    "split_with_sizes": lambda x: x.split_with_sizes([1, 3], 1),
    "unsafe_split": lambda x: x.unsafe_split(3, 1),
    "unsafe_chunk": lambda x: x.unsafe_chunk(2, 1),
    "view_as": lambda x: x.view_as(X.reshape(4, 3)),
    "reshape_as": lambda x: x.reshape_as(X.reshape(4, 3)),
    "atleast_1d": lambda x: torch.atleast_1d(x[0, 0]),
    "atleast_2d": lambda x: torch.atleast_2d(x[0]),
    "diag": lambda x: torch.diag(x[0]),
    "diag_embed": lambda x: x.diag_embed(),
    "F.pad": lambda x: F.pad(x, (1, 2)),
    "F.pad(reflect)": lambda x: F.pad(x, (1, 2), mode="reflect"),
    "cat": lambda x: torch.cat([x, x * 2, Y]),
    "stack": lambda x: torch.stack([x, x * x], 1),
    "hstack": lambda x: torch.hstack([x, x]),
    "to": lambda x: x.to(x.dtype),
    "vstack": lambda x: torch.vstack([x, x]),
    "dstack": lambda x: torch.dstack([x, x]),
    "contiguous": lambda x: x.t().contiguous(),
    "column_stack": lambda x: torch.column_stack([x, x * x]),
    "meshgrid": lambda x: torch.meshgrid(x[0], x[1], indexing="ij"),
    "block_diag": lambda x: torch.block_diag(x, x),
    "cartesian_prod": lambda x: torch.cartesian_prod(x[0], x[1]),
    "combinations": lambda x: torch.combinations(x[0]),
    "atleast_3d": lambda x: torch.atleast_3d(x),
    "sum_to_size": lambda x: x.sum_to_size(1, 4),
    "zeros_like": lambda x: x + torch.zeros_like(x),
    "slice_scatter": lambda x: torch.slice_scatter(x, x[:1] * 2, 0, 1, 2),
    "select_scatter": lambda x: x.select_scatter(x[0], 0, 2),
    "diagonal_scatter": lambda x: x.diagonal_scatter(x[:, 0] * 2),
    "ravel": lambda x: x.ravel(),
    "fliplr": lambda x: x.fliplr(),
    "flipud": lambda x: x.flipud(),
    "trace": lambda x: x[:, :3].trace(),
    "vander": lambda x: linalg.vander(x[0]),
    "diff": lambda x: x.diff(dim=1),
    "gradient": lambda x: torch.gradient(x)[0],
    "diagflat": lambda x: torch.diagflat(x),
    "trapezoid": lambda x: torch.trapezoid(x, dim=1),
    "cumulative_trapezoid": lambda x: torch.cumulative_trapezoid(x, dim=1),
}.items():
    case(_name, _fn, X)

# -- reductions and scans -------------------------------------------------------------------------------------------
for _name in "sum mean amax amin prod std var logsumexp nansum nanmean quantile norm".split():
    _extra = (0.3,) if _name == "quantile" else ((2,) if _name == "norm" else ())
    case(_name, given(getattr(torch, _name), *_extra, dim=1), X)
for _name in "sum mean prod std var max min median norm nansum nanmean nanmedian".split():
    case(_name + "()", getattr(torch, _name), X)
for _name in (
    "max min median sort cumsum cumprod cummax cummin logcumsumexp softmax log_softmax mode nanmedian".split()
):
    case(_name + "(dim)", given(getattr(torch, _name), dim=1), X)
case("F.softmin", given(F.softmin, dim=1), X)
case("special.log_softmax", given(special.log_softmax, 1), X)
case("topk", lambda x: x.topk(2, dim=1), X)
case("kthvalue", lambda x: x.kthvalue(2, dim=1), X)
# torch 2.11 has no forward mode of it
case("aminmax", lambda x: torch.aminmax(x, dim=1), X, up=VERSION > (2, 11))
case("var_mean", lambda x: torch.var_mean(x, dim=0), X)
case("std_mean", lambda x: torch.std_mean(x, dim=0, correction=0), X)
case("nanquantile", lambda x: torch.nanquantile(x, 0.3, dim=0), X)
case("msort", torch.msort, X)
case("dist", torch.dist, X, Y, duals=BOTH)
case("cov", torch.cov, X)
case("corrcoef", torch.corrcoef, X)
case("renorm", lambda x: torch.renorm(x, 2, 0, 1.0), X)
case("norm(1)", lambda x: torch.norm(x, 1), X)
case("linalg.vector_norm(inf)", lambda x: linalg.vector_norm(x, float("inf"), dim=1), X)
case("linalg.vector_norm(3)", lambda x: linalg.vector_norm(x, 3, dim=1, keepdim=True), X)
case("linalg.matrix_norm", lambda x: linalg.matrix_norm(x), X)
case("frobenius_norm", lambda x: torch.frobenius_norm(x, dim=(0, 1)), X)
for _ord in (None, "fro", "nuc", 1, 2, -2, float("inf")):
    case(f"linalg.norm({_ord})", lambda x, _ord=_ord: linalg.norm(x, _ord), X, up=False)
case("linalg.norm(two axes)", lambda x: linalg.norm(x, 2, dim=(0, 2)), B3, up=False)
case("linalg.norm(one axis)", lambda x: linalg.norm(x, 1, dim=1), X)
case("logcumsumexp(late peak)", lambda x: torch.logcumsumexp(x + LATE, 1), X, up=False)
case("F.normalize", lambda x: F.normalize(x, dim=1), X)
case("F.cosine_similarity", F.cosine_similarity, X, Y, duals=BOTH)
case("F.pairwise_distance", F.pairwise_distance, X, Y, duals=BOTH)
case("cdist", torch.cdist, X, Y, duals=BOTH, up=False)
case("F.pdist", F.pdist, X, up=False)

# -- products and linear algebra ------------------------------------------------------------------------------------
case("matmul", torch.matmul, B3, C3, duals=BOTH)
case("mm", torch.mm, X, C3[0])
case("bmm", torch.bmm, B3, C3, duals=(1,))
case("mv", torch.mv, X, V, duals=BOTH)
case("dot", torch.dot, V, W, duals=BOTH)
case("inner", torch.inner, X, Y, duals=BOTH)
case("outer", torch.outer, V, W, duals=BOTH)
case("linalg.vecdot", linalg.vecdot, X, Y, duals=BOTH)
case("addmm", lambda a, x, y: torch.addmm(a, x, y, beta=0.5, alpha=2), real(3, 5), X, C3[0], duals=(0, 1, 2))
case("addmv", torch.addmv, real(3), X, V, duals=(0, 1, 2))
case("addr", torch.addr, real(4, 4), V, W, duals=(0, 1, 2))
case("baddbmm", torch.baddbmm, real(2, 3, 5), B3, C3, duals=(0, 1, 2))
case("addbmm", torch.addbmm, real(3, 5), B3, C3, duals=(0, 1, 2))
for _name, _a, _b in (
    ("addmm", X, C3[0]),
    ("addmv", X, V),
    ("addr", V, W),
    ("baddbmm", B3, C3),
    ("addbmm", B3, C3),
):
    _plus = getattr(torch, _name)
    case(
        f"{_name}(scalar)",
        lambda x, a, b, f=_plus: f(x, a, b, beta=0.5, alpha=2),
        X[0, 0],
        _a,
        _b,
        duals=(0, 1, 2),
    )
case("einsum", lambda x, y: torch.einsum("bij,bjk->bki", x, y), B3, C3, duals=BOTH)
case("tensordot", lambda x, y: torch.tensordot(x, y, dims=([2], [1])), B3, C3, duals=BOTH)
case("kron", torch.kron, X, Y[:2], duals=BOTH)
case("cross", lambda x, y: torch.cross(x, y, dim=0), X, Y, duals=BOTH)
case("linalg.cross", lambda x, y: linalg.cross(x, y, dim=0), X, Y, duals=BOTH)
case("Tensor.__rmatmul__", lambda x: x.__rmatmul__(C3[0].mT), X.mT)
case("cross(first axis of size 3)", torch.cross, S, S.flip(0), duals=BOTH)
case("linalg.multi_dot", lambda x, y: linalg.multi_dot([x, y, y.mT]), X, C3[0], duals=BOTH)
case("chain_matmul", lambda x, y: torch.chain_matmul(x, y), X, C3[0], duals=BOTH)
case("F.linear", F.linear, B3, real(5, 4), real(5), duals=(0, 1, 2))
case("F.bilinear", F.bilinear, X, Y, real(2, 4, 4), real(2), duals=(0, 1, 2, 3))
case("linalg.inv", linalg.inv, S)
case("linalg.inv_ex", lambda x: linalg.inv_ex(x)[0], S)
case("inverse", torch.inverse, S)
case("linalg.pinv", linalg.pinv, X)
case("linalg.cholesky", lambda x: linalg.cholesky(x + x.mT), SPD)
case("cholesky_solve", lambda b, x: torch.cholesky_solve(b, x.tril()), X, S, duals=BOTH)
case(
    "linalg.solve_triangular",
    lambda a, b: linalg.solve_triangular(a.tril(), b, upper=False),
    S,
    X,
    duals=BOTH,
)
case("linalg.qr", linalg.qr, S)
case("linalg.eigvalsh", lambda x: linalg.eigvalsh(x + x.mT), SPD)
case("linalg.svdvals", linalg.svdvals, X)
case("linalg.matrix_norm(nuc)", lambda x: linalg.matrix_norm(x, "nuc"), X)
case("linalg.lu_factor", lambda x: linalg.lu_factor(x).LU, S)
case("linalg.matrix_exp", linalg.matrix_exp, S * 0.3)
case("linalg.matrix_power", lambda x: linalg.matrix_power(x, 3), S)
case("matrix_power", lambda x: torch.matrix_power(x, 3), S)
case("linalg.tensorinv", lambda x: linalg.tensorinv(x.reshape(3, 3), ind=1), S)

# -- indexing -------------------------------------------------------------------------------------------------------
case("__getitem__", lambda x: (x[1], x[:, None, 1:3], x[IDX], x[MASK], x[..., -1], x[IDX, IDX]), X)


def _written(x: Tensor, y: Tensor) -> Tensor:
    x = x * 1
    x[1, ::2] = y[0, :2]
    return x


case("__setitem__", _written, X, Y, duals=BOTH)
case("index_select", lambda x: x.index_select(0, IDX), X)
case("gather", lambda x: x.gather(0, AT), X)
case("take_along_dim", lambda x: x.take_along_dim(AT, 0), X)
case("take", lambda x: x.take(torch.tensor([[3, 1], [11, 3]])), X)
case("masked_select", lambda x: x.masked_select(MASK), X)
case("scatter", lambda x, y: x.scatter(0, AT[:1], y[:1]), X, Y, duals=BOTH)
case("scatter_add", lambda x, y: x.scatter_add(0, AT, y[:2]), X, Y, duals=BOTH)
case("scatter_reduce(sum)", lambda x, y: x.scatter_reduce(0, AT, y[:2], "sum"), X, Y, duals=BOTH)
case("scatter_reduce(mean)", lambda x, y: x.scatter_reduce(0, AT, y[:2], "mean"), X, Y, duals=BOTH)
case("scatter_reduce(amax)", lambda x, y: x.scatter_reduce(0, AT, y[:2], "amax"), X, Y, duals=BOTH)
case(
    "scatter_reduce(amin)",
    lambda x, y: x.scatter_reduce(0, AT, y[:2], "amin", include_self=False),
    X,
    Y,
    duals=BOTH,
)
case("index_add", lambda x, y: x.index_add(0, IDX, y, alpha=0.5), X, Y, duals=BOTH)
case("index_copy", lambda x, y: x.index_copy(0, IDX[:2], y[:2]), X, Y, duals=BOTH)
case("index_fill", lambda x: x.index_fill(0, IDX[:2], 1.5), X)
case("index_put", lambda x, y: x.index_put((IDX,), y, accumulate=True), X, Y, duals=BOTH)
case("masked_scatter", lambda x, y: x.masked_scatter(MASK, y), X, Y, duals=BOTH)
case("put", lambda x, y: x.put(torch.tensor([1, 5]), y[0, :2]), X, Y, duals=BOTH)
case("F.embedding", lambda w: F.embedding(AT, w), X)
case("F.embedding_bag", lambda w: F.embedding_bag(AT, w, mode="sum"), X, up=False)
