"""The sweep's table, continued: attention in every form and the composites made of it."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from rules.cases import BOTH, case, real
from torch.nn.attention.bias import causal_lower_right, causal_upper_left

ALL = (0, 1, 2)
sdpa = F.scaled_dot_product_attention
Q, K, V = real(2, 4, 3, 6), real(2, 4, 5, 6), real(2, 4, 5, 2)
K2, V2 = real(2, 2, 5, 6), real(2, 2, 5, 2)
BOOL = torch.ones(3, 5, dtype=torch.bool)
BOOL[0, 1], BOOL[2, :3] = False, False
PAD = torch.tensor([[1, 1, 1, 0, 0], [0, 1, 1, 1, 1]], dtype=torch.bool)[:, None, None]

case("F.scaled_dot_product_attention", sdpa, Q, K, V, duals=ALL)
for _duals in ((0,), (1,), (2,), (0, 1), (1, 2)):
    case(f"sdpa(duals {_duals})", lambda q, k, v: sdpa(q, k, v, scale=0.7), Q, K, V, duals=_duals)
case("sdpa(causal)", lambda q, k, v: sdpa(q, k, v, is_causal=True), Q, K, V, duals=ALL)
case("sdpa(bool)", lambda q, k, v: sdpa(q, k, v, BOOL), Q, K, V, duals=ALL, up=False)
case("sdpa(padding)", lambda q, k, v: sdpa(q, k, v, PAD), Q, K, V, duals=ALL, up=False)
case("sdpa(additive)", sdpa, Q, K, V, real(3, 5), duals=ALL)
case("sdpa(learned bias)", sdpa, Q, K, V, real(4, 1, 5), duals=(0, 1, 2, 3))
case("sdpa(learned bias alone)", sdpa, Q, K, V, real(1, 4, 3, 5), duals=(3,))
case("sdpa(gqa)", lambda q, k, v: sdpa(q, k, v, enable_gqa=True), Q, K2, V2, duals=ALL)
case("sdpa(gqa, 3-D)", lambda q, k, v: sdpa(q, k, v, enable_gqa=True), Q[0], K2[0], V2[0], duals=ALL)
case("sdpa(2-D)", sdpa, Q[0, 0], K[0, 0], V[0, 0], duals=ALL)
case("sdpa(3-D, mask)", lambda q, k, v: sdpa(q, k, v, BOOL), Q[0], K[0], V[0], duals=ALL, up=False)
case("sdpa(5-D)", sdpa, *(x.reshape(2, 2, 2, *x.shape[-2:]) for x in (Q, K, V)), duals=ALL)
case(
    "sdpa(5-D, mask)",
    sdpa,
    *(x.reshape(2, 2, 2, *x.shape[-2:]) for x in (Q, K, V)),
    real(2, 1, 3, 5),
    duals=BOTH,
)
case("sdpa(broadcast)", sdpa, Q, K[:1, :1], V[:1, :1], duals=ALL)
case("sdpa(broadcast query)", sdpa, Q[:, :1], K, V, duals=ALL)
case(
    "sdpa(lower right)", lambda q, k, v: sdpa(q, k, v, causal_lower_right(3, 5)), Q, K, V, duals=ALL, up=False
)
case("sdpa(upper left)", lambda q, k, v: sdpa(q, k, v, causal_upper_left(3, 5)), Q, K, V, duals=ALL, up=False)

# -- multi-head attention -------------------------------------------------------------------------------------------
IN, OUT = (real(18, 6) / 3, real(18) / 3), (real(6, 6) / 3, real(6) / 3)
TGT, SRC = real(4, 2, 6), real(5, 2, 6)
KEYS = torch.tensor([[0, 0, 0, 1, 1], [1, 0, 0, 0, 0]], dtype=torch.bool)


def mha(query, key, value, in_w, in_b, out_w, out_b, **kwargs):
    """(output, weights) of ``F.multi_head_attention_forward`` with two heads and no dropout."""
    kwargs = {"need_weights": False, **kwargs}
    bias_k = kwargs.pop("bias_k", None)
    return F.multi_head_attention_forward(
        query,
        key,
        value,
        6,
        2,
        in_w,
        in_b,
        bias_k,
        bias_k,
        kwargs.pop("zero", False),
        0.0,
        out_w,
        out_b,
        **kwargs,
    )


def self_attention(x, *weights, **kwargs):
    return mha(x, x, x, *weights, **kwargs)


CAUSAL = torch.full((4, 4), float("-inf"), dtype=torch.float64).triu(1)
case("F.multi_head_attention_forward", self_attention, TGT, *IN, *OUT)
case(
    "mha(weights)",
    lambda x, *w: self_attention(x, *w, need_weights=True, average_attn_weights=False),
    TGT,
    *IN,
    *OUT,
)
case("mha(causal)", lambda x, *w: self_attention(x, *w, attn_mask=CAUSAL), TGT, *IN, *OUT, up=False)
case("mha(cross, plain query)", lambda q, s, *w: mha(q, s, s, *w), TGT, SRC, *IN, *OUT, duals=(1,))
case("mha(cross, plain memory)", lambda q, s, *w: mha(q, s, s, *w), TGT, SRC, *IN, *OUT)
case(
    "mha(padding)",
    lambda q, s, *w: mha(q, s, s, *w, key_padding_mask=KEYS),
    TGT,
    SRC,
    *IN,
    *OUT,
    duals=BOTH,
    up=False,
)
BIASES = {"": real(4, 5), " of heads": real(4, 4, 5)}
FLOATS = real(2, 5)
for _name, _bias in BIASES.items():
    for _weights in (False, True):
        _options = {"need_weights": _weights, "average_attn_weights": False}
        case(
            f"mha(moving mask{_name}, weights {_weights})",
            lambda q, m, s, *w, o=_options: mha(q, s, s, *w, attn_mask=m, **o),
            TGT,
            _bias,
            SRC,
            *IN,
            *OUT,
            duals=BOTH,
        )
        case(
            f"mha(only the masks move{_name}, weights {_weights})",
            lambda m, p, q, s, *w, o=_options: mha(q, s, s, *w, attn_mask=m, key_padding_mask=p, **o),
            _bias,
            FLOATS,
            TGT,
            SRC,
            *IN,
            *OUT,
            duals=BOTH,
        )
case(
    "mha(moving mask, padding, bias_k, zero)",
    lambda m, q, s, k, *w: mha(
        q, s, s, *w, attn_mask=m, key_padding_mask=KEYS.double() * -2, bias_k=k, zero=True
    ),
    BIASES[""],
    TGT,
    SRC,
    TGT[:1, :1],
    *IN,
    *OUT,
    duals=(0, 3),
)
case("mha(moving weights)", lambda q, s, *w: mha(q, s, s, *w), TGT, SRC, *IN, *OUT, duals=(2, 3, 4, 5))
case(
    "mha(moving projections)",
    lambda a, b, c, q, s, w: mha(
        q, s, s, None, None, w, None, use_separate_proj_weight=True, q_proj_weight=a, k_proj_weight=b,
        v_proj_weight=c,
    ),
    *(real(6, 6) / 3 for _ in range(3)),
    TGT,
    SRC,
    OUT[0],
    duals=ALL,
)  # fmt: skip
case(
    "mha(moving static keys)",
    lambda k, v, q, s, *w: mha(q, s, s, *w, static_k=k, static_v=v),
    real(4, 5, 3),
    real(4, 5, 3),
    TGT,
    SRC,
    *IN,
    *OUT,
    duals=BOTH,
)
case("sdpa(only the mask moves)", lambda m, q, k, v: sdpa(q, k, v, m), real(4, 3, 5), Q, K, V)
case("sdpa(causal, more queries)", lambda q, k: sdpa(q, k, k, is_causal=True, scale=0.4), K, Q, duals=BOTH)
case("mha(unbatched)", lambda x, *w: self_attention(x, *w), TGT[:, 0], *IN, *OUT)
case(
    "mha(bias_k, zero)",
    lambda x, *w: self_attention(x, *w, bias_k=TGT[:1, :1].clone(), zero=True),
    TGT,
    *IN,
    *OUT,
)

# -- products over groups -------------------------------------------------------------------------------------------
ENDS = torch.tensor([2, 2, 5], dtype=torch.int32)
ROWS, EXPERTS = real(5, 4), real(3, 4, 6)


def reference(a, b, offs):
    """The grouped product in float64, which torch's kernel refuses."""
    bounds = [0, *offs.tolist()]
    return torch.cat([a[i:j] @ b[g] for g, (i, j) in enumerate(pairwise(bounds))])


def grouped(a, b, offs):
    plain = isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor)
    return reference(a, b, offs) if plain else F.grouped_mm(a, b, offs=offs)


if hasattr(F, "grouped_mm"):
    for _duals in ((0,), (1,), (0, 1)):
        case(f"F.grouped_mm(duals {_duals})", lambda a, b: grouped(a, b, ENDS), ROWS, EXPERTS, duals=_duals)
