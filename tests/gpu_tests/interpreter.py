"""bfloat16 in Triton's interpreter, for the tests.

The interpreter keeps bfloat16 as 16-bit integers. Its products multiply those integers, and its casts cut bits off
instead of rounding to the nearest number; both are repaired here, in the test process alone.
"""

from __future__ import annotations

import numpy as np


def patch() -> None:
    """Give the interpreter correct bfloat16 products and casts."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    cast, dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot

    def widened(bits: np.ndarray) -> np.ndarray:
        return (bits.astype(np.uint32) << 16).view(np.float32)

    def rounded(x: np.ndarray) -> np.ndarray:
        bits = np.ascontiguousarray(x).view(np.uint32)
        nearest_even = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return np.where(np.isnan(x), 0x7FC0, nearest_even).astype(np.uint16).reshape(x.shape)

    def cast_impl(self, src, dst_type):
        source, wanted = src.dtype.scalar, dst_type.scalar
        if source == tl.bfloat16 and wanted != tl.bfloat16:
            wide = TensorHandle(widened(src.data).reshape(src.data.shape), tl.float32)
            return wide if wanted == tl.float32 else cast(self, wide, dst_type)
        if wanted == tl.bfloat16 and source != tl.bfloat16:
            wide = src if source == tl.float32 else cast(self, src, tl.float32)
            return TensorHandle(rounded(wide.data), tl.bfloat16)
        return cast(self, src, dst_type)

    def create_dot(self, a, b, d, *options):
        a, b = (
            TensorHandle(widened(x.data).reshape(x.data.shape), tl.float32)
            if x.dtype.scalar == tl.bfloat16
            else x
            for x in (a, b)
        )
        return dot(self, a, b, d, *options)

    def create_fp_to_fp(self, src, dst_type, rounding_mode):
        return cast_impl(self, src, dst_type)

    InterpreterBuilder.cast_impl = cast_impl
    InterpreterBuilder.create_dot = create_dot
    InterpreterBuilder.create_fp_to_fp = create_fp_to_fp
