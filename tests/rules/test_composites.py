"""Attention, torch's Python composites, grouped products and recurrent layers, beyond the sweep's table."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rules.check import check
from torch import Tensor, nn

import aajr_kernels as aajr
from aajr_kernels import UnsupportedOperation, dual
from aajr_kernels.rules.composites import ungated
from aajr_kernels.rules.registry import RULES

sdpa = F.scaled_dot_product_attention


def made(*shape: int, k: int = 2, dtype: torch.dtype = torch.float64) -> aajr.Dual:
    return dual(torch.randn(*shape, dtype=dtype), torch.randn(k, *shape, dtype=dtype))


# -- attention ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bool", "inf"])
def test_an_empty_row_gives_zeros_and_finite_gradients(kind: str) -> None:
    allowed = torch.ones(3, 5, dtype=torch.bool)
    allowed[1] = False
    mask = allowed if kind == "bool" else torch.zeros(3, 5).double().masked_fill(~allowed, -torch.inf)
    leaves = [torch.randn(2, 2, n, 4).double().requires_grad_() for n in (3, 5, 5)]
    directions = [torch.randn(2, *leaf.shape).double().requires_grad_() for leaf in leaves]
    y = sdpa(*(dual(x, v) for x, v in zip(leaves, directions)), attn_mask=mask)
    assert (y.stacked[..., 1, :] == 0).all()
    (y.primal.square().sum() + y.tangents.square().sum()).backward()
    for leaf in (*leaves, *directions):
        assert leaf.grad.isfinite().all()
    assert (leaves[0].grad[..., 1, :] == 0).all()
    rows = allowed.any(-1)

    def others(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return sdpa(q, k, v, attn_mask=mask if isinstance(q, aajr.Dual) else mask[rows])

    reference = others(*(dual(x.detach(), v.detach()) for x, v in zip(leaves, directions)))
    torch.testing.assert_close(reference.stacked[..., rows, :], y.stacked[..., rows, :])


def test_dropout_in_attention_takes_one_mask() -> None:
    q, k, v = (torch.randn(1, 2, 4, 6).double() for _ in range(3))

    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        torch.manual_seed(7)
        return sdpa(q, k, v, dropout_p=0.3)

    check(fn, (q, k, v), 2, duals=(0, 1, 2))


@pytest.mark.parametrize(
    "shapes", [((4, 6), (5, 6)), ((2, 4, 6), (2, 5, 6)), ((2, 3, 2, 4, 6), (2, 3, 2, 5, 6))]
)
def test_any_number_of_leading_axes_has_torchs_shape(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    q, k = (made(*shape) for shape in shapes)
    y = sdpa(q, k, k)
    expected = sdpa(q.primal, k.primal, k.primal)
    assert y.shape == expected.shape
    torch.testing.assert_close(y.primal, expected)


def test_attention_errors() -> None:
    q = made(1, 2, 3, 4)
    with pytest.raises(RuntimeError, match="is_causal"):
        sdpa(q, q, q, attn_mask=torch.ones(3, 3, dtype=torch.bool), is_causal=True)
    with pytest.raises(ValueError, match="query must have at least two axes"):
        sdpa(made(4), q, q)
    with pytest.raises(ValueError, match="heads"):
        sdpa(q, made(1, 3, 3, 4), made(1, 3, 3, 4), enable_gqa=True)
    with pytest.raises(ValueError, match="tangents"):
        sdpa(q, made(1, 2, 3, 4, k=3), q)


def _heads(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    """``[N, B, 6]`` as ``[B, 2, N, 3]``."""
    return (x @ w.mT + b).unflatten(-1, (2, 3)).permute(1, 2, 0, 3)


def _formula(x: Tensor, memory: Tensor, w: Tensor, b: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Multi-head attention and its weights, zeros where a row of the mask is -inf."""
    q = _heads(x, w[:6], b[:6])
    k, v = (_heads(memory, w[i : i + 6], b[i : i + 6]) for i in (6, 12))
    allowed = mask.exp() > 0
    scores = (q @ k.mT) * 3**-0.5 + mask.masked_fill(~allowed, 0.0)
    weights = torch.where(allowed, (scores - scores.amax()).exp(), 0.0)
    weights = weights / weights.sum(-1, keepdim=True).clamp(min=1e-300)
    return (weights @ v).permute(2, 0, 1, 3).flatten(-2), weights


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("form", ["bool", "three axes", "padding", "inf", "dual", "only dual"])
def test_rows_of_multi_head_attention_without_keys_give_zeros(form: str, need_weights: bool) -> None:
    """Value, tangents and all gradients against a formula that leaves those rows out."""
    torch.manual_seed(2)
    x, memory = torch.randn(4, 2, 6).double(), torch.randn(5, 2, 6).double()
    w, b = torch.randn(18, 6).double() / 3, torch.randn(18).double()
    allowed = (torch.rand(2, 1, 4, 5) > 0.3).expand(2, 2, -1, -1).clone()
    allowed[..., 2, :] = False
    options: dict[str, Any] = {"attn_mask": ~allowed[0, 0]}
    if form == "three axes":
        options = {"attn_mask": ~allowed.flatten(0, 1)}
    elif form == "padding":
        allowed = torch.tensor([[0, 0, 0, 0, 0], [1, 1, 0, 1, 0]]).bool()[:, None, None].expand(2, 2, 4, 5)
        options = {"key_padding_mask": ~allowed[:, 0, 0]}
    else:
        allowed = allowed[:1, :1].expand(2, 2, -1, -1)
    bias = torch.zeros(4, 5).double().masked_fill(~allowed[0, 0], -torch.inf)
    full = torch.zeros(2, 2, 4, 5).double().masked_fill(~allowed, -torch.inf)
    if form == "inf":
        options = {"attn_mask": bias}
    leaves = [x, memory, w, b]
    tangents = [torch.randn(2, *leaf.shape).double() for leaf in leaves]
    mask, mask_tan = bias.clone(), torch.randn(2, 4, 5).double()
    if form in ("dual", "only dual"):
        leaves, tangents = [*leaves, mask], [*tangents, mask_tan]
    moves = range(len(leaves)) if form != "only dual" else (4,)
    variables = [z.requires_grad_() for z in (*leaves, *(tangents[i] for i in moves))]
    values = [dual(z, tangents[i]) if i in moves else z for i, z in enumerate(leaves)]
    if len(leaves) == 5:
        options = {"attn_mask": values[4]}
    eye = torch.eye(6, dtype=torch.float64)
    y, weights = F.multi_head_attention_forward(
        *values[:2], values[1], 6, 2, *values[2:4], None, None, False, 0.0, eye, None,
        need_weights=need_weights, average_attn_weights=False, **options,
    )  # fmt: skip
    pairs = [y, weights] if need_weights else [y]

    def oracle(*moved: Tensor) -> tuple[Tensor, ...]:
        arguments = [*leaves]
        for i, z in zip(moves, moved):
            arguments[i] = z
        return _formula(*arguments[:4], arguments[4] if len(arguments) == 5 else full)[: len(pairs)]

    runs = [
        torch.func.jvp(oracle, tuple(leaves[i] for i in moves), tuple(tangents[i][k] for i in moves))
        for k in range(2)
    ]
    total, expected_total = torch.zeros(()), torch.zeros(())
    for i, got in enumerate(pairs):
        expected = torch.stack([runs[0][0][i], *(run[1][i] for run in runs)])
        torch.testing.assert_close(got.stacked, expected, rtol=1e-12, atol=1e-12)
        assert (got.stacked == 0).any() and got.tangents.any()
        cotangent = torch.linspace(-1, 1, expected.numel(), dtype=torch.float64).view(expected.shape)
        total = total + (got.stacked * (cotangent + got.stacked.detach())).sum()
        expected_total = expected_total + (expected * (cotangent + expected.detach())).sum()
    for got, want in zip(
        *(torch.autograd.grad(z, variables, allow_unused=True) for z in (total, expected_total))
    ):
        assert (got is None) == (want is None)
        if got is not None:
            torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-11)


def test_multi_head_attention_without_keys_gives_the_bias() -> None:
    """Also where there are no keys at all."""
    layer = nn.MultiheadAttention(6, 2, batch_first=True).double()
    for need_weights in (True, False):
        x, memory = made(2, 4, 6), made(2, 0, 6)
        y, weights = layer(x, memory, memory, need_weights=need_weights)
        assert torch.equal(y.primal, layer.out_proj.bias.expand(2, 4, 6)) and not y.tangents.any()
        assert weights is None or weights.shape == (2, 4, 0)


def test_a_causal_hint_does_not_replace_a_mask_that_moves() -> None:
    """torch would drop the mask and its tangents; nn.TransformerEncoder finds the hint by itself."""
    x, layer = torch.randn(2, 5, 6).double(), nn.MultiheadAttention(6, 2, batch_first=True).double()
    causal = torch.zeros(5, 5).double().masked_fill(torch.ones(5, 5).triu(1).bool(), -torch.inf)

    def attend(mask: Tensor) -> Tensor:
        return layer(x, x, x, attn_mask=mask + causal, need_weights=False, is_causal=aajr.is_dual(mask))[0]

    check(attend, (torch.zeros(5, 5).double(),), 2, upstream=False)


def test_functions_that_take_dual_masks_can_still_be_scripted() -> None:
    made(1)  # replaces them
    layer = nn.MultiheadAttention(6, 2, batch_first=True)
    x = torch.randn(2, 5, 6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        scripted = torch.jit.script(layer)
    torch.testing.assert_close(scripted(x, x, x)[0], layer(x, x, x)[0])


# -- modules made of composites -------------------------------------------------------------------------------------

PAD = torch.tensor([[0, 0, 0, 1], [0, 0, 0, 0]], dtype=torch.bool)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_transformer_encoder_is_exact(norm_first: bool, training: bool) -> None:
    layer = nn.TransformerEncoderLayer(6, 2, 8, 0.0, F.gelu, norm_first=norm_first, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2, nn.LayerNorm(6)).double().train(training)
    mask = nn.Transformer.generate_square_subsequent_mask(4, dtype=torch.float64)
    check(lambda x: encoder(x, mask, is_causal=True), (torch.randn(2, 4, 6).double(),), 2, upstream=False)
    x = torch.randn(2, 4, 6).double()
    # the inference fast path of a plain call zeroes padding: no parameter asks for a gradient in eval and no_grad
    with torch.enable_grad():
        y = encoder(dual(x, x), src_key_padding_mask=PAD)
        expected = encoder(x.clone().requires_grad_(), src_key_padding_mask=PAD)
    torch.testing.assert_close(y.primal[~PAD], expected[~PAD])


@pytest.mark.filterwarnings("ignore")
def test_transformer_decoder_with_a_dual_memory_is_exact() -> None:
    decoder = nn.TransformerDecoderLayer(6, 2, 8, 0.0, F.gelu, batch_first=True).double()
    target, memory = torch.randn(2, 3, 6).double(), torch.randn(2, 4, 6).double()
    for duals in ((0,), (1,), (0, 1)):
        check(
            lambda t, m: decoder(t, m, memory_key_padding_mask=PAD),
            (target, memory),
            1,
            duals=duals,
            upstream=False,
        )


def test_multi_head_attention_module_returns_weights() -> None:
    layer = nn.MultiheadAttention(6, 2, kdim=3, vdim=5, batch_first=True).double()
    args = (torch.randn(2, 4, 6).double(), torch.randn(2, 3, 3).double(), torch.randn(2, 3, 5).double())
    check(lambda q, k, v: layer(q, k, v), args, 2, duals=(0, 1, 2))


def test_the_inference_fast_paths_refuse_a_dual() -> None:
    x = made(2, 4, 6)
    for name in ("_transformer_encoder_layer_fwd", "_native_multi_head_attention"):
        with pytest.raises(UnsupportedOperation, match="fastpath"):
            RULES[getattr(torch, name)](x)


def test_composites_take_plain_tensors_and_keep_their_defaults() -> None:
    x = torch.randn(3, 4)
    torch.testing.assert_close(ungated(F.normalize)(x), F.normalize(x))


# -- grouped products -----------------------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(F, "grouped_mm"), reason="this torch has no F.grouped_mm")
@pytest.mark.parametrize("duals", ["a", "b", "ab"])
@pytest.mark.parametrize("form", ["2x3", "3x3", "2x2"])
def test_grouped_mm_agrees_with_torch(duals: str, form: str) -> None:
    ends = torch.tensor([4, 4, 12], dtype=torch.int32)
    a = (
        torch.randn(3, 4, 8)
        if form == "3x3"
        else (torch.randn(8, 12) if form == "2x2" else torch.randn(12, 8))
    )
    b = torch.randn(12, 16) if form == "2x2" else torch.randn(3, 8, 16)
    offs = None if form == "3x3" else ends
    da, db = torch.randn(2, *a.shape), torch.randn(2, *b.shape)
    y = F.grouped_mm(dual(a, da) if "a" in duals else a, dual(b, db) if "b" in duals else b, offs=offs)
    groups = [slice(0, 4), slice(4, 4), slice(4, 12)]

    def product(a: Tensor, b: Tensor) -> Tensor:
        if form == "3x3":
            return a @ b
        if form == "2x2":
            return torch.stack([a[:, g] @ b[g] for g in groups])
        return torch.cat([a[g] @ b[i] for i, g in enumerate(groups)])

    torch.testing.assert_close(y.primal, product(a, b))
    tangents = sum(
        [torch.stack([product(t, b) for t in da])] * ("a" in duals)
        + [torch.stack([product(a, t) for t in db])] * ("b" in duals)
    )
    torch.testing.assert_close(y.tangents, tangents)


@pytest.mark.skipif(not hasattr(F, "grouped_mm"), reason="this torch has no F.grouped_mm")
def test_grouped_mm_gives_zeros_beyond_the_last_group() -> None:
    ends, weights = torch.tensor([1, 4], dtype=torch.int32), made(2, 4, 3)
    for rows, weight in ((made(6, 4), weights.primal), (made(6, 4).primal, weights), (made(6, 4), weights)):
        y = F.grouped_mm(rows, weight, offs=ends)
        assert (y.stacked[:, 4:] == 0).all() and (y.stacked[:, :4] != 0).all()


# -- recurrent layers -----------------------------------------------------------------------------------------------


def test_recurrent_cells_are_exact_and_their_layers_raise() -> None:
    x = torch.randn(2, 3).double()
    for cell in (nn.LSTMCell(3, 2), nn.GRUCell(3, 2), nn.RNNCell(3, 2)):
        check(cell.double(), (x,), 2, upstream=False)
    for layer in (nn.LSTM(3, 2), nn.GRU(3, 2), nn.RNN(3, 2), nn.RNN(3, 2, nonlinearity="relu")):
        with pytest.raises(UnsupportedOperation, match="Cell"):
            layer.double()(made(4, 2, 3))


def test_attention_with_unequal_heads_asks_for_enable_gqa():
    q, k = (dual(torch.randn(1, h, 3, 4), torch.randn(1, h, 3, 4)) for h in (4, 2))
    with pytest.raises(ValueError, match="pass enable_gqa=True"):
        F.scaled_dot_product_attention(q, k, k)
    assert F.scaled_dot_product_attention(q, k, k, enable_gqa=True).shape == q.shape
