"""bfloat16 and tf32x3 in Triton's interpreter, for the tests, and less waiting for it.

The interpreter keeps bfloat16 as 16-bit integers. Its products multiply those integers, and its casts cut bits off
instead of rounding to the nearest number; both are repaired here, in the test process only. So are bounds of
loops, which Triton 3.6 keeps as arrays of one element: from 2.4 on NumPy makes no numbers of them.

Its float32 products are exact whatever precision a kernel asks for. Here "tf32x3" is rounded as matrix units round it
(:func:`tf32x3`), so that every test of a float32 kernel holds its budget with those roundings.
"""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import numpy as np

#: products that a matrix unit adds before it rounds, and the bits of a float64 that float32 has too
_CHUNK, _FLOAT32_BITS = 8, ~((1 << 29) - 1)


def tf32x3(a: np.ndarray, b: np.ndarray, d: np.ndarray) -> np.ndarray:
    """``a b + d`` in float32 from three products of tf32, as Triton forms it and a matrix unit adds it up.

    An operand is `high`, its 11 leading bits rounded to nearest, plus `low`, of which the unit reads 11 bits and drops
    the rest. Low times high, high times low and high times high go into one sum, in this order; the product of both low
    parts is left out. After every 8 products the sum is cut off to float32, towards zero; `d` is added at the end and
    rounded to nearest.
    """
    (a_high, a_low), (b_high, b_low) = _split(a), _split(b)
    total = np.zeros(d.shape)
    for rows, cols in ((a_low, b_high), (a_high, b_low), (a_high, b_high)):
        for k in range(0, rows.shape[1], _CHUNK):
            total += rows[:, k : k + _CHUNK] @ cols[k : k + _CHUNK]
            total = (total.view(np.int64) & _FLOAT32_BITS).view(np.float64)
    return total.astype(np.float32) + d


def _split(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    high = ((bits + 0x1000) & 0xFFFFE000).view(np.float32)
    low = ((x - high).view(np.uint32) & 0xFFFFE000).view(np.float32)
    return high.astype(np.float64), low.astype(np.float64)


def patch() -> None:
    """Give the interpreter correct products and casts, and quicker calls of device functions."""
    _patch_numbers()
    _patch_indices()
    _patch_calls()


def _patch_indices() -> None:
    from triton.runtime import interpreter

    original = interpreter._patch_lang_tensor

    def patch_lang_tensor(tensor, scope):
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_lang_tensor


def _patch_calls() -> None:
    """Every call of a device function searches triton.language anew for what has to be replaced: search once."""
    import triton.language as tl
    from triton.runtime import interpreter

    names: dict[Any, list[str]] = {}

    def patch_builtin(package, builder, scope):
        if package not in names:
            members = inspect.getmembers(package)
            names[package] = [name for name, member in members if tl.core.is_builtin(member)]
        builtins = names[package]
        if builtins and tl.core.is_builtin(getattr(package, builtins[0])):  # otherwise it was replaced before
            for name in builtins:
                interpreter._patch_attr(package, name, getattr(package, name), builder, scope)

    interpreter._patch_builtin = patch_builtin

    run = interpreter.GridExecutor.__call__

    def quietly(self, *args, **kwargs):
        # a GPU does not warn of infinities, which masks are made of, or of NaN
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            return run(self, *args, **kwargs)

    interpreter.GridExecutor.__call__ = quietly


def _patch_numbers() -> None:
    import triton.language as tl
    from triton._C.libtriton import ir
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    cast = InterpreterBuilder.cast_impl

    def widened(bits: np.ndarray) -> np.ndarray:
        return (bits.astype(np.uint32) << 16).view(np.float32)

    def rounded(x: np.ndarray) -> np.ndarray:
        bits = np.ascontiguousarray(x).view(np.uint32)
        nearest_even = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return np.where(np.isnan(x), 0x7FC0, nearest_even).astype(np.uint16).reshape(x.shape)

    def cast_impl(self, src, dst_type):
        source, target = src.dtype.scalar, dst_type.scalar
        if source == tl.bfloat16 and target != tl.bfloat16:
            wide = TensorHandle(widened(src.data).reshape(src.data.shape), tl.float32)
            return wide if target == tl.float32 else cast(self, wide, dst_type)
        if target == tl.bfloat16 and source != tl.bfloat16:
            wide = src if source == tl.float32 else cast(self, src, tl.float32)
            return TensorHandle(rounded(wide.data), tl.bfloat16)
        return cast(self, src, dst_type)

    def create_dot(self, a, b, d, precision, *options):
        if precision == ir.INPUT_PRECISION.TF32x3 and a.dtype.scalar == tl.float32:
            return TensorHandle(tf32x3(a.data, b.data, d.data), d.dtype.scalar)
        # in float64 and rounded once: a processor's library sums in an order that depends on the orientation, and the
        # backward recomputes the forward's products transposed; the matrix units of a GPU sum both in one order
        a, b = (
            (widened(x.data).reshape(x.data.shape) if x.dtype.scalar == tl.bfloat16 else x.data)
            for x in (a, b)
        )
        total = np.matmul(a.astype(np.float64), b.astype(np.float64)) + d.data
        return TensorHandle(total.astype(d.data.dtype), d.dtype.scalar)

    def create_fp_to_fp(self, src, dst_type, rounding_mode):
        return cast_impl(self, src, dst_type)

    InterpreterBuilder.cast_impl = cast_impl
    InterpreterBuilder.create_dot = create_dot
    InterpreterBuilder.create_fp_to_fp = create_fp_to_fp
