"""Schemas of attention's launchers, the same on every backend."""

from ...backends.operator import Operator

#: `Options` as an operator takes them; lengths may be symbols
_OPTIONS = (
    "float scale, float? softcap, SymInt? offset, SymInt? window, float dropout, bool align_right, Tensor? drawn, "
    "Tensor? q_start, Tensor? k_start"
)
ATTENTION_FWD = Operator(
    f"attention_fwd(Tensor q, Tensor k, Tensor v, Tensor? mask, {_OPTIONS}) -> (Tensor, Tensor, Tensor)"
)
ATTENTION_BWD = Operator(
    "attention_bwd(Tensor out_bar, Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor out, Tensor stats, Tensor means, "
    f"bool need_q, bool need_k, bool need_v, bool need_bias, {_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor)",
    present=("need_q", "need_k", "need_v", "need_bias"),
)
