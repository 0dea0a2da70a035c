"""Schemas of the rotary embedding's launchers, the same on every backend."""

from ...backends.operator import Operator

ROTATE = Operator("rotate(Tensor x, Tensor cos, Tensor sin, bool interleaved, bool transposed) -> Tensor")
ROTARY_TABLES_BWD = Operator(
    "rotary_tables_bwd(Tensor y_bar, Tensor x, Tensor cos, Tensor sin, bool interleaved) -> (Tensor, Tensor)"
)
