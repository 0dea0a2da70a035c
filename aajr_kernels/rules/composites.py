"""Rules of functions that torch writes in Python, attention, grouped products and recurrent cells.

A composite of ``torch.nn.functional`` runs again with its ``has_torch_function`` gate closed, so that the functions
it is made of meet the Dual one by one.
"""

from __future__ import annotations

import math
import types
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F

from .. import torch_private
from ..backends.errors import UnsupportedOperation
from ..coverage import record, recording
from ..ops import attention
from .common import Dual, is_dual, join, num_tangents, once_rounded, primal_of, split
from .registry import rule

# -- composites of torch.nn.functional --------------------------------------------------------------------------------

_GATES = ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic")
_OPEN = {**F.__dict__, **dict.fromkeys(_GATES, lambda *values: False)}


def ungated(function: types.FunctionType, **instead: Any) -> Callable[..., Any]:
    """The same function of ``torch.nn.functional`` without its call of ``__torch_function__``.

    `instead` are names of that module that it finds replaced.
    """
    names = {**_OPEN, **instead} if instead else _OPEN
    body = types.FunctionType(
        function.__code__, names, function.__name__, function.__defaults__, function.__closure__
    )
    body.__kwdefaults__ = function.__kwdefaults__
    return body


COMPOSITES = """
alpha_dropout binary_cross_entropy binary_cross_entropy_with_logits cross_entropy dropout1d dropout2d dropout3d
feature_alpha_dropout gaussian_nll_loss gumbel_softmax huber_loss kl_div l1_loss linear_cross_entropy?
local_response_norm lp_pool1d lp_pool2d lp_pool3d max_unpool1d max_unpool2d max_unpool3d mse_loss
multilabel_soft_margin_loss nll_loss normalize smooth_l1_loss soft_margin_loss
""".split()
#: composites whose every step would round, without matrix products
_POINTWISE = {"gaussian_nll_loss", "multilabel_soft_margin_loss", "normalize"}
for _name in COMPOSITES:
    _function = getattr(F, _name.rstrip("?"), None)
    if _function is not None:
        _body = ungated(_function)
        rule(_function, kind="op")(once_rounded(_body) if _name in _POINTWISE else _body)

# -- attention --------------------------------------------------------------------------------------------------------


@rule(F.scaled_dot_product_attention, kind="op")
def _sdpa(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    causal: bool | str = "upper_left" if is_causal else False
    if attn_mask is not None:
        if is_causal:
            raise RuntimeError(
                "attn_mask must be None when is_causal=True: put the causal part into the mask."
            )
        attn_mask, causal = _causal_bias(attn_mask)
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.dim() < 2:
            raise ValueError(
                f"{name} must have at least two axes [..., tokens, features], got {tuple(x.shape)}."
            )
    *lead, heads, key_heads = _leading(query, key, value, enable_gqa)
    q = _four_axes(query, lead, heads)
    k, v = (_four_axes(x, lead, key_heads) for x in (key, value))
    mask = None if attn_mask is None else _mask_four_axes(attn_mask, lead)
    out = attention.attention(q, k, v, mask=mask, causal=causal, scale=scale, dropout=dropout_p)
    dims = max(query.dim(), key.dim(), value.dim())
    return out.reshape(*(*lead, heads)[len(lead) + 3 - dims :], *out.shape[-2:])


@rule(torch_private.SAFE_SOFTMAX, torch_private.SAFE_SOFTMAX.default)
def _attention_weights(scores: Any, dim: int, dtype: torch.dtype | None = None) -> Any:
    """Softmax of masked scores over the keys `dim`, where a row without any visible key gives zeros."""
    if scores.shape[dim] == 0:
        return scores
    empty = (primal_of(scores) == -math.inf).all(dim, keepdim=True)
    return torch.softmax(scores.masked_fill(empty, 0.0), dim, dtype).masked_fill(empty, 0.0)


def dtype_of_mask(mask: Any) -> torch.dtype | None:
    """``F._none_or_dtype`` for Tensors and Duals."""
    return None if mask is None else mask.dtype


MHA: Any = F.multi_head_attention_forward
_MHA_NAMES = MHA.__code__.co_varnames[: MHA.__code__.co_argcount]
_mha_body = ungated(MHA, softmax=_attention_weights, _none_or_dtype=dtype_of_mask)


@rule(MHA, kind="op")
def multi_head_attention(*args: Any, **kwargs: Any) -> Any:
    """``F.multi_head_attention_forward`` with any of its tensors a Dual, masks and projections included."""
    kwargs.update(zip(_MHA_NAMES, args))
    if is_dual(kwargs.get("attn_mask")):
        kwargs["is_causal"] = False  # the hint would replace the mask, and drop its tangents
    return _mha_body(**kwargs)


def _causal_bias(mask: Any) -> tuple[Any, bool | str]:
    """The (mask, causal) of an ``attn_mask``, which may be one of torch's lazy causal biases."""
    variant = getattr(mask, "variant", None)
    if variant is None or is_dual(mask):
        return mask, False
    return None, {"UPPER_LEFT": "upper_left", "LOWER_RIGHT": "lower_right"}[variant.name]


def _leading(query: Any, key: Any, value: Any, enable_gqa: bool) -> list[int]:
    """Broadcast leading sizes ``[..., H, HK]`` of the three operands."""
    shapes = [(1,) * (3 - x.dim()) + tuple(x.shape[:-2]) for x in (query, key, value)]
    lead, *others = (shape[:-1] for shape in shapes)
    if any(other != lead for other in others):
        lead = torch.broadcast_shapes(lead, *others)  # which imports SymPy: a second
    h, hk, hv = (shape[-1] for shape in shapes)
    if enable_gqa:
        if hk != hv:  # each divides H: torch repeats both to the larger
            hk = hv = h
        return [*lead, h, hk]
    if len({h, hk, hv} - {1}) > 1:
        raise ValueError(
            f"query, key and value must have the same number of heads, got {h}, {hk} and {hv}: pass enable_gqa=True "
            "where heads share keys."
        )
    key_heads = hk if hk == hv else max(hk, hv)
    heads = max(h, key_heads)
    return [*lead, heads, key_heads]


def _four_axes(x: Any, lead: list[int], heads: int) -> Any:
    """`x` as ``[B, heads, tokens, features]``."""
    while x.dim() < 3:
        x = x.unsqueeze(0)
    if x.shape[-3] != heads:
        if heads % x.shape[-3]:
            raise ValueError(f"{x.shape[-3]} heads of an operand of attention do not divide {heads}.")
        x = x.repeat_interleave(heads // x.shape[-3], dim=-3)
    tail = (heads, *x.shape[-2:])
    if tuple(x.shape[:-3]) != tuple(lead):
        x = x.expand(*lead, *tail)
    return x.reshape(-1, *tail) if len(lead) != 1 else x


def _mask_four_axes(mask: Any, lead: list[int]) -> Any:
    """`mask` as ``[B or 1, H or 1, N or 1, M or 1]``."""
    while mask.dim() < 4:
        mask = mask.unsqueeze(0)
    if mask.dim() > 4 or len(lead) > 1:
        tail = mask.shape[-3:]
        if mask.numel() == tail.numel():
            return mask.reshape(1, *tail)
        return mask.expand(*lead, *tail).reshape(-1, *tail)
    return mask


# -- products bilinear over groups ------------------------------------------------------------------------------------


def _grouped(a: torch.Tensor, b: torch.Tensor, offs: torch.Tensor | None) -> torch.Tensor:
    """The plain grouped product, group by group where torch's kernel refuses (float64, odd strides)."""
    if offs is None:
        return torch.bmm(a, b)
    bounds = [0, *offs.tolist()]
    spans = list(pairwise(bounds))
    if a.dim() == 2 and b.dim() == 2:
        return torch.stack([a[:, i:j] @ b[i:j] for i, j in spans])
    if a.dim() == 2:
        rows = [a[i:j] @ b[g] for g, (i, j) in enumerate(spans)]
        rows.append(a.new_zeros(a.shape[0] - bounds[-1], b.shape[-1]))
        return torch.cat(rows)
    columns = [a[g] @ b[:, i:j] for g, (i, j) in enumerate(spans)]
    columns.append(a.new_zeros(a.shape[1], b.shape[1] - bounds[-1]))
    return torch.cat(columns, dim=1)


def _grouped_stack(a: torch.Tensor, b: torch.Tensor, offs: torch.Tensor | None) -> torch.Tensor:
    """``[R, ...]`` grouped products of a stack `a` ``[R, T, D]`` with plain weights, all slices of a group at once."""
    if offs is None or b.dim() != 3 or a.dim() != 3:
        return torch.stack([_grouped(part, b, offs) for part in a.unbind(0)])
    bounds = [0, *offs.tolist()]
    parts = [
        (a[:, i:j].reshape(-1, a.shape[-1]) @ b[g]).reshape(a.shape[0], j - i, b.shape[-1])
        for g, (i, j) in enumerate(pairwise(bounds))
    ]
    parts.append(a.new_zeros(a.shape[0], a.shape[1] - bounds[-1], b.shape[-1]))
    return torch.cat(parts, dim=1)


def grouped_mm(
    mat_a: Any,
    mat_b: Any,
    offs: torch.Tensor | None = None,
    bias: Any = None,
    out_dtype: torch.dtype | None = None,
) -> Any:
    """``torch.nn.functional.grouped_mm`` of Duals: bilinear, so exact from products of the stacks.

    Args:
        mat_a: ``[T, D]`` (groups of rows) or ``[G, T, D]``; Tensor or Dual.
        mat_b: ``[G, D, E]`` or ``[D, T]``; Tensor or Dual.
        offs: ``[G]`` ends of the groups along the axis that a 2-D operand splits; rows beyond the last give zeros.
        bias: added to the result; Tensor or Dual.
        out_dtype: dtype of the result.
    """
    slices = 1 + num_tangents(mat_a, mat_b, bias)
    out: Any
    if not is_dual(mat_b):
        plain = not is_dual(mat_a)
        out = _grouped(mat_a, mat_b, offs) if plain else Dual(_grouped_stack(mat_a.stacked, mat_b, offs))
    elif not is_dual(mat_a):
        out = Dual(torch.stack([_grouped(mat_a, part, offs) for part in mat_b.stacked.unbind(0)]))
    else:
        b, b_tan = split(mat_b)
        both = _grouped_stack(mat_a.stacked, b[0], offs)
        others = [_grouped(mat_a.stacked[0], part, offs) for part in b_tan.unbind(0)]
        out = join(both[:1], both[1:] + torch.stack(others)) if others else Dual(both)
    if recording():
        # every row meets one group's columns, unless a 3-D left operand meets columns split into groups
        columns = mat_b.shape[-1] / (mat_a.shape[0] if mat_a.dim() == 3 and mat_b.dim() == 2 else 1)
        record("F.grouped_mm", "torch", 2.0 * slices * math.prod(mat_a.shape) * columns)
    out = out if bias is None else out + bias
    return out if out_dtype is None else out.to(out_dtype)


rule(torch_private.GROUPED_MM, F.grouped_mm, kind="op")(grouped_mm)


# -- recurrent cells --------------------------------------------------------------------------------------------------


def _gates(x: Any, h: Any, w_ih: Any, w_hh: Any, b_ih: Any, b_hh: Any) -> tuple[Any, Any]:
    return F.linear(x, w_ih, b_ih), F.linear(h, w_hh, b_hh)


@rule(torch.lstm_cell, kind="op")
def _lstm_cell(x: Any, hx: Any, w_ih: Any, w_hh: Any, b_ih: Any = None, b_hh: Any = None) -> tuple[Any, Any]:
    h, c = hx
    return _lstm_gates(*_gates(x, h, w_ih, w_hh, b_ih, b_hh), c)


@once_rounded
def _lstm_gates(left: Any, right: Any, c: Any) -> tuple[Any, Any]:
    i, f, g, o = (left + right).chunk(4, 1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


@rule(torch.gru_cell, kind="op")
def _gru_cell(x: Any, h: Any, w_ih: Any, w_hh: Any, b_ih: Any = None, b_hh: Any = None) -> Any:
    return _gru_gates(*_gates(x, h, w_ih, w_hh, b_ih, b_hh), h)


@once_rounded
def _gru_gates(left: Any, right: Any, h: Any) -> Any:
    (lr, lz, ln), (rr, rz, rn) = left.chunk(3, 1), right.chunk(3, 1)
    z = torch.sigmoid(lz + rz)
    n = torch.tanh(ln + torch.sigmoid(lr + rr) * rn)
    return n + z * (h - n)


def _rnn_cell(act: Callable[[Any], Any]) -> Callable[..., Any]:
    add = once_rounded(lambda left, right: act(left + right))
    return lambda x, h, w_ih, w_hh, b_ih=None, b_hh=None: add(*_gates(x, h, w_ih, w_hh, b_ih, b_hh))


rule(torch.rnn_tanh_cell, kind="op")(_rnn_cell(torch.tanh))
rule(torch.rnn_relu_cell, kind="op")(_rnn_cell(torch.relu))


# -- refused, with the alternative ------------------------------------------------------------------------------------

_FAST_PATH = "the inference fast path has no derivative: call torch.backends.mha.set_fastpath_enabled(False)"
_REFUSED = {
    "lstm": "nn.LSTM is one opaque kernel: unroll it with nn.LSTMCell",
    "gru": "nn.GRU is one opaque kernel: unroll it with nn.GRUCell",
    "rnn_tanh": "nn.RNN is one opaque kernel: unroll it with nn.RNNCell",
    "rnn_relu": "nn.RNN is one opaque kernel: unroll it with nn.RNNCell",
    "_transformer_encoder_layer_fwd": _FAST_PATH,
    "_native_multi_head_attention": _FAST_PATH,
}


def _refusal(name: str, remedy: str) -> Callable[..., Any]:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise UnsupportedOperation(f"torch.{name} has no derivative rule for a Dual: {remedy}.")

    return refuse


# nn.TransformerEncoder asks whether its padding suits the nested fast path, which a Dual must not take
rule(torch_private.NESTED_MASK_FITS, kind="view")(lambda x, mask: False)

for _name, _remedy in _REFUSED.items():
    rule(getattr(torch, _name), kind="view")(_refusal(_name, _remedy))
