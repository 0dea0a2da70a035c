"""Schemas of the streamed head's launchers, the same on every backend."""

from ...backends.operator import Operator

_OPERANDS = (
    "Tensor h, Tensor weight, Tensor? bias, Tensor? labels, Tensor? count, str metric, float scale, "
    "float? softcap, int ignore_index"
)
HEAD_FWD = Operator(f"head_fwd({_OPERANDS}) -> (Tensor, Tensor, Tensor)", present=("h", "labels", "h"))
HEAD_BWD = Operator(
    f"head_bwd({_OPERANDS}, Tensor? q_bar, Tensor? nll_bar, Tensor stats, bool need_h, bool need_weight, "
    "bool need_bias) -> (Tensor, Tensor, Tensor)",
    present=("need_h", "need_weight", "need_bias"),
)
