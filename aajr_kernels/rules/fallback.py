"""The generic rule, for an allow-list of functions: ``torch.func.jvp`` of that one operation.

Forward mode of the operation gives its tangent, and autograd through it the gradient. That second step is wrong
upstream for some functions, so a name stands here only because the sweep in ``tests/rules/test_fallback_sweep.py``
compares value, tangent and every gradient with finite differences. Never to be listed: layer_norm, native_layer_norm,
instance_norm and batch_norm (their reverse-over-forward is wrong; they have rules), linalg solve, det, slogdet and
logdet, scatter_reduce with prod, attention, opaque custom operators; and by the sweep cholesky_inverse and
householder_product (wrong), eigh (NaN through its vectors), Bessel functions (silently a tangent of zeros).
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch

from ..backends.errors import UnsupportedOperation
from ..torch_private import break_graph, pytree
from .common import Dual, any_low, cast, is_dual, num_tangents, primal_of, raised
from .registry import RULES, functions_named, rule

#: names, looked up in every torch namespace; a dotted one only in its namespace
ALLOWED = """
angle arccosh arcsinh arctanh entr erfcx float_power gammaln i0 i0e i1 i1e log_ndtr logaddexp2
multigammaln mvlgamma ndtr ndtri polygamma psi xlog1py block_diag cartesian_prod column_stack combinations
cumulative_trapezoid diff gradient linalg.vander meshgrid put sum_to_size trace trapezoid trapz corrcoef cov
frobenius_norm linalg.matrix_norm mode nanmean nanmedian nanquantile nansum nuclear_norm quantile renorm
vecdot cholesky cholesky_solve eigvalsh inv inv_ex inverse lu_factor matrix_exp matrix_power pinv pinverse
qr solve_triangular svdvals tensorinv cosine_embedding_loss hinge_embedding_loss margin_ranking_loss
poisson_nll_loss linalg.cholesky_ex linalg.lu_factor_ex triplet_margin_loss triplet_margin_with_distance_loss
""".split()


def generic(function: Callable[..., Any]) -> Callable[..., Any]:
    """The rule ``torch.func.jvp(function)``, one tangent at a time, plain arguments closed over.

    Low dtypes are computed in float32 and rounded once, if torch supports them.
    """

    def rule_(*args: Any, **kwargs: Any) -> Any:
        break_graph(
            f"{function.__name__} of a Dual is differentiated by torch.func.jvp, which torch.compile does not trace: "
            "write it with functions that have rules, or compile without fullgraph=True."
        )
        leaves, structure = pytree.tree_flatten((args, kwargs), is_leaf=is_dual)
        dtypes = None
        if any_low(leaves):
            with torch.no_grad():
                plain_args, plain_kwargs = pytree.tree_unflatten(
                    [primal_of(leaf) for leaf in leaves], structure
                )
                low = function(*plain_args, **plain_kwargs)
            dtypes = [y.dtype for y in pytree.tree_leaves(low)]
            leaves = [raised(leaf) for leaf in leaves]
        places = [i for i, leaf in enumerate(leaves) if is_dual(leaf)]
        k = num_tangents(*leaves)

        def call(*values: torch.Tensor) -> Any:
            filled = list(leaves)
            for place, value in zip(places, values):
                filled[place] = value
            plain_args, plain_kwargs = pytree.tree_unflatten(filled, structure)
            return function(*plain_args, **plain_kwargs)

        primals = tuple(leaves[i].primal for i in places)
        try:
            runs = [
                torch.func.jvp(call, primals, tuple(leaves[i].stacked[j] for i in places))
                for j in range(1, k + 1)
            ]
        except RuntimeError as error:
            if "not differentiable" in str(error) or "forward AD" in str(error):
                raise UnsupportedOperation(
                    f"{function.__name__} has no derivative in one of its Duals: pass that one's primal."
                ) from error
            raise
        value = runs[0][0] if runs else call(*primals)
        primal_leaves, result = pytree.tree_flatten(value)
        tangent_leaves = [pytree.tree_leaves(run[1]) for run in runs]
        outputs: list[Any] = [
            Dual(torch.stack([value, *(leaves[i] for leaves in tangent_leaves)]))
            if value.is_floating_point() or value.is_complex()
            else value
            for i, value in enumerate(primal_leaves)
        ]
        if dtypes is not None:
            outputs = [cast(y, dtype) for y, dtype in zip(outputs, dtypes)]
        return pytree.tree_unflatten(outputs, result)

    return rule_


def functions_allowed(name: str) -> list[Callable[..., Any]]:
    """The torch functions that an entry of :data:`ALLOWED` stands for."""
    return [operator.attrgetter(name)(torch)] if "." in name else functions_named(name)


@rule("scatter_reduce", kind="fallback")
def _scatter_reduce(
    x: Any, dim: int, index: torch.Tensor, src: Any, reduce: str, *, include_self: bool = True
) -> Any:
    if reduce == "prod":
        raise UnsupportedOperation(
            "scatter_reduce with reduce='prod' has a wrong derivative in PyTorch: use exp of a sum of logs."
        )
    return generic(torch.scatter_reduce)(x, dim, index, src, reduce, include_self=include_self)


for _name in ALLOWED:
    for _function in functions_allowed(_name):
        if _function not in RULES:
            rule(_function, kind="fallback")(generic(_function))
