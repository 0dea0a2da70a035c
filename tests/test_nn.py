"""The layers of aajr_kernels.nn: torch's values and state dicts for tensors, exact tangents and gradients for Duals."""

from __future__ import annotations

import copy

import oracle_losses
import pytest
import torch
from assertions import assert_exact, assert_exact_gradients
from torch import nn
from torch.nn import functional as F

import aajr_kernels as aajr
import aajr_kernels.nn as layers
from aajr_kernels.testing import oracle

ROWS = (3, 5, 8)

#: name -> (our layer, torch's layer or function, the same from elementary operations)
CASES = {
    "LayerNorm": (
        lambda: layers.LayerNorm(8),
        lambda: nn.LayerNorm(8),
        lambda m, x: oracle.layer_norm(x, (8,), m.weight, m.bias, m.eps),
    ),
    "LayerNorm-2d": (
        lambda: layers.LayerNorm((5, 8), eps=0.1, bias=False),
        lambda: nn.LayerNorm((5, 8), eps=0.1, bias=False),
        lambda m, x: oracle.layer_norm(x, (5, 8), m.weight, None, 0.1),
    ),
    "RMSNorm": (
        lambda: layers.RMSNorm(8, eps=1e-3),
        lambda: nn.RMSNorm(8, eps=1e-3),
        lambda m, x: oracle.rms_norm(x, (8,), m.weight, 1e-3),
    ),
    "RMSNorm-plain": (
        lambda: layers.RMSNorm((5, 8), elementwise_affine=False),
        lambda: nn.RMSNorm((5, 8), elementwise_affine=False),
        lambda m, x: oracle.rms_norm(x, (5, 8)),
    ),
    "Linear": (
        lambda: layers.Linear(8, 6),
        lambda: nn.Linear(8, 6),
        lambda m, x: x @ m.weight.T + m.bias,
    ),
    "Linear-nobias": (
        lambda: layers.Linear(8, 6, bias=False),
        lambda: nn.Linear(8, 6, bias=False),
        lambda m, x: x @ m.weight.T,
    ),
    "GELU": (layers.GELU, nn.GELU, lambda m, x: F.gelu(x)),
    "GELU-tanh": (
        lambda: layers.GELU("tanh"),
        lambda: nn.GELU("tanh"),
        lambda m, x: F.gelu(x, approximate="tanh"),
    ),
    "SiLU": (layers.SiLU, nn.SiLU, lambda m, x: x * torch.sigmoid(x)),
    "ReLU": (layers.ReLU, nn.ReLU, lambda m, x: torch.relu(x)),
    "Tanh": (layers.Tanh, nn.Tanh, lambda m, x: torch.tanh(x)),
    "Sigmoid": (layers.Sigmoid, nn.Sigmoid, lambda m, x: torch.sigmoid(x)),
    "ReLU2": (layers.ReLU2, None, lambda m, x: torch.relu(x) ** 2),
    "QuickGELU": (layers.QuickGELU, None, lambda m, x: x * torch.sigmoid(1.702 * x)),
    "SwiGLU": (layers.SwiGLU, None, lambda m, x: F.silu(x[..., :4]) * x[..., 4:]),
    "GeGLU": (layers.GeGLU, None, lambda m, x: F.gelu(x[..., :4]) * x[..., 4:]),
    "GeGLU-tanh": (
        lambda: layers.GeGLU("tanh"),
        None,
        lambda m, x: F.gelu(x[..., :4], approximate="tanh") * x[..., 4:],
    ),
    "RMSNorm-offset": (
        lambda: layers.RMSNorm(8, offset=1.0),
        None,
        lambda m, x: oracle.rms_norm(x, (8,), 1 + m.weight),
    ),
}
every_layer = pytest.mark.parametrize("name", CASES)
with_torch = pytest.mark.parametrize("name", [name for name, case in CASES.items() if case[1] is not None])


def random_layer(make) -> nn.Module:
    layer = make().double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return layer


@pytest.mark.parametrize("k", [1, 3])
@every_layer
def test_value_tangents_and_gradients(name, k):
    ours, _, elementary = CASES[name]
    layer = random_layer(ours)
    x = torch.randn(*ROWS, dtype=torch.float64)
    v = torch.randn(k, *ROWS, dtype=torch.float64)
    parameters = dict(layer.named_parameters())
    probe = torch.randn_like(layer(x)).detach()
    exact = oracle_losses.loss_and_gradients(
        lambda x: elementary(layer, x), x, v, parameters, metric="l2", probe=probe
    )
    x, v = x.requires_grad_(), v.requires_grad_()
    y = layer(aajr.dual(x, v))
    loss = y.tangents.square().sum(-1).mean() + (probe * y.primal).sum()
    assert_exact(y.primal, exact.primal)
    assert_exact(y.tangents, exact.tangents)
    assert_exact_gradients(oracle_losses.gradients_of(loss, {**parameters, "x": x, "v": v}), exact.gradients)


@every_layer
def test_the_fused_operation_runs(name):
    layer = random_layer(CASES[name][0])
    with aajr.coverage() as coverage:
        layer(aajr.dual(torch.randn(*ROWS, dtype=torch.float64), torch.randn(*ROWS, dtype=torch.float64)))
    assert coverage.share("reference") == pytest.approx(1.0)


@with_torch
def test_drop_in_for_torchs_layer(name):
    ours, theirs, _ = CASES[name]
    layer, other = random_layer(ours), theirs().double()
    assert isinstance(layer, type(other))
    other.load_state_dict(layer.state_dict())
    assert list(layer.state_dict()) == list(other.state_dict())
    x = torch.randn(*ROWS, dtype=torch.float64)
    assert torch.equal(layer(x), other(x)) and type(layer(x)) is torch.Tensor
    assert repr(layer) == repr(other)
    twin = copy.deepcopy(layer)
    assert torch.equal(twin(x), layer(x))


@every_layer
def test_plain_tensors_stay_plain_in_every_dtype(name):
    layer = random_layer(CASES[name][0])
    x = torch.randn(*ROWS, dtype=torch.float64)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        y = layer.to(dtype)(x.to(dtype))
        assert type(y) is torch.Tensor and y.dtype == dtype
        assert layer(aajr.dual(x.to(dtype), x.to(dtype))).dtype == dtype


def test_offset():
    layer = layers.RMSNorm(4, eps=1e-5, offset=1.0)
    assert not layer.weight.any()
    assert layers.RMSNorm(4).weight.eq(1).all()
    assert "offset=1.0" in repr(layer) and "offset" not in repr(layers.RMSNorm(4))
    x = torch.randn(2, 4)
    torch.testing.assert_close(layer(x), F.rms_norm(x, (4,), None, 1e-5))
    with pytest.raises(ValueError, match=r"offset is 1\.0 but elementwise_affine is False"):
        layers.RMSNorm(4, elementwise_affine=False, offset=1.0)


@pytest.mark.parametrize("layer", [layers.SwiGLU(), layers.GeGLU(), layers.GeGLU("tanh")])
def test_gated_products_take_two_arguments_or_one(layer):
    gate, up = torch.randn(3, 4), torch.randn(3, 4)
    packed = torch.cat([gate, up], -1)
    assert_exact(layer(packed), layer(gate, up), tolerance=1e-6)
    d = aajr.dual(packed, torch.randn(2, 3, 8))
    halves = d.chunk(2, -1)
    assert torch.equal(layer(d).stacked, layer(*halves).stacked)
    assert_exact(layer(halves[0], up).primal, layer(gate, up), tolerance=1e-6)
    with pytest.raises(ValueError, match=r"even last axis when up is None .* got \(3, 5\)"):
        layer(torch.randn(3, 5))


def test_errors_and_repr():
    with pytest.raises(ValueError, match="approximate must be 'none' or 'tanh', got 'erf'"):
        layers.GeGLU("erf")
    assert repr(layers.GeGLU("tanh")) == "GeGLU(approximate='tanh')"


def test_inplace_is_accepted_and_not_used():
    x = torch.randn(5)
    before = x.clone()
    layers.ReLU(inplace=True)(x)
    layers.SiLU(inplace=True)(x)
    assert torch.equal(x, before)
