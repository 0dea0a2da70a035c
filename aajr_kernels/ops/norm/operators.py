"""Schemas of the norms' launchers, the same on every backend."""

from ...backends.operator import Operator

NORM_FWD = Operator(
    "norm_fwd(Tensor x, Tensor? weight, Tensor? bias, float eps, float offset, bool centred, Tensor? residual=None) "
    "-> (Tensor, Tensor, Tensor)",
    present=("x", "x", "residual"),
)
NORM_BWD = Operator(
    "norm_bwd(Tensor y_bar, Tensor x, Tensor? weight, Tensor stats, float offset, bool centred, bool need_x, "
    "bool need_weight, bool need_bias, Tensor? sum_bar=None) -> (Tensor, Tensor, Tensor)",
    present=("need_x", "need_weight", "need_bias"),
)
