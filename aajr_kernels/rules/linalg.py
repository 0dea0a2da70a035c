"""Rules of linear algebra: solutions, determinants and decompositions.

PyTorch's forward mode of these is right and its reverse mode of the *first* order too, but the gradient through the
forward mode is wrong or missing for several. So the primal comes from torch's function and the tangent from the
formula, both of which autograd differentiates once. Conjugates are written out: the rules hold for complex numbers.
"""

from __future__ import annotations

import types
from typing import Any

import torch

from ..backends.errors import UnsupportedOperation
from ..torch_private import LOW_RANK
from .common import Dual, join, ndim_of, num_tangents, parts, primal_of, split
from .registry import rule

#: named tuples, which torch's stubs define in part
_types: Any = torch.return_types

# -- systems of equations ---------------------------------------------------------------------------------------------


def _is_vector(a: Any, b: Any) -> bool:
    """Whether torch treats the right-hand side of a system as (a batch of) vectors."""
    return b.dim() == 1 or (a.dim() - 1 == b.dim() and b.shape == a.shape[:-1])


def _solution(a: Any, b: Any, left: bool) -> Any:
    """X with A X = B, or X A = B, and Ẋ = A⁻¹ (Ḃ − Ȧ X)."""
    if _is_vector(a, b):
        return _solution(a, b.unsqueeze(-1), left).squeeze(-1)
    if not left:
        return _solution(a.mT, b.mT, True).mT
    num_tangents(a, b)
    n = ndim_of(a, b)
    (p, p_tan), (q, q_tan) = parts(a, n), parts(b, n)
    x = torch.linalg.solve(p, q)
    rest = q_tan if p_tan is None else -(p_tan @ x) if q_tan is None else q_tan - p_tan @ x
    return join(x if x.dim() == n + 1 else x.unsqueeze(0), torch.linalg.solve(p, rest))


rule(torch.linalg.solve)(lambda A, B, *, left=True: _solution(A, B, left))


@rule(torch.linalg.solve_ex)
def _solve_ex(A: Any, B: Any, *, left: bool = True, check_errors: bool = False) -> Any:
    a, b = (primal_of(v).detach() for v in (A, B))
    info = torch.linalg.solve_ex(a, b, left=left, check_errors=check_errors).info
    return _types.linalg_solve_ex((_solution(A, B, left), info))


@rule(torch.linalg.tensorsolve)
def _tensorsolve(A: Any, B: Any, dims: Any = None) -> Any:
    if dims is not None:
        dims = [d % A.dim() for d in dims]
        A = A.permute(*(d for d in range(A.dim()) if d not in dims), *dims)
    shape = tuple(A.shape[B.dim() :])
    size = B.numel()
    return _solution(A.reshape(size, size), B.reshape(size), True).reshape(shape)


@rule(torch.linalg.lstsq)
def _lstsq(A: Any, B: Any, rcond: float | None = None, *, driver: str | None = None) -> Any:
    """The solution of least squares (of least norm) by the pseudoinverse, differentiable while the rank stays."""
    a, b = (primal_of(v).detach() for v in (A, B))
    plain = torch.linalg.lstsq(a, b, rcond, driver=driver)
    x = torch.linalg.pinv(A, rtol=rcond)
    vector = _is_vector(A, B)
    b_matrix = B.unsqueeze(-1) if vector else B
    solution = x @ b_matrix
    residuals = plain.residuals
    if residuals.numel():
        residuals = (A @ solution - b_matrix).abs().square().sum(-2)
    result = (solution.squeeze(-1) if vector else solution, residuals, plain.rank, plain.singular_values)
    return _types.linalg_lstsq(result)


# -- determinants -----------------------------------------------------------------------------------------------------


def _trace_of_quotient(a: torch.Tensor, tangents: torch.Tensor) -> torch.Tensor:
    """tr(A⁻¹ Ȧ), not finite where A is singular."""
    solution = torch.linalg.solve_ex(a, tangents).result
    return solution.diagonal(dim1=-2, dim2=-1).sum(-1)


@rule("det")
def _det(A: Dual) -> Any:
    """Exact at singular matrices too, where torch's own gradient may be wrong.

    With A = U S Vᴴ the determinant is det U det Vᴴ times that of B = Uᴴ A V, which is diagonal where U and V were
    taken: Π b_ii − Σ_{i<j} b_ij b_ji Π_{k≠i,j} s_k has its value and its first two derivatives there.
    """
    u, s, vh = torch.linalg.svd(A.primal.detach())
    n = s.shape[-1]
    b = u.mH @ A @ vh.mH
    product = torch.diagonal(b, dim1=-2, dim2=-1).prod(-1)
    eye = torch.eye(n, dtype=torch.bool, device=s.device)
    left_out = eye.unsqueeze(0) | eye.unsqueeze(1)
    rest = torch.where(left_out, 1.0, s[..., None, None, :]).prod(-1).to(u.dtype)
    minors = b * b.mT * rest.triu(1)
    return (product - minors.sum((-2, -1))) * (torch.linalg.det(u) * torch.linalg.det(vh))


@rule("slogdet")
def _slogdet(A: Dual) -> Any:
    a, tangents = split(A)
    sign, size = torch.linalg.slogdet(a)
    trace = _trace_of_quotient(a, tangents)
    turned = sign * 1j * trace.imag if a.is_complex() else torch.zeros_like(trace)
    grown = trace.real if a.is_complex() else trace
    return _types.linalg_slogdet((join(sign, turned), join(size, grown)))


@rule("logdet")
def _logdet(A: Dual) -> Dual:
    a, tangents = split(A)
    return join(torch.logdet(a), _trace_of_quotient(a, tangents))


# -- eigenvalues and singular values ----------------------------------------------------------------------------------


def _gaps(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``λ_j − λ_i`` with ones on the diagonal, and the mask of the diagonal."""
    diagonal = torch.eye(values.shape[-1], dtype=torch.bool, device=values.device)
    return torch.where(diagonal, 1.0, values.unsqueeze(-2) - values.unsqueeze(-1)), diagonal


@rule(torch.linalg.eigh)
def _eigh(A: Dual, UPLO: str = "L") -> Any:
    """With P = Vᴴ Ȧ V: λ̇ = diag P and V̇ = V (P_ij / (λ_j − λ_i))."""
    a, tangents = split(A)
    values, vectors = torch.linalg.eigh(a, UPLO)
    change = vectors.mH @ tangents @ vectors
    gaps, diagonal = _gaps(values)
    turn = torch.where(diagonal, 0.0, change / gaps)
    values_tan = change.diagonal(dim1=-2, dim2=-1)
    values_tan = values_tan.real if values_tan.is_complex() else values_tan
    return _types.linalg_eigh((join(values, values_tan), join(vectors, vectors @ turn)))


@rule(torch.linalg.eig)
def _eig(A: Dual) -> Any:
    """With P = V⁻¹ Ȧ V: λ̇ = diag P and V̇ = V (P_ij / (λ_j − λ_i)), less what would change the norm of a column."""
    a, tangents = split(A)
    values, vectors = torch.linalg.eig(a)
    change = torch.linalg.solve(vectors, tangents.to(vectors.dtype) @ vectors)
    gaps, diagonal = _gaps(values)
    turned = vectors @ torch.where(diagonal, 0.0, change / gaps)
    turned = turned - vectors * (vectors.conj() * turned).sum(-2, keepdim=True).real
    values_tan = change.diagonal(dim1=-2, dim2=-1)
    return _types.linalg_eig((join(values, values_tan), join(vectors, turned)))


rule(torch.linalg.eigvals)(lambda A: _eig(A).eigenvalues)


def _singular(A: Dual) -> tuple[Dual, Dual, Dual]:
    """U, S and V with U S Vᴴ = A: the tangents of U and V are turns within their columns and out of their span."""
    a, tangents = split(A.clone())  # torch saves no operand, so A may be written afterwards
    u, s, vh = torch.linalg.svd(a, full_matrices=False)
    v = vh.mH
    change = u.mH @ tangents @ v
    squares, diagonal = _gaps(s.square())
    row, column = s.unsqueeze(-2), s.unsqueeze(-1)
    u_turn = torch.where(diagonal, 0.0, (change * row + column * change.mH) / squares)
    v_turn = torch.where(diagonal, 0.0, (column * change + change.mH * row) / squares)
    s_tan = change.diagonal(dim1=-2, dim2=-1)
    if a.is_complex():  # the phases of a pair of columns are free but for their difference
        phase = torch.diag_embed(s_tan.imag / (2 * s)) * 1j
        u_turn, v_turn, s_tan = u_turn + phase, v_turn - phase, s_tan.real
    u_tan, v_tan = u @ u_turn, v @ v_turn
    if a.shape[-2] > a.shape[-1]:
        out = tangents @ v
        u_tan = u_tan + (out - u @ (u.mH @ out)) / row
    if a.shape[-2] < a.shape[-1]:
        out = tangents.mH @ u
        v_tan = v_tan + (out - v @ (v.mH @ out)) / row
    return join(u, u_tan), join(s, s_tan), join(v, v_tan)


def _check_full(A: Dual, full: bool) -> None:
    if full and A.shape[-1] != A.shape[-2]:
        raise UnsupportedOperation(
            f"svd of a Dual of shape {tuple(A.shape)} has no derivative of the columns beyond the singular values: "
            "pass full_matrices=False."
        )


@rule(torch.linalg.svd)
def _svd(A: Dual, full_matrices: bool = True, *, driver: str | None = None) -> Any:
    _check_full(A, full_matrices)
    u, s, v = _singular(A)
    return _types.linalg_svd((u, s, v.mH))


@rule(torch.svd, torch.Tensor.svd)
def _old_svd(A: Dual, some: bool = True, compute_uv: bool = True) -> Any:
    if not compute_uv:
        s = torch.linalg.svdvals(A)
        m, n = A.shape[-2:]
        u, v = (A.new_zeros((*A.shape[:-2], size, size)) for size in (m, n))
        return _types.svd((u, s, v))
    _check_full(A, not some)
    return _types.svd(_singular(A))


@rule(torch.linalg.cond)
def _cond(A: Dual, p: Any = None) -> Dual:
    if p in (None, 2, -2):
        s = torch.linalg.svdvals(A)
        return s[..., -1] / s[..., 0] if p == -2 else s[..., 0] / s[..., -1]
    return torch.linalg.matrix_norm(A, p) * torch.linalg.matrix_norm(torch.linalg.inv(A), p)


# -- triangular and orthogonal factors --------------------------------------------------------------------------------


@rule("cholesky_inverse")
def _cholesky_inverse(L: Dual, upper: bool = False) -> Dual:
    factor = L.triu() if upper else L.tril()
    eye = torch.eye(L.shape[-1], dtype=L.dtype, device=L.device).expand(tuple(L.shape))
    half = torch.linalg.solve_triangular(factor, eye, upper=upper)
    return half @ half.mH if upper else half.mH @ half


@rule(torch.linalg.householder_product, torch.orgqr, torch.Tensor.orgqr)
def _householder_product(A: Any, tau: Any) -> Any:
    """(I − τ₁ v₁ v₁ᴴ) (I − τ₂ v₂ v₂ᴴ) ..., its first columns."""
    if A.dtype in (torch.bfloat16, torch.float16):
        raise RuntimeError(f"householder_product has no kernel of {A.dtype}: cast before.")
    m, n = A.shape[-2:]
    below = A.tril(-1)
    eye = torch.eye(m, n, dtype=A.dtype, device=A.device)
    product: Any = eye.expand(*A.shape[:-2], m, n)
    for i in reversed(range(tau.shape[-1])):
        v = (below[..., i] + eye[:, i]).unsqueeze(-1)
        product = product - tau[..., i, None, None] * (v @ (v.mH @ product))
    return product


@rule("lu_unpack")
def _lu_unpack(LU: Any, pivots: torch.Tensor, unpack_data: bool = True, unpack_pivots: bool = True) -> Any:
    plain = torch.lu_unpack(LU.primal.detach(), pivots, unpack_data, unpack_pivots)
    if not unpack_data:
        return plain
    k = min(LU.shape[-2:])
    eye = torch.eye(LU.shape[-2], k, dtype=LU.dtype, device=LU.device)
    lower, upper = LU[..., :k].tril(-1) + eye, LU[..., :k, :].triu()
    return _types.lu_unpack((plain.P, lower, upper))


@rule(torch.linalg.lu)
def _lu(A: Dual, *, pivot: bool = True) -> Any:
    factors, pivots = torch.linalg.lu_factor(A, pivot=pivot)
    permutation, lower, upper = _lu_unpack(factors, pivots)
    return _types.linalg_lu((permutation if pivot else A.new_empty(0).primal, lower, upper))


@rule(torch.linalg.lu_solve)
def _lu_solve(LU: Any, pivots: torch.Tensor, B: Any, *, left: bool = True, adjoint: bool = False) -> Any:
    """A = P L U in turn: two triangular systems and a permutation."""
    if not left:  # X A = B is Aᴴ Xᴴ = Bᴴ
        return _lu_solve(LU, pivots, B.mH, adjoint=not adjoint).mH
    permutation = torch.lu_unpack(primal_of(LU).detach(), pivots).P
    solve = torch.linalg.solve_triangular
    eye = torch.eye(LU.shape[-1], dtype=LU.dtype, device=LU.device)
    lower, upper = LU.tril(-1) + eye, LU.triu()
    lead = torch.broadcast_shapes(tuple(LU.shape[:-2]), tuple(B.shape[:-2]))
    lower, upper = (f.expand((*lead, *f.shape[-2:])) for f in (lower, upper))
    B = B.expand((*lead, *B.shape[-2:]))
    if adjoint:
        half = solve(upper.mH, B, upper=False)
        return permutation @ solve(lower.mH, half, upper=True, unitriangular=True)
    half = solve(lower, permutation.mT @ B, upper=False, unitriangular=True)
    return solve(upper, half, upper=True)


rule(torch.lu_solve, torch.Tensor.lu_solve)(lambda b, LU, pivots: _lu_solve(LU, pivots, b))


@rule(torch.lu, torch.Tensor.lu)
def _old_lu(A: Dual, pivot: bool = True, get_infos: bool = False, out: Any = None) -> Any:
    factors, pivots, infos = torch.linalg.lu_factor_ex(A, pivot=pivot, check_errors=not get_infos)
    return (factors, pivots, infos) if get_infos else (factors, pivots)


# the randomised factorisations that torch writes in Python run as they are, on dense Duals
_dense = types.SimpleNamespace(
    matmul=torch.matmul, is_sparse=lambda x: False, get_floating_dtype=lambda x: x.dtype
)
_scope = {**vars(LOW_RANK), "_utils": _dense, "has_torch_function": lambda values: False}
for _name in ("get_approximate_basis", "_svd_lowrank", "svd_lowrank", "pca_lowrank"):
    _function = getattr(LOW_RANK, _name)
    _scope[_name] = types.FunctionType(_function.__code__, _scope, _name, _function.__defaults__)
for _name in ("svd_lowrank", "pca_lowrank"):
    rule(getattr(torch, _name))(_scope[_name])


@rule("triangular_solve")
def _triangular_solve(
    b: Any, A: Any, upper: bool = True, transpose: bool = False, unitriangular: bool = False
) -> Any:
    factor = A.triu() if upper else A.tril()
    lead = torch.broadcast_shapes(tuple(A.shape[:-2]), tuple(b.shape[:-2]))
    factor, b = (x.expand((*lead, *x.shape[-2:])) for x in (factor, b))
    if transpose:
        factor, upper = factor.mT, not upper
    solution = torch.linalg.solve_triangular(factor, b, upper=upper, unitriangular=unitriangular)
    return _types.triangular_solve((solution, A.clone()))
