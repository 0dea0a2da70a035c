"""One random state, one draw: a Dual gives the primal of a plain call, and leaves the generator as that does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import aajr_kernels as aajr
from aajr_kernels.method.attack_state import one_dropout_mask
from aajr_kernels.ops import attention

SEED = 5
IMAGE, SEQUENCE, ROWS = (3, 4, 6, 6), (2, 5, 6), (3, 5)
#: a call, and the shape of its input, which is normally distributed
PLACES: dict[str, tuple[Callable[[Any], Any], tuple[int, ...]]] = {}


def place(name: str, call: Callable[[Any], Any], shape: tuple[int, ...] = SEQUENCE) -> None:
    PLACES[name] = call, shape


for _p in (0.0, 0.4, 1.0):
    for _name in ("dropout", "alpha_dropout", "feature_alpha_dropout", "dropout2d"):
        _function = getattr(F, _name)
        place(f"{_name} {_p}", lambda x, f=_function, p=_p: f(x, p, True), IMAGE)
        place(f"{_name} {_p} in place", lambda x, f=_function, p=_p: f(x * 1, p, True, True), IMAGE)
for _name in ("dropout", "alpha_dropout", "feature_dropout"):
    place(f"torch.{_name}_", lambda x, n=_name + "_": getattr(torch, n)(x * 1, 0.4, True), IMAGE)
place("dropout evaluated", lambda x: F.dropout(x, 0.4, False))
place("dropout1d", lambda x: F.dropout1d(x, 0.4))
place("dropout3d", lambda x: F.dropout3d(x, 0.4), IMAGE)
place("native_dropout", lambda x: torch.native_dropout(x, 0.4, True)[0])
place("dropout of a transpose", lambda x: F.dropout(x.transpose(0, 2), 0.4), IMAGE)
place("dropout of an expansion", lambda x: F.dropout(x[:1].expand(3, -1, -1), 0.4))
place("dropout of nothing", lambda x: F.dropout(x[:0], 0.4))
place("rrelu", nn.RReLU())
place("rrelu in place", lambda x: F.rrelu(x * 1, 0.1, 0.5, True, True))
place("torch.rrelu_", lambda x: torch.rrelu_(x * 1, 0.1, 0.5, True))
place("rrelu evaluated", lambda x: F.rrelu(x, 0.1, 0.5))
place("gumbel_softmax", lambda x: F.gumbel_softmax(x, tau=0.7))
place("gumbel_softmax hard", lambda x: F.gumbel_softmax(x, hard=True, dim=1))
for _name in ("rand_like", "randn_like"):
    place(_name, lambda x, n=_name: x * getattr(torch, n)(x))
    place(f"{_name} of a transpose", lambda x, n=_name: x.mT * getattr(torch, n)(x.mT))
place("randint_like", lambda x: x * torch.randint_like(x, 5))
for _name, _options in {
    "bernoulli_": (0.3,), "normal_": (), "uniform_": (), "exponential_": (), "geometric_": (0.3,),
    "log_normal_": (), "cauchy_": (), "random_": (7,),
}.items():  # fmt: skip
    place(_name, lambda x, n=_name, o=_options: x * getattr(torch.empty_like(x), n)(*o))
    place(f"{_name} of a column", lambda x, n=_name, o=_options: x * getattr(x.new_empty(2, 1, 1), n)(*o))
    place(f"{_name} of values", lambda x, n=_name, o=_options: x + getattr(x * 1, n)(*o))
place("bernoulli", lambda x: x * torch.bernoulli(x.sigmoid()))
place("multinomial", lambda x: x.gather(1, torch.multinomial(x.exp(), 2)), ROWS)

sdpa = F.scaled_dot_product_attention
LOWER = torch.ones(6, 6, dtype=torch.bool).tril()
place("sdpa", lambda x: sdpa(x, x, x, dropout_p=0.4), IMAGE)
place("sdpa causal", lambda x: sdpa(x, x[..., :4, :], x[..., :4, :], dropout_p=0.4, is_causal=True), IMAGE)
place("sdpa masked", lambda x: sdpa(x, x, x, LOWER, 0.4), IMAGE)
place("sdpa biased", lambda x: sdpa(x, x, x, x[..., :6, :6], 0.4), IMAGE)
place("sdpa grouped", lambda x: sdpa(x, x[:, :2], x[:, :2], dropout_p=0.4, enable_gqa=True), IMAGE)
place("sdpa of matrices", lambda x: sdpa(x[0], x[0], x[0], dropout_p=0.4))
place("sdpa of five axes", lambda x: sdpa(x[None], x[None, :, :1], x[None], dropout_p=0.4), IMAGE)
place("sdpa of nothing", lambda x: sdpa(x[:, :, :0], x, x, dropout_p=0.4), IMAGE)
place("sdpa of all", lambda x: sdpa(x, x, x, dropout_p=1.0))
place("attention", lambda x: aajr.attention(x, x, x, dropout=0.4, causal="lower_right", window=2), IMAGE)
STARTS = torch.tensor([0, 2, 2, 6])
place("attention packed", lambda x: aajr.attention(x[0], x[0], x[0], dropout=0.4, cu_seqlens=STARTS), IMAGE)


def _module(name: str, **options: Any) -> nn.Module:
    torch.manual_seed(1)
    made: nn.Module = getattr(nn, name)(6, 2, batch_first=True, **options)
    return made.double()


_mha = _module("MultiheadAttention", dropout=0.4)
place("nn.MultiheadAttention", lambda x: _mha(x, x, x)[0])
place("nn.MultiheadAttention without weights", lambda x: _mha(x, x, x, need_weights=False)[0])
place("nn.TransformerEncoderLayer", _module("TransformerEncoderLayer", dim_feedforward=8, dropout=0.3))
_transformer = _module(
    "Transformer", num_encoder_layers=1, num_decoder_layers=1, dim_feedforward=8, dropout=0.3
)
place("nn.Transformer", lambda x: _transformer(x, 2 * x))


def _agree(call: Callable[[Any], Any], x: Tensor, tangents: int, tolerance: float) -> None:
    direction = torch.randn(tangents, *x.shape).to(x.dtype)
    results, states = [], []
    for value in (x.clone(), aajr.dual(x.clone(), direction)):
        torch.manual_seed(SEED)
        results.append(call(value))
        states.append(torch.get_rng_state())
    plain, y = results
    assert aajr.is_dual(y) and y.shape == plain.shape
    torch.testing.assert_close(y.primal, plain, rtol=tolerance, atol=tolerance)
    assert torch.equal(*states)


@pytest.mark.parametrize("name", PLACES)
def test_one_random_state_is_one_draw(name: str) -> None:
    call, shape = PLACES[name]
    for tangents in (1, 3):
        _agree(call, torch.randn(shape).double(), tangents, 1e-12)


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_attention_draws_torchs_mask_on_every_backend_of_the_cpu(dtype: torch.dtype, backend: str) -> None:
    x, few = torch.randn(2, 4, 37, 10).to(dtype), 4 * torch.finfo(dtype).eps
    with aajr.use_backend(backend):
        for name in ("sdpa", "sdpa causal", "sdpa grouped", "attention packed"):
            starts = torch.tensor([0, 5, 5, 37])
            call = PLACES[name][0] if name != "attention packed" else (
                lambda x: aajr.attention(x[0], x[0], x[0], dropout=0.4, cu_seqlens=starts))  # fmt: skip
            _agree(call, x, 2, few * x.abs().max().item())


def test_a_checkpoint_draws_the_mask_again() -> None:
    """The gradients of a plain call agree too, with and without a recomputed forward."""
    x, gradients = torch.randn(SEQUENCE).double(), []
    for recomputed in (False, True):
        for dual in (False, True):
            leaf = x.clone().requires_grad_()

            def call(z: Tensor, dual: bool = dual) -> Tensor:
                y = _mha(*[aajr.dual(z, torch.ones_like(z)) if dual else z] * 3)[0]
                return y.primal if dual else y

            torch.manual_seed(SEED)
            y = checkpoint(call, leaf, use_reentrant=False) if recomputed else call(leaf)
            gradients += torch.autograd.grad(y.square().sum(), leaf)
    for gradient in gradients[1:]:
        torch.testing.assert_close(gradient, gradients[0])


def test_where_kernels_draw_for_themselves_plain_calls_go_to_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a device: within the context that every evaluation of an attack and of a training step enters."""
    x = torch.randn(IMAGE).double()
    call = PLACES["sdpa"][0]
    monkeypatch.setattr("aajr_kernels.method.attack_state.draws_apart", lambda device: True)
    monkeypatch.setattr(attention.api, "draws_apart", lambda device: True)
    monkeypatch.setattr(
        attention.function,
        "_draw",
        lambda *args: torch.rand(3, 4, 6, 6, generator=torch.manual_seed(11)) > 0.4,
    )
    torch.manual_seed(SEED)
    plain = call(x)
    with one_dropout_mask(x.device):
        _agree(call, x, 2, 1e-12)
        torch.manual_seed(SEED)
        assert (call(x) - plain).abs().max() > 0.1
        torch.testing.assert_close(sdpa(x, x, x), sdpa(x, x, x, None, 0.0))
