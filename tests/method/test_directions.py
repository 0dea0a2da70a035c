"""normalize and seed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import aajr_kernels as aajr
from aajr_kernels.method.probes import power_iteration

MASK = torch.tensor([[1, 1, 0], [1, 0, 0]])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_unit_norm_per_token_and_per_sequence(dtype):
    g = torch.randn(2, 3, 5).to(dtype)
    tolerance = 4 * torch.finfo(dtype).eps
    token = aajr.normalize(g).double().norm(dim=-1)
    sequence = aajr.normalize(g, "sequence").double().flatten(1).norm(dim=-1)
    assert (token - 1).abs().max() < tolerance and (sequence - 1).abs().max() < tolerance
    assert aajr.normalize(g).dtype == dtype


def test_each_of_k_sequences_has_unit_norm():
    g = torch.randn(4, 2, 3, 5)
    assert torch.allclose(aajr.normalize(g, "sequence").flatten(2).norm(dim=-1), torch.ones(4, 2))


def test_zero_stays_zero_and_tiny_gradients_keep_their_direction():
    g = torch.zeros(2, 3, 5)
    g[0, 0] = torch.tensor([3.0, 4.0, 0.0, 0.0, 0.0]) * 1e-38
    g[1, 1] = torch.tensor([0.0, 3.0, 4.0, 0.0, 0.0]) * 1e37
    u = aajr.normalize(g)
    assert torch.allclose(u[0, 0], torch.tensor([0.6, 0.8, 0, 0, 0]))
    assert torch.allclose(u[1, 1], torch.tensor([0, 0.6, 0.8, 0, 0]))
    assert u[0, 1:].abs().max() == 0 and u.isfinite().all()


@pytest.mark.parametrize("scope", ["token", "sequence"])
def test_masked_entries_are_zeroed_before_the_norm_even_nan(scope):
    g = torch.randn(2, 3, 5)
    g[0, 2] = float("nan")
    u = aajr.normalize(g, scope, MASK)
    assert u[0, 2].abs().max() == 0 and u[1, 1:].abs().max() == 0
    norm = u.norm(dim=-1)[MASK.bool()] if scope == "token" else u.flatten(1).norm(dim=-1)
    assert torch.allclose(norm, torch.ones_like(norm))


def test_normalize_is_differentiable_and_zero_safe_in_the_gradient():
    g = torch.randn(2, 3, 5, dtype=torch.float64)
    g[0, 1] = 0
    g.requires_grad_()
    (slope,) = torch.autograd.grad((aajr.normalize(g) * torch.randn_like(g)).sum(), g)
    assert slope.isfinite().all()
    inside = g.detach()[1].requires_grad_()
    assert torch.autograd.gradcheck(lambda t: aajr.normalize(t), inside)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.ones(2, 3, dtype=torch.long),), TypeError, "g must be a plain floating point tensor"),
        ((None,), TypeError, "g must be"),
        ((torch.tensor(1.0),), ValueError, "at least one axis"),
        ((torch.ones(2, 3), "batch"), ValueError, "scope must be one of"),
        ((torch.ones(2, 3, 5), "token", torch.ones(2, 3)), TypeError, "mask must be a bool or integer"),
        ((torch.ones(2, 3, 5), "token", torch.ones(2, 4).bool()), ValueError, "mask must have shape"),
    ],
)
def test_bad_input(arguments, error, message):
    with pytest.raises(error, match=message):
        aajr.normalize(*arguments)


def model() -> nn.Sequential:
    return nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 5))


def test_inject_makes_a_dual_of_the_embedding_and_leaves_no_trace():
    policy, ids = model(), torch.randint(7, (2, 3))
    v = torch.randn(2, 2, 3, 4)
    with aajr.inject(policy[0], v):
        y = policy(ids)
    direct = policy[1:](aajr.dual(policy[0](ids), v))
    assert torch.equal(y.stacked, direct.stacked)
    assert isinstance(policy(ids), torch.Tensor)
    y.tangents.square().sum().backward()
    assert policy[1].weight.grad.abs().max() > 0 and policy[0].weight.grad.abs().max() > 0


class Pair(nn.Module):
    """Returns the layer's output first among others."""

    def __init__(self, layer: nn.Module, kind: type = tuple) -> None:
        super().__init__()
        self.layer, self.kind = layer, kind

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.kind((self.layer(x), x))


def test_inject_changes_the_first_of_a_tuple():
    layer, rest, x = nn.Linear(4, 4), nn.Linear(4, 2), torch.randn(2, 3, 4)
    v = torch.randn(2, 2, 3, 4)
    pair = Pair(layer)
    with aajr.inject(pair, v):
        first, second = pair(x)
        tangents = rest(first).tangents
    assert type(second) is torch.Tensor and torch.equal(second, x)
    torch.testing.assert_close(tangents, v @ rest.weight.T)
    wrong = "must return a floating point tensor, or a tuple that starts with one, got list"
    with pytest.raises(TypeError, match=wrong), aajr.inject(listed := Pair(layer, list), v):
        listed(x)
    wrong, integers = r"got a tuple that starts with a tensor of torch\.int64", Pair(nn.Flatten(0))
    with pytest.raises(TypeError, match=wrong), aajr.inject(integers, v):
        integers(torch.zeros(2, 3, dtype=torch.int64))


def test_inject_says_when_nothing_was_injected_and_restores_on_error():
    policy, ids = model(), torch.randint(7, (2, 3))
    with pytest.raises(RuntimeError, match="was not called"), aajr.inject(policy[3], torch.randn(2, 3, 5)):
        pass
    with (
        pytest.raises(ValueError, match="v must have the shape"),
        aajr.inject(policy[0], torch.randn(2, 3, 5)),
    ):
        policy(ids)
    assert isinstance(policy(ids), torch.Tensor)
    with pytest.raises(TypeError, match="embedding_module"), aajr.inject(policy[0].weight, ids):
        pass


def test_power_iterations_leave_their_start_as_it_was():
    v = torch.nn.functional.normalize(torch.randn(3, 4, dtype=torch.float64), dim=-1)
    before, slopes = v.clone(), torch.tensor([1.0, 2.0, 3.0, 9.0], dtype=torch.float64)
    largest = power_iteration(lambda u: (slopes * u).square().sum(-1), v, 60, lambda g: g)
    assert not v.requires_grad and torch.equal(v, before)
    torch.testing.assert_close(largest[:, 3].abs(), torch.ones(3, dtype=torch.float64))
