"""Cases of complex numbers inside real functions, of linear algebra, and of the less known forms of views."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from rules import cases
from rules.cases import B3, BOTH, IMG, SPD, P, S, V, W, X, Y, case
from torch import Tensor, linalg

from aajr_kernels.torch_private import VERSION

#: draws of its own, so that the values of other modules stay as they are
real = functools.partial(cases.real, generator=torch.Generator().manual_seed(21))

SIGNAL = real(3, 40)
WINDOW = torch.hann_window(8, dtype=torch.float64) + 0.1
#: of rank 1 and of rank 2, singular both; one between them that is not
SINGULAR = torch.stack(
    [torch.outer(real(3), real(3)), S - S[0].expand(3, 3) * torch.eye(3)[0].double()[:, None], S]
)
FREQUENCIES = torch.polar(torch.ones(4, 2, dtype=torch.float64), real(4, 2))


def number(x: Any) -> Any:
    """``[..., 2n]`` real -> ``[..., n]`` complex, as rotary embeddings pair their features."""
    return torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))


def parts(z: Any) -> Any:
    return torch.view_as_real(z).flatten(-2)


def rotary(q: Any, k: Any) -> Any:
    """The rotary embedding of Llama 4 and DeepSeek-V2: a product with e^(iθ)."""
    return tuple(parts(number(x) * FREQUENCIES[: x.shape[-2]]) for x in (q, k))


def in_place(x: Any) -> Any:
    z = number(x).clone()
    z.mul_(0.5 - 2j)
    z.real.exp_()
    z[0].imag.mul_(3)
    z += z.conj()[0]
    return parts(z)


def _spectrum(x: Any) -> Any:
    z = torch.fft.rfft(x, dim=0, norm="ortho")
    return torch.fft.irfft(z * z.abs(), n=x.shape[0], dim=0, norm="ortho")


COMPLEX: dict[str, Callable[..., Any]] = {
    "rotary": lambda x: rotary(x, x * x)[0],
    "abs": lambda x: number(x).abs(),
    "angle": lambda x: number(x).angle(),
    "sgn": lambda x: parts(number(x).sgn()),
    "conj": lambda x: parts((number(x).conj() * number(x * x)).resolve_conj()),
    "real and imag": lambda x: number(x).real * number(x).imag,
    "H": lambda x: parts((number(x).H @ number(x)).contiguous()),
    "adjoint": lambda x: parts(number(x).mH.resolve_conj()),
    "exp": lambda x: parts(number(x).exp()),
    "sqrt": lambda x: parts(number(x).sqrt()),
    "acosh": lambda x: parts(number(x).acosh()),
    "log": lambda x: parts(torch.log(number(x))),
    "pow": lambda x: parts(number(x) ** 2.5),
    "reciprocal": lambda x: parts(2j / number(x)),
    "prod": lambda x: parts(number(x).prod(0)),
    "cumprod": lambda x: parts(number(x).cumprod(0)),
    "vdot": lambda x: torch.view_as_real(torch.vdot(number(x)[0], number(x)[1])),
    "einsum": lambda x: parts(torch.einsum("ij,kj->ik", number(x), number(x).conj())),
    "linear": lambda x: parts(F.linear(number(x), FREQUENCIES, FREQUENCIES[:, 0])),
    "var": lambda x: number(x).var(0),
    "norm": lambda x: number(x).norm(dim=0),
    "norm(1)": lambda x: number(x).norm(1, dim=0),
    "linalg.norm(inf)": lambda x: linalg.norm(number(x), float("inf"), dim=0),
    "linalg.vector_norm(3)": lambda x: linalg.vector_norm(number(x), 3),
    "mean and sum": lambda x: parts(number(x).mean(0)) + parts(number(x).sum(0)),
    "cat and where": lambda x: parts(torch.cat([number(x), torch.where(X[:, :2] > 0, number(x), 1j)])),
    "index": lambda x: parts(number(x)[torch.tensor([2, 0, 2])].roll(1, 0).flip(1)),
    "complex": lambda x: parts(torch.complex(x, x[0])),
    "polar": lambda x: parts(torch.polar(x.exp(), x[0])),
    "cast": lambda x: torch.view_as_real(x.to(torch.complex128) * 1j),
    "real times complex": lambda x: parts(x[:, :2] * FREQUENCIES[:3] + 1j),
    "in place": in_place,
    "fft": _spectrum,
    "fft2": lambda x: torch.fft.fft2(x).abs(),
    "fftn": lambda x: parts(torch.fft.ifftn(torch.fft.fftshift(torch.fft.fftn(x, s=(4,))))),
    "hfft": lambda x: torch.fft.hfft(number(x), dim=-1, n=4) + torch.fft.hfft(torch.fft.ihfft(x), n=4),
    "eigvals": lambda x: linalg.eigvals(x[:, :3] @ S).abs(),
    "inv": lambda x: parts(linalg.inv(number(x) @ number(x).mH + torch.eye(3)).contiguous()),
    "solve": lambda x: parts(linalg.solve(S + 1j * torch.eye(3), number(x))),
    "eigh": lambda x: linalg.eigh(number(x) @ number(x).mH + torch.diag(P[0, :3])).eigenvectors.abs(),
    "svd": lambda x: linalg.svd(number(x), full_matrices=False).U.abs(),
    "slogdet": lambda x: linalg.slogdet(number(x)[:2]).logabsdet + linalg.slogdet(number(x)[:2]).sign.real,
}
for _name, _function in COMPLEX.items():
    case(f"complex({_name})", _function, X, up=False, low=False)
case("rotary", rotary, real(2, 3, 4), real(2, 4, 4), duals=BOTH)
case("polar", lambda a, b: parts(torch.polar(a, b)), P, Y, duals=BOTH)
TRANSFORMS = "fft ifft rfft irfft hfft ihfft".split()
for _name in [*(name + n for name in TRANSFORMS for n in ("", "2", "n")), "fftshift", "ifftshift"]:
    _transform = getattr(torch.fft, _name)
    case(
        f"fft.{_name}", lambda x, _transform=_transform: _transform(x).abs().square(), X, up=False, low=False
    )
case(
    "stft",
    lambda x, w: torch.stft(x, 8, 3, window=w, return_complex=True).abs().square(),
    SIGNAL,
    WINDOW,
    duals=BOTH,
)
case(
    "istft",
    lambda x: torch.istft(
        torch.stft(x, 8, 2, window=WINDOW, return_complex=True) * (1 + 2j), 8, 2, window=WINDOW
    ),
    SIGNAL,
)

# -- linear algebra ---------------------------------------------------------------------------------------------------

case("linalg.solve", linalg.solve, S, real(3, 2), duals=BOTH, up=False)
case("linalg.solve(batch)", linalg.solve, torch.stack([S, SPD]), real(3, 1), duals=(1,), up=False)
case("linalg.solve(vector)", linalg.solve, S, real(3), duals=BOTH, up=False)
case(
    "linalg.solve(right)", lambda a, b: linalg.solve(a, b, left=False), S, X.mT[:2, :3], duals=BOTH, up=False
)
case("linalg.solve_ex", lambda a, b: linalg.solve_ex(a, b).result, S, real(3, 2), duals=BOTH, up=False)
ROUND = (torch.eye(6, dtype=torch.float64) + 0.2 * real(6, 6)).reshape(2, 3, 6)
case("linalg.tensorsolve", linalg.tensorsolve, ROUND, real(2, 3), duals=BOTH, up=False)
case(
    "linalg.lstsq(tall)",
    lambda a, b: linalg.lstsq(a, b, driver="gels")[:2],
    real(5, 3),
    real(5, 2),
    duals=BOTH,
    up=False,
)
case(
    "linalg.lstsq(wide)",
    lambda a, b: linalg.lstsq(a, b).solution,
    real(3, 5),
    real(3, 2),
    duals=BOTH,
    up=False,
)
case("linalg.det", linalg.det, S, up=False)
case("linalg.det(singular)", linalg.det, SINGULAR, up=False)
case("linalg.slogdet", lambda x: linalg.slogdet(x).logabsdet, S, up=False)
case("logdet", torch.logdet, SPD, up=False)
case("linalg.eigh", lambda x: linalg.eigh(x + x.mT), SPD, up=False)
case("linalg.eig", lambda x: linalg.eig(x).eigenvectors.abs(), S, up=False)
PIVOTS = torch.tensor([2, 3, 3], dtype=torch.int32)
for _left, _adjoint in ((True, False), (True, True), (False, False), (False, True)):
    _solve = functools.partial(linalg.lu_solve, left=_left, adjoint=_adjoint)
    case(
        f"linalg.lu_solve({_left}, {_adjoint})",
        lambda a, b, _solve=_solve: _solve(a, PIVOTS, b), S, S * 2, duals=BOTH, up=False,
    )  # fmt: skip
case("lu_unpack", lambda x: torch.lu_unpack(x, PIVOTS)[1:], S, up=False)
case("linalg.cholesky_ex", lambda x: linalg.cholesky_ex(x + x.mT).L, SPD, up=False)
case("linalg.lu_factor_ex", lambda x: linalg.lu_factor_ex(x).LU, S, up=False)
case("triangular_solve", lambda a, b: torch.triangular_solve(b, a)[0], S, real(3, 2), duals=BOTH, up=False)
case("cholesky_inverse(factor)", lambda x: torch.cholesky_inverse(x.tril()), S, up=False)
LOW_RANK = X[:, :2] @ Y[:2]
case("svd_lowrank", lambda x: (torch.manual_seed(3), torch.svd_lowrank(x, 2)[1])[1], LOW_RANK, up=False)
case("pca_lowrank", lambda x: (torch.manual_seed(3), torch.pca_lowrank(x, 2)[1])[1], LOW_RANK, up=False)
case("linalg.svd(tall)", lambda x: linalg.svd(x, full_matrices=False), X.mT, up=False)
case("linalg.svd(wide)", lambda x: linalg.svd(x, full_matrices=False), X, up=False)
case("svd", torch.svd, X, up=False)
case("linalg.cond", linalg.cond, S, up=False)
case("linalg.lu", lambda x: linalg.lu(x)[1:], S, up=False)
case(
    "linalg.lu_solve",
    lambda a, b: linalg.lu_solve(*linalg.lu_factor(a), b),
    S,
    real(3, 2),
    duals=BOTH,
    up=False,
)
case("cholesky_inverse", lambda x: torch.cholesky_inverse(linalg.cholesky(x + x.mT)), SPD, up=False)
case("linalg.householder_product", linalg.householder_product, X.mT, real(3), duals=BOTH, up=False)

# -- views ------------------------------------------------------------------------------------------------------------


def diagonal_filled(x: Tensor) -> Tensor:
    y = x * 1
    y.fill_diagonal_(2.0)
    return y * y


def straightened(x: Tensor) -> Tensor:
    y = x * x
    y.as_strided((3, 2), (4, 2), 1).mul_(3)  # a view: writes reach y
    return y


AT = [torch.tensor([[2], [0], [2]]), torch.arange(4)]
VIEWS: dict[str, Callable[..., Any]] = {
    "as_strided": lambda x: (x * x).as_strided((2, 3, 2), (4, 1, 2)),
    "as_strided(stride 0)": lambda x: (x * x).as_strided((2, 3, 2), (0, 1, 2)),
    "as_strided_copy": lambda x: torch.as_strided_copy(x, (2, 2), (1, 1), 3),
    "as_strided(in place)": straightened,
    "hsplit": lambda x: torch.hsplit(x, 2)[1],
    "vsplit": lambda x: x.vsplit([1])[1],
    "split_with_sizes_copy": lambda x: torch.split_with_sizes_copy(x, [1, 3], 1)[1],
    "unbind_copy": lambda x: torch.unbind_copy(x, 1)[2],
    "constant_pad_nd": lambda x: torch.constant_pad_nd(x, (1, 2), 1.5),
    "fill_diagonal": diagonal_filled,
    "ldexp(negative)": lambda x: torch.ldexp(x, torch.tensor([-2, -1, 0, 3])),
    "frexp": lambda x: torch.frexp(x).mantissa ** 2,
    "fill": lambda x: torch.fill(x, x[0, 0] * x[0, 1]),
    "slice": lambda x: torch.ops.aten.slice(x, 1, 1, 4, 2) * 2,
    "_safe_softmax": lambda x: torch.ops.aten._safe_softmax(x.masked_fill(Y > 0, float("-inf")), 0),
    "_unsafe_masked_index": lambda x: torch._unsafe_masked_index(x, Y > 0, AT, 2.0),
    "gumbel_softmax": lambda x: (torch.manual_seed(5), F.gumbel_softmax(x, tau=0.7))[1],
}
if VERSION > (2, 11):
    VIEWS["nextafter"] = lambda x: torch.nextafter(x, Y) * x
for _name, _function in VIEWS.items():
    case(_name, _function, X, up="ldexp" not in _name)
case("dsplit", lambda x: torch.dsplit(x, [1, 3])[1], B3)
_softmax_backward = lambda g, y: torch.ops.aten._softmax_backward_data(g, y, 1, g.dtype)
case("_softmax_backward_data", _softmax_backward, X, Y, duals=BOTH, up=False)
case(
    "_unsafe_masked_index_put_accumulate",
    lambda x, y: torch._unsafe_masked_index_put_accumulate(x, Y > 0, AT, y),
    X, Y, duals=BOTH, up=False,
)  # fmt: skip
case(
    "max_pool2d_with_indices_backward",
    lambda g, x: torch.ops.aten.max_pool2d_with_indices_backward(
        g, x, [2, 2], [2, 2], [0, 0], [1, 1], False, torch.zeros(2, 4, 2, 3, dtype=torch.long)
    ),
    IMG[:, :, :2, :3].contiguous(), IMG, up=False,
)  # fmt: skip
case("_upsample_bilinear2d_aa", lambda x: torch.ops.aten._upsample_bilinear2d_aa(x, [3, 4], False), IMG)
SAMPLES = torch.rand(2, 4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
case(
    "F.fractional_max_pool2d",
    lambda x: F.fractional_max_pool2d(x, 2, output_size=(2, 3), _random_samples=SAMPLES),
    IMG,
)
CUBE, SAMPLES3 = real(1, 2, 4, 4, 6), SAMPLES.flatten()[:6].reshape(1, 2, 3)
case(
    "F.fractional_max_pool3d",
    lambda x: F.fractional_max_pool3d(x, 2, output_size=(2, 2, 3), _random_samples=SAMPLES3),
    CUBE,
)
case(
    "as_strided_scatter",
    lambda x, y: torch.as_strided_scatter(x, y, (2, 2), (4, 1), 1),
    X, Y[:2, :2].contiguous(), duals=BOTH, up=False,
)  # fmt: skip
case(
    "as_strided_scatter(no axes)",
    lambda x, y: torch.as_strided_scatter(x.sum(), y.sum(), (), ()),
    X, Y, duals=BOTH, up=False,
)  # fmt: skip
case(
    "_batch_norm_with_update",
    lambda x: torch.ops.aten._batch_norm_with_update(x, W, V, P[0] * 0, P[0] * 1, 0.1, 1e-5),
    IMG, up=False,
)  # fmt: skip
case(
    "native_layer_norm",
    lambda x, w: torch.native_layer_norm(x, (4,), w, None, 1e-5),
    X,
    W,
    duals=BOTH,
    up=False,
)
case("native_group_norm", lambda x: torch.native_group_norm(x, W, V, 2, 4, 24, 2, 1e-5), IMG, up=False)
case(
    "native_batch_norm",
    lambda x: torch.native_batch_norm(x, W, V, None, None, True, 0.1, 1e-5),
    IMG,
    up=False,
)
