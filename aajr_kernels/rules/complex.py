"""Rules of complex numbers: real and imaginary parts, conjugates, absolute values, Fourier transforms.

A Dual is real at its creation and in a penalty; in between it may be complex. A tangent stays the derivative
along a *real* direction of the input, so functions that are not holomorphic (``abs``, ``conj``, ``real``, ``angle``)
have ordinary tangents: those of their real and imaginary parts. A rule of another module that is linear, bilinear or
holomorphic is also right for complex numbers, and is entered in ``registry.COMPLEX`` by :func:`register`;
functions without an entry raise.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..backends.errors import UnsupportedOperation
from .common import (
    LINEAR,
    Dual,
    align,
    axes,
    elementwise,
    is_dual,
    join,
    ndim_of,
    once_rounded,
    per_slice,
    split,
    stacks,
)
from .matmul import bilinear
from .pointwise import UNARY
from .registry import COMPLEX, RULES, functions_named, rule

#: modules whose rules only move values, are bilinear, or are written for both kinds of numbers
_LINEAR = ("structural", "indexing", "creation", "copies", "matmul", "linalg")
#: names of sums, products, holomorphic functions and what returns plain results, in the other modules
_HOLDS = """
add sub subtract rsub mul multiply div divide true_divide neg negative positive lerp addcmul addcdiv pow float_power
acos arccos asin arcsin asinh arcsinh atan arctan atanh arctanh cos cosh exp exp2 expm1 log log10 log1p log2 reciprocal
rsqrt special_expit sin sinc sinh sqrt square tan sum mean cumsum prod cumprod nansum
__add__ __radd__ __sub__ __rsub__ __mul__ __rmul__ __truediv__ __rdiv__ __rtruediv__ __pow__ __rpow__
eq ne not_equal isnan isinf isfinite isreal isclose allclose equal count_nonzero nonzero any all logical_and
logical_or logical_xor logical_not is_nonzero is_same_size is_floating_point is_complex is_tensor numel result_type
can_cast is_conj is_neg is_inference is_signed is_set_to is_shared is_pinned argwhere __eq__ __ne__
block_diag cartesian_prod column_stack combinations cumulative_trapezoid diff gradient linalg_vander vander meshgrid
put sum_to_size trace trapezoid trapz matrix_exp linalg_matrix_exp matrix_power linalg_matrix_power
cholesky linalg_cholesky cholesky_solve linalg_eigvalsh inverse linalg_inv linalg_inv_ex linalg_lu_factor
cov corrcoef linalg_cholesky_ex linalg_lu_factor_ex svd_lowrank pca_lowrank linalg_matrix_norm
conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d pixel_shuffle pixel_unshuffle
channel_shuffle native_channel_shuffle fold unfold im2col col2im
dist l1_loss normalize pairwise_distance triplet_margin_loss
linalg_pinv pinverse qr linalg_qr linalg_solve_triangular linalg_svdvals linalg_tensorinv linalg_vecdot
""".split()


def complex_rule(*targets: str | Callable[..., Any]) -> Callable[[Callable[..., Any]], Any]:
    """Register the rule of a torch function for complex arguments; its rule for real ones stays."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        for target in targets:
            for match in functions_named(target) if isinstance(target, str) else [target]:
                COMPLEX[match] = function
        return function

    return decorate


def both(*targets: str | Callable[..., Any], kind: str = "torch") -> Callable[[Callable[..., Any]], Any]:
    """Register one rule for real and for complex arguments."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        rule(*targets, kind=kind)(function)
        return complex_rule(*targets)(function)

    return decorate


# -- parts ------------------------------------------------------------------------------------------------------------

_getters = {name: getattr(torch.Tensor, name).__get__ for name in ("real", "imag", "H", "mH", "T", "mT")}

rule("conj", "conj_physical", "resolve_conj", "resolve_neg", "real", _getters["real"], kind="view")(
    lambda x: x
)
for _name in ("conj", "conj_physical", "resolve_conj", "resolve_neg"):
    complex_rule(_name)(lambda x, _name=_name: Dual(getattr(x.stacked, _name)()))
complex_rule("real", _getters["real"])(lambda x: Dual(x.stacked.real))
both("imag", _getters["imag"], kind="view")(lambda x: Dual(x.stacked.imag))
both("view_as_real", kind="view")(lambda x: Dual(torch.view_as_real(x.stacked)))
for _name in ("T", "mT"):
    complex_rule(_getters[_name])(RULES[_getters[_name]])
for _name in ("H", "mH"):
    complex_rule(_getters[_name])(lambda x, _rule=RULES[_getters[_name]]: _rule(x).conj())
complex_rule("adjoint")(lambda x: x.transpose(-1, -2).conj())


@both("view_as_complex", kind="view")
def _view_as_complex(x: Dual) -> Dual:
    if x.dim() == 0:  # the stack axis would be taken for the parts
        raise RuntimeError("view_as_complex takes a last axis of two parts, got a 0-dimensional Dual.")
    if x.stacked.stride(0) % 2 and all(s % 2 == 0 for s in x.stride()[:-1]):
        raise UnsupportedOperation(
            "view_as_complex of a Dual takes a primal of an even number of values in one piece: call clone() first."
        )
    return Dual(torch.view_as_complex(x.stacked))


@both("complex")
def _complex(real: Any, imag: Any) -> Dual:
    (a, b), n = stacks(real, imag), ndim_of(real, imag)
    return Dual(torch.complex(align(a, n), align(b, n)))


@both(torch.polar)  # by function: torch.linalg has a decomposition of this name
def _polar(abs: Any, angle: Any) -> Any:
    if abs.dtype != angle.dtype:
        raise RuntimeError(f"abs and angle of polar must have one dtype, got {abs.dtype} and {angle.dtype}.")
    one = torch.ones((), dtype=abs.dtype, device=abs.device)
    torch.polar(one, one)  # float16 works from torch 2.14; before, torch's own error is raised
    abs, angle = abs.clone(), angle.clone()  # torch saves no operand, so both may be written afterwards
    return torch.complex(*(_polar_part(abs, angle, function) for function in (torch.cos, torch.sin)))


_polar_part = once_rounded(lambda abs, angle, function: abs * function(angle))


# -- absolute value and phase -------------------------------------------------------------------------------------


@complex_rule("abs", "absolute", torch.Tensor.__abs__)
def _abs(x: Dual) -> Dual:
    """Re(z̄ ż) / |z|; 0 at z = 0, torch's choice as well."""
    z, tangents = split(x)
    out = z.abs()
    return join(out, (z.conj() * tangents).real / torch.where(out == 0, 1.0, out))


@complex_rule("angle")
def _angle(x: Dual) -> Dual:
    """Im(z̄ ż) / |z|²; 0 at z = 0."""
    z, tangents = split(x)
    size = z.real.square() + z.imag.square()
    return join(z.angle(), (z.conj() * tangents).imag / torch.where(size == 0, 1.0, size))


@complex_rule("sgn")
def _sgn(x: Dual) -> Dual:
    """s = z / |z|: the part of ż / |z| at right angles to s; 0 at z = 0."""
    z, tangents = split(x)
    size = z.abs()
    apart = torch.where(size == 0, 1.0, size)
    s = z / apart
    turned = (tangents - s * (s.conj() * tangents).real) / apart
    return join(s, torch.where(size == 0, torch.zeros_like(turned), turned))


@complex_rule("acosh", "arccosh")
def _acosh(x: Dual) -> Dual:
    """1 / (√(z − 1) √(z + 1)), whose cut is that of acosh; the root of the product has another one."""
    z, tangents = split(x)
    return join(z.acosh(), tangents * (z - 1).rsqrt() * (z + 1).rsqrt())


complex_rule("tanh")(elementwise(torch.tanh, UNARY["tanh"]))
complex_rule("sigmoid")(elementwise(torch.sigmoid, UNARY["sigmoid"]))


complex_rule("vdot")(lambda a, b: torch.dot(a.conj(), b))
complex_rule("linalg_vecdot", torch.linalg.vecdot)(lambda a, b, *, dim=-1: (a.conj() * b).sum(dim))


# -- moments and norms of the modulus -----------------------------------------------------------------------------


complex_rule("var")(lambda x, *args, **kwargs: x.real.var(*args, **kwargs) + x.imag.var(*args, **kwargs))


def _norm_of_modulus(function: Callable[..., Any]) -> None:
    @complex_rule(function)
    def norm(x: Dual, ord: Any = None, dim: Any = None, keepdim: bool = False, **kwargs: Any) -> Any:
        ord = kwargs.get("p", ord)
        dtype = kwargs.get("dtype")
        axes_given = (x.dim() if dim is None else 1 if isinstance(dim, int) else len(dim)) == 2
        if ord == "nuc" or (function is torch.linalg.norm and axes_given and ord not in (None, "fro")):
            return torch.linalg.matrix_norm(x, ord, dim or (-2, -1), keepdim, dtype=dtype)
        ord = 2 if ord is None and function is not torch.linalg.norm else ord
        return RULES[function](x.abs(), ord, dim, keepdim, dtype=dtype and dtype.to_real())


for _function in {torch.linalg.vector_norm, torch.linalg.norm, *functions_named("norm")}:
    _norm_of_modulus(_function)


# -- Fourier transforms -------------------------------------------------------------------------------------------


def _all_or(x: Dual, dim: Any) -> list[int]:
    if x.dim() == 0 and dim is not None:
        raise IndexError(f"a 0-dimensional Dual has no axis {dim}.")
    return axes(x, tuple(range(x.dim())) if dim is None else dim)


def _transform(name: str) -> None:
    """Linear over the real numbers (also those that take a half-spectrum), so each acts on the stack."""
    function = getattr(torch.fft, name)

    def one(x: Dual, n: Any = None, dim: int = -1, norm: Any = None) -> Dual:
        return Dual(function(x.stacked, n, axes(x, dim)[0], norm))

    def several(x: Dual, s: Any = None, dim: Any = None, norm: Any = None) -> Dual:
        if dim is None and name.endswith("2"):
            dim = (-2, -1)
        if dim is None and s is not None:
            dim = tuple(range(x.dim() - len(s), x.dim()))
        return Dual(function(x.stacked, s, _all_or(x, dim), norm))

    def shift(x: Dual, dim: Any = None) -> Dual:
        return Dual(function(x.stacked, _all_or(x, dim)))

    both(function)(shift if name.endswith("shift") else several if name[-1] in "2n" else one)


for _name in "fft ifft rfft irfft hfft ihfft".split():
    for _suffix in ("", "2", "n"):
        _transform(_name + _suffix)
_transform("fftshift")
_transform("ifftshift")


def _short_time(function: Callable[..., Any], takes_dual_window: bool) -> None:
    """Linear in the signal, and ``stft`` in the window: a product rule of the two."""

    @both(function)
    def transform(
        input: Any,
        n_fft: int,
        hop_length: int | None = None,
        win_length: int | None = None,
        window: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        def transformed(x: torch.Tensor, w: torch.Tensor | None) -> torch.Tensor:
            return function(x, n_fft, hop_length, win_length, w, *args, **kwargs)

        if window is None or not takes_dual_window:
            if is_dual(window):
                raise UnsupportedOperation(
                    "window of istft must be a plain tensor, got a Dual: pass window.primal."
                )
            return per_slice(lambda x: transformed(x, window), input)
        return bilinear(transformed)(input, window)


# the builtin behind the wrapper takes other arguments after the window
for _name in ("stft", "istft"):
    for _function in functions_named(_name):
        _short_time(_function, takes_dual_window=_name == "stft")


def register() -> None:
    """Enter the rules that are right for complex numbers unchanged; called after all rules are registered."""
    for function, known in RULES.items():
        module = known.__module__.rpartition(".")[2]
        name = getattr(function, "__name__", "")
        if known in LINEAR or module in _LINEAR or name in _HOLDS:
            COMPLEX.setdefault(function, known)
