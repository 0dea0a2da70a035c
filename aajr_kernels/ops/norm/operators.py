"""Schemas of the norms' launchers, the same on every backend."""

from ...backends.operator import Operator

NORM_FWD = Operator(
    "norm_fwd(Tensor x, Tensor? weight, Tensor? bias, float eps, float offset, bool centred) -> (Tensor, Tensor)"
)
ADD_NORM_FWD = Operator(
    "add_norm_fwd(Tensor x, Tensor residual, Tensor? weight, Tensor? bias, float eps, float offset, bool centred) "
    "-> (Tensor, Tensor, Tensor)"
)
NORM_BWD = Operator(
    "norm_bwd(Tensor y_bar, Tensor x, Tensor? weight, Tensor stats, float offset, bool centred, bool need_x, "
    "bool need_weight, bool need_bias, Tensor? sum_bar=None) -> (Tensor, Tensor, Tensor)",
    present=("need_x", "need_weight", "need_bias"),
)
