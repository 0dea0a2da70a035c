"""Schemas of the launchers of sensitivities and softmax, the same on every backend."""

from ...backends.operator import Operator

SENSITIVITY_FWD = Operator("sensitivity_fwd(Tensor y, str metric) -> Tensor")
SENSITIVITY_BWD = Operator("sensitivity_bwd(Tensor q_bar, Tensor y, str metric) -> Tensor")
SOFTMAX_FWD = Operator("softmax_fwd(Tensor x) -> Tensor")
SOFTMAX_BWD = Operator("softmax_bwd(Tensor y_bar, Tensor x) -> Tensor")
