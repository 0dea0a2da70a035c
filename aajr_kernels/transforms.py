"""Function transforms on top of the number: jvp with the calling convention of ``torch.func.jvp``."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch

from . import tracing
from .dual import Dual, dual, is_dual, num_tangents
from .torch_private import pytree

__all__ = ["jvp", "primal_tree"]


def jvp(
    func: Callable[..., Any],
    primals: tuple[Any, ...],
    tangents: tuple[Any, ...],
    *,
    strict: bool = False,
    has_aux: bool = False,
) -> tuple[Any, ...]:
    """Value and directional derivative of `func`, with the calling convention of ``torch.func.jvp``.

    Unlike there, a tangent may also be ``[K, *primal.shape]`` for K directions at once, and the gradient of anything
    computed from the result flows through value and tangent alike, to the primals, the tangents and every parameter.

    Args:
        func: function of ``len(primals)`` tensors (or trees of tensors) that returns a tensor or a tree of them.
        primals: arguments of `func`.
        tangents: directions, same structure as `primals`.
        strict: raise when an output does not depend on the inputs, instead of returning zeros.
        has_aux: `func` returns ``(output, aux)``; aux is returned as a third element with Duals replaced by primals.

    Returns:
        ``(output, output_tangent)`` or ``(output, output_tangent, aux)``; tangents are ``[K, ...]`` when K > 1.

    Raises:
        TypeError, ValueError: structures, shapes or dtypes of primals and tangents do not agree.
        RuntimeError: `strict` and an output does not depend on the inputs.
    """
    if not isinstance(primals, tuple) or not isinstance(tangents, tuple) or not primals:
        raise TypeError(
            f"primals and tangents must be non-empty tuples, got {type(primals).__name__} and "
            f"{type(tangents).__name__}: write jvp(func, (x,), (v,))."
        )
    flat_x, structure = pytree.tree_flatten(primals)
    flat_v, v_structure = pytree.tree_flatten(tangents)
    if structure != v_structure:
        raise TypeError(f"tangents must have the structure of primals ({structure}), got {v_structure}.")
    duals = [dual(x, v) for x, v in zip(flat_x, flat_v)]
    k = num_tangents(*duals)
    single = all(v.shape == x.shape for x, v in zip(flat_x, flat_v))
    result = tracing.call(func, *pytree.tree_unflatten(duals, structure))
    aux = None
    if has_aux:
        if not isinstance(result, tuple) or len(result) != 2:
            raise TypeError(f"func must return (output, aux) with has_aux=True, got {type(result).__name__}.")
        result, aux = result

    def tangent_of(y: Any) -> Any:
        if isinstance(y, Dual):
            return y.tangents[0] if single else y.tangents
        if strict:
            raise RuntimeError("an output of func does not depend on the inputs (strict=True).")
        if not isinstance(y, torch.Tensor):
            raise TypeError(f"func must return tensors, got {type(y).__name__}.")
        return torch.zeros_like(y) if single else y.new_zeros((k, *y.shape))

    outputs = primal_tree(result)
    output_tangents = pytree.tree_map(tangent_of, result, is_leaf=is_dual)
    return (outputs, output_tangents, primal_tree(aux)) if has_aux else (outputs, output_tangents)


def primal_tree(tree: Any) -> Any:
    """`tree` with every Dual replaced by its primal, still attached to the graph.

    An object that pytree does not know and that holds a Dual (a key-value cache, a dataclass) is copied to that end.
    """
    seen: set[int] = set()

    def plain(leaf: Any) -> Any:
        if isinstance(leaf, Dual):
            return leaf.primal
        if isinstance(leaf, (torch.Tensor, torch.nn.Module, type)) or not hasattr(leaf, "__dict__"):
            return leaf
        if id(leaf) in seen or torch.compiler.is_compiling():
            return leaf
        seen.add(id(leaf))
        held, structure = pytree.tree_flatten(vars(leaf), is_leaf=is_dual)
        replaced = [plain(value) for value in held]
        if all(new is old for new, old in zip(replaced, held)):
            return leaf
        result = copy.copy(leaf)
        vars(result).update(pytree.tree_unflatten(replaced, structure))
        return result

    return pytree.tree_map(plain, tree, is_leaf=is_dual)
