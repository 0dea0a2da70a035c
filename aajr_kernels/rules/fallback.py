"""The generic rule, for an allow-list of functions: ``torch.func.jvp`` of that one operation.

Forward mode of the operation gives its tangent, and autograd through it the gradient. That second step is wrong
upstream for some functions, so a name stands here only because the sweep in ``tests/rules/test_fallback_sweep.py``
compares value, tangent and every gradient with finite differences. Never to be listed: layer_norm, native_layer_norm,
instance_norm and batch_norm (their reverse-over-forward is wrong; they have rules), linalg solve, det, slogdet and
logdet, scatter_reduce with prod, attention, opaque custom operators.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.utils._pytree as pytree

from ..runtime import RULES, functions_named, rule
from .common import Dual, is_dual, num_tangents

ALLOWED = """
""".split()


def generic(function: Callable[..., Any]) -> Callable[..., Any]:
    """The rule ``torch.func.jvp(function)``, one tangent at a time, plain arguments closed over."""

    def rule_(*args: Any, **kwargs: Any) -> Any:
        leaves, structure = pytree.tree_flatten((args, kwargs), is_leaf=is_dual)
        places = [i for i, leaf in enumerate(leaves) if is_dual(leaf)]
        k = num_tangents(*leaves)

        def call(*values: torch.Tensor) -> Any:
            filled = list(leaves)
            for place, value in zip(places, values):
                filled[place] = value
            plain_args, plain_kwargs = pytree.tree_unflatten(filled, structure)
            return function(*plain_args, **plain_kwargs)

        primals = tuple(leaves[i].primal for i in places)
        runs = [torch.func.jvp(call, primals, tuple(leaves[i].stacked[j] for i in places)) for j in range(1, k + 1)]
        primal_leaves, result = pytree.tree_flatten(runs[0][0])
        tangent_leaves = [pytree.tree_leaves(tangent) for _, tangent in runs]
        outputs = [
            Dual(torch.stack([value, *(leaves[i] for leaves in tangent_leaves)]))
            if value.is_floating_point()
            else value
            for i, value in enumerate(primal_leaves)
        ]
        return pytree.tree_unflatten(outputs, result)

    return rule_


for _name in ALLOWED:
    for _function in functions_named(_name):
        if _function not in RULES:
            rule(_function, kind="fallback")(generic(_function))
