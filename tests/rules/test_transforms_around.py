"""Transforms, parameters and control flow of torch around a Dual: each is right, or raises with a remedy."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

import aajr_kernels as aajr
from aajr_kernels import UnsupportedOperation, dual


def made(*shape: int, k: int = 1) -> aajr.Dual:
    return dual(torch.randn(*shape).double(), torch.randn(k, *shape).double())


# -- other transforms around a Dual ---------------------------------------------------------------------------------


def _penalty(w: Tensor) -> Tensor:
    """Made of rules in plain torch, which every transform of torch understands."""
    x = torch.arange(6.0).double().reshape(2, 3) / 7
    y = (dual(x, x.cos()) * w).exp().logsumexp(-1)
    return y.tangents.square().sum()


def _fused(w: Tensor) -> Tensor:
    """Made of an op with a hand-written backward."""
    x = torch.arange(6.0).double().reshape(2, 3) / 7
    return F.layer_norm(dual(x, x.cos()) * w, (3,)).tangents.square().sum()


def test_functorch_of_a_penalty_made_of_rules_is_right() -> None:
    w = torch.tensor([0.3, -0.4, 0.9]).double().requires_grad_()
    value = _penalty(w)
    (gradient,) = torch.autograd.grad(value, w)
    torch.testing.assert_close(torch.func.grad(_penalty)(w.detach()), gradient)
    v = torch.tensor([0.1, 0.2, -0.5]).double()
    torch.testing.assert_close(torch.func.jvp(_penalty, (w.detach(),), (v,))[1], gradient @ v)
    torch.testing.assert_close(
        torch.func.vmap(_penalty)(torch.stack([w, v])), torch.stack([value, _penalty(v)])
    )
    with forward_ad.dual_level():
        out = forward_ad.unpack_dual(_penalty(forward_ad.make_dual(w.detach(), v)))
        torch.testing.assert_close(out.tangent, gradient @ v)


TRANSFORMS: dict[str, Callable[..., Any]] = {
    "grad": torch.func.grad,
    "vjp": lambda f: lambda x: torch.func.vjp(f, x),
    "jvp": lambda f: lambda x: torch.func.jvp(f, (x,), (x,)),
    "jacrev": torch.func.jacrev,
    "jacfwd": torch.func.jacfwd,
    "hessian": torch.func.hessian,
    "vmap": lambda f: lambda x: torch.func.vmap(f)(x.unsqueeze(0)),
    "linearize": lambda f: lambda x: torch.func.linearize(f, x),
    "forward_ad": lambda f: lambda x: f(forward_ad.make_dual(x, x)),
}


def _refused(transform: str, function: Callable[[Tensor], Any], x: Tensor) -> None:
    level = forward_ad.dual_level() if transform == "forward_ad" else contextlib.nullcontext()
    with level, pytest.raises(UnsupportedOperation, match="take torch.autograd.grad"):
        TRANSFORMS[transform](function)(x)


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_functorch_of_a_fused_op_raises(transform: str) -> None:
    _refused(transform, _fused, torch.tensor([0.3, -0.4, 0.9]).double())


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_the_penalty_names_its_remedy_inside_of_a_transform(transform: str) -> None:
    x, weight = torch.randn(2, 3), torch.randn(3, 3)
    _refused(transform, lambda z: aajr.aligned_penalty(lambda y: y @ weight, z, x), x)
    _refused(transform, lambda z: aajr.aligned_penalty(lambda y: y @ weight, x, z), x)


def test_a_level_of_forward_ad_without_tangents_changes_nothing() -> None:
    x = torch.randn(2, 3)
    with forward_ad.dual_level():
        inside = aajr.aligned_penalty(torch.sin, x, x)
    assert torch.equal(inside, aajr.aligned_penalty(torch.sin, x, x))


# -- parameters and control flow -------------------------------------------------------------------------------------


def test_parameters_and_buffers_do_not_drop_a_tangent() -> None:
    x = made(3)
    for holder in (nn.Parameter, nn.Buffer):
        with pytest.raises(UnsupportedOperation, match=rf"nn\.{holder.__name__} .* pass y\.primal"):
            holder(x)
        assert torch.equal(holder(x.primal), x.primal)
    assert nn.Parameter().shape == (0,)
    assert not nn.Parameter(data=torch.ones(1), requires_grad=False).requires_grad
    assert not nn.Buffer(torch.ones(1), persistent=False).persistent


def _flow(name: str) -> Callable[..., Any]:
    return getattr(importlib.import_module(f"torch._higher_order_ops.{name}"), name)


CONTROL_FLOW: dict[str, tuple[Callable[[Any], Any], str]] = {
    "cond": (
        lambda x: torch.cond(torch.tensor(True), torch.sin, torch.cos, (x,)),
        r"torch\.cond .*: write torch\.where or if\.",
    ),
    "cond, predicate": (
        lambda x: torch.cond(x.sum() > 0, torch.sin, torch.cos, operands=([x],)),
        r"torch\.cond .*: write torch\.where or if\.",
    ),
    "cond, captured": (
        lambda x: torch.cond(torch.tensor(True), lambda z: x * z, lambda z: x + z, (torch.ones(4),)),
        r"torch\.cond .*: write torch\.where or if\.",
    ),
    "while_loop": (
        lambda x: _flow("while_loop")(lambda i, z: i < 3, lambda i, z: (i + 1, z * 2), (torch.tensor(0), x)),
        r"torch\.while_loop .*: write a loop in Python\.",
    ),
    "scan": (
        lambda x: _flow("scan")(lambda carry, z: (carry + z, carry * z), x[0], x),
        r"torch\.scan .*: write a loop in Python\.",
    ),
    "associative_scan": (
        lambda x: _flow("associative_scan")(torch.add, x, 0, combine_mode="generic"),
        r"torch\.associative_scan .*: write a loop in Python\.",
    ),
    "map": (lambda x: _flow("map")(torch.sin, x), r"torch\.map .*: write a loop in Python\."),
}


@pytest.mark.parametrize("name", CONTROL_FLOW)
def test_control_flow_has_a_remedy(name: str) -> None:
    call, message = CONTROL_FLOW[name]
    with pytest.raises(UnsupportedOperation, match=message):
        call(made(3, 4))


def test_control_flow_of_plain_tensors_and_plain_conditions_passes() -> None:
    x = made(3)
    assert torch.equal(torch.cond(True, torch.sin, torch.cos, (x,)).stacked, x.sin().stacked)

    def branch(z: Tensor) -> Tensor:
        return later if z is None else z.sin()

    plain = torch.cond(torch.tensor(False), torch.cos, branch, (x.primal.detach(),))
    later = plain  # until here the branch captures a name without a value
    torch.testing.assert_close(plain, x.primal.detach().sin())


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # by Dynamo
def test_compiled_control_flow_has_a_remedy_and_passes_plain_tensors() -> None:
    def choose(z: Tensor) -> Tensor:
        return torch.cond(z.sum() > 0, torch.sin, torch.cos, (z,))

    x = made(3).primal.detach()
    torch._dynamo.reset()
    compiled = torch.compile(choose, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), torch.where(x.sum() > 0, x.sin(), x.cos()))
    with pytest.raises(UnsupportedOperation, match=r"write torch\.where or if"):
        torch.compile(lambda z: aajr.jvp(choose, (z,), (z,)), backend="eager")(x)


def test_vmap_over_a_dual_raises_instead_of_mapping_over_the_stack() -> None:
    with pytest.raises(UnsupportedOperation, match="vmap"):
        torch.func.vmap(torch.sin)(made(3, 4))
    with pytest.raises(UnsupportedOperation, match="vmap"):
        torch.func.vmap(lambda x, v: dual(x, v))(torch.randn(3, 4), torch.randn(3, 4))


def test_vmap_may_build_the_dual_inside() -> None:
    x, v = torch.randn(3, 4).double(), torch.randn(3, 4).double()
    tangent = torch.func.vmap(lambda x, v: (dual(x, v) * 2).cos().tangent)(x, v)
    torch.testing.assert_close(tangent, -2 * (2 * x).sin() * v)


def test_functional_call_and_grad_of_a_dual_argument_are_right() -> None:
    x, layer = made(3, 4), nn.Linear(4, 2).double()
    y = torch.func.functional_call(layer, {"bias": torch.zeros(2).double()}, (x,))
    torch.testing.assert_close(y.tangents, x.tangents @ layer.weight.T)
    g = torch.func.grad(lambda z: (z * z).tangents.sum())(x)
    torch.testing.assert_close(g.stacked, 2 * torch.stack([x.tangents[0], x.primal]))


def test_non_reentrant_checkpointing_is_right() -> None:
    layer = nn.Sequential(nn.Linear(4, 5), nn.GELU(), nn.Dropout(0.5), nn.LayerNorm(5)).double()
    x, gradients = made(3, 4, k=2), []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        layer.zero_grad()
        y = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False) if checkpointed else layer(x)
        (y.primal.sum() + y.tangents.square().sum()).backward()
        gradients.append([p.grad.clone() for p in layer.parameters()])
    for plain, other in zip(*gradients):
        assert torch.equal(plain, other)
