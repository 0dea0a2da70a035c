"""Schemas of the rotary embedding's launchers, the same on every backend."""

from ...backends.operator import Operator

ROTARY_FWD = Operator("rotary_fwd(Tensor x, Tensor cos, Tensor sin, bool interleaved) -> Tensor")
ROTARY_BWD = Operator("rotary_bwd(Tensor y_bar, Tensor cos, Tensor sin, bool interleaved) -> Tensor")
ROTARY_TABLES_BWD = Operator(
    "rotary_tables_bwd(Tensor y_bar, Tensor x, Tensor cos, Tensor sin, bool interleaved) -> (Tensor, Tensor)"
)
