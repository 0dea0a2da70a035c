"""Schemas of the activations' launchers, the same on every backend."""

from ...backends.operator import Operator

POINTWISE_FWD = Operator("pointwise_fwd(Tensor x, str kind) -> Tensor")
POINTWISE_BWD = Operator("pointwise_bwd(Tensor y_bar, Tensor x, str kind) -> Tensor")
GATED_FWD = Operator("gated_fwd(Tensor gate, Tensor up, str kind) -> Tensor")
GATED_BWD = Operator(
    "gated_bwd(Tensor h_bar, Tensor gate, Tensor up, str kind, bool need_gate, bool need_up) -> (Tensor, Tensor)",
    present=("need_gate", "need_up"),
)
