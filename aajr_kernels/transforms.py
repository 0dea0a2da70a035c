"""``jvp`` with the calling convention of ``torch.func.jvp``, and calls of functions that torch.compile traces."""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from .backends.errors import UnsupportedOperation
from .dual import Dual, dispatch, dual, is_dual, num_tangents
from .rules.registry import TRACED
from .torch_private import TRACED_CHECKPOINT, pytree

__all__ = ["call", "jvp", "primal_tree", "tuple_arguments", "uncompiled"]

Function = TypeVar("Function", bound=Callable[..., Any])


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
    result = call(func, *pytree.tree_unflatten(duals, structure))
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


# -- under torch.compile ------------------------------------------------------------------------------------


class tuple_arguments(TorchFunctionMode):
    """Context in which torch functions find the Duals in tuples and lists, as in ``torch.cat((a, b))``.

    Eager torch looks into such arguments by itself. While torch.compile traces it does not, and hands the Dual to
    torch.cat as if it were a tensor. :func:`aajr_kernels.aligned_penalty` and :func:`aajr_kernels.jvp` enter this
    context around what they call; code that builds a Dual by itself and is compiled enters it, inside the compiled
    function. Outside of compiled code it changes nothing.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if _in_sequences(args) or _in_sequences(kwargs.values()):
            return dispatch(func, args, kwargs)
        return func(*args, **kwargs)


def call(function: Callable[..., Any], *args: Any) -> Any:
    """``function(*args)``, in that context where torch.compile traces it."""
    if torch.compiler.is_compiling():
        with tuple_arguments():
            return function(*args)
    try:
        return function(*args)
    except TypeError as error:
        # Python refuses before torch is asked: the descriptors of torch.Tensor take instances of its class in C
        if "'Dual'" in str(error) and (unbound := re.match(r"descriptor '(\w+)'", str(error))):
            name = unbound.group(1)
            raise UnsupportedOperation(
                f"torch.Tensor.{name} cannot be called unbound with a Dual, of which torch is not told: call the "
                f"method of the Dual, x.{name}(...), or the function of torch of that name."
            ) from error
        raise


def _checkpoint(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Non-reentrant checkpointing under torch.compile: tensors go in, a Dual is made of them inside."""
    are_duals = [isinstance(arg, Dual) for arg in args]

    def inside(*values: Any) -> Any:
        return function(*(Dual(value) if dual else value for value, dual in zip(values, are_duals)))

    return checkpoint(inside, *(arg.stacked if isinstance(arg, Dual) else arg for arg in args), **kwargs)


TRACED[TRACED_CHECKPOINT] = _checkpoint


def _in_sequences(values: Iterable[Any]) -> bool:
    for value in values:
        if isinstance(value, (tuple, list)):
            for item in value:
                if isinstance(item, Dual):
                    return True
    return False


def uncompiled(func: Function) -> Function:
    """`func` as a break in the graphs that torch.compile makes of its callers.

    ``torch.compiler.disable`` as a decorator would import the compiler with the module, which takes a second.
    """

    @functools.wraps(func)
    def outside(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return torch.compiler.disable(func)(*args, **kwargs)
        return func(*args, **kwargs)

    return outside  # type: ignore[return-value]
