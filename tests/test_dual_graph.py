"""The number in functions and graphs: jvp, autograd, checkpointing, in-place writes and views, torch.compile."""

from __future__ import annotations

import functools
import operator

import pytest
import torch
import torch.utils._pytree as pytree
from assertions import assert_exact
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import aajr_kernels as aajr
from aajr_kernels import Dual, dual, is_dual


def pair(*shape: int, k: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(shape, dtype=torch.float64), torch.randn((k, *shape), dtype=torch.float64)


def number(*shape: int, k: int = 1) -> Dual:
    return dual(*pair(*shape, k=k))


# -- jvp --------------------------------------------------------------------------------------------------------------


def tree_function(first, second):
    y = torch.sin(first["a"]) * second
    return {"y": y, "z": (first["a"].sum(), y @ first["b"])}


def tree_inputs():
    sizes = {"a": (3,), "b": (3, 2)}
    make = lambda: ({n: torch.randn(*s).double() for n, s in sizes.items()}, torch.randn(3).double())
    return make(), make()


def test_jvp_has_the_convention_of_torch():
    primals, tangents = tree_inputs()
    expected = torch.func.jvp(tree_function, primals, tangents)
    actual = aajr.jvp(tree_function, primals, tangents)
    assert pytree.tree_structure(actual) == pytree.tree_structure(expected)
    for got, want in zip(pytree.tree_leaves(actual), pytree.tree_leaves(expected)):
        assert type(got) is torch.Tensor
        assert_exact(got, want)


def test_jvp_with_aux():
    x, v = pair(3)
    function = lambda x: (x.cos(), {"twice": 2 * x, "n": 3})
    y, tangent, aux = aajr.jvp(function, (x,), (v[0],), has_aux=True)
    expected = torch.func.jvp(lambda x: (x.cos(), {"twice": 2 * x}), (x,), (v[0],), has_aux=True)
    assert_exact(y, expected[0])
    assert_exact(tangent, expected[1])
    assert type(aux["twice"]) is torch.Tensor and torch.equal(aux["twice"], 2 * x) and aux["n"] == 3
    with pytest.raises(TypeError, match=r"func must return \(output, aux\) with has_aux=True, got Dual"):
        aajr.jvp(lambda x: x, (x,), (v[0],), has_aux=True)


def test_jvp_strict():
    x, v = pair(3, k=2)
    constant = torch.ones(4)
    y, tangent = aajr.jvp(lambda x: constant, (x,), (v,))
    assert torch.equal(y, constant) and tangent.shape == (2, 4) and not tangent.any()
    for strict in (torch.func.jvp, aajr.jvp):
        with pytest.raises(RuntimeError):
            strict(lambda x: constant, (x,), (v[0],), strict=True)
    with pytest.raises(RuntimeError, match="does not depend on the inputs"):
        aajr.jvp(lambda x: {"a": x, "b": constant}, (x,), (v,), strict=True)


def test_jvp_of_several_directions():
    x, v = pair(3, 2, k=4)
    y, tangents = aajr.jvp(lambda x: x.exp().sum(0), (x,), (v,))
    assert y.shape == (2,) and tangents.shape == (4, 2)
    for i in range(4):
        assert_exact(tangents[i], torch.func.jvp(lambda x: x.exp().sum(0), (x,), (v[i],))[1])
    assert aajr.jvp(torch.exp, (x,), (v[:1],))[1].shape == (1, 3, 2)


def test_jvp_is_differentiable_in_everything():
    x, v = (t.requires_grad_() for t in pair(3))
    w = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
    gradients = []
    for jvp in (aajr.jvp, torch.func.jvp):
        y, tangent = jvp(lambda x: torch.tanh(w @ x), (x,), (v[0],))
        gradients.append(torch.autograd.grad(tangent.square().sum() + y.sum(), (x, v, w)))
    for got, want in zip(*gradients):
        assert_exact(got, want)


@pytest.mark.parametrize(
    ("primals", "tangents", "error", "message"),
    [
        (
            torch.ones(2),
            (torch.ones(2),),
            TypeError,
            r"non-empty tuples, got Tensor and tuple: write jvp\(func",
        ),
        ((), (), TypeError, "non-empty tuples"),
        ((torch.ones(2),), ({"a": torch.ones(2)},), TypeError, "tangents must have the structure of primals"),
        ((torch.ones(2),), (torch.ones(3),), ValueError, "v must have the shape of x"),
        (
            (torch.ones(2), torch.ones(2)),
            (torch.ones(2, 2), torch.ones(3, 2)),
            ValueError,
            "with 2 and 3 tangents",
        ),
    ],
)
def test_wrong_arguments_of_jvp(primals, tangents, error, message):
    with pytest.raises(error, match=message):
        aajr.jvp(lambda *x: x[0], primals, tangents)


# -- the graph --------------------------------------------------------------------------------------------------------


def test_detach_and_data_are_the_plain_primal():
    x = torch.randn(3, requires_grad=True)
    d = dual(x, torch.ones(3))
    for plain in (d.detach(), d.data, torch.detach(d)):
        assert type(plain) is torch.Tensor and not plain.requires_grad and torch.equal(plain, x)
    assert d.detach().data_ptr() == d.stacked.data_ptr()


def test_no_grad_keeps_tangents():
    x, w = torch.randn(3), torch.randn(3, requires_grad=True)
    with torch.no_grad():
        y = dual(x, torch.ones(3)) * w
    assert is_dual(y) and not y.requires_grad and torch.equal(y.tangent, w)


def test_inference_mode_keeps_tangents():
    with torch.inference_mode():
        d = dual(torch.randn(3), torch.ones(3))
        y = torch.exp(d * 2)
        assert is_dual(y) and y.is_inference() and y.tangent.abs().sum() > 0
        assert d.stacked.is_inference()


def test_requires_grad_and_grad():
    d = number(3)
    assert not d.requires_grad and d.grad is None and d.is_leaf
    d.requires_grad_()
    assert d.requires_grad and d.stacked.requires_grad
    y = d * d
    assert y.grad_fn is not None and not y.is_leaf
    y.retain_grad()
    (y.tangent.sum() + y.primal.sum()).backward()
    assert is_dual(d.grad) and torch.equal(d.grad.primal, 2 * d.detach() + 2 * d.tangent)
    assert torch.equal(d.grad.tangent, 2 * d.detach()) and torch.equal(
        y.grad.stacked, torch.ones(2, 3).double()
    )
    d.requires_grad = False
    assert not d.requires_grad


def test_what_would_be_ambiguous_raises():
    d = number(1).requires_grad_()
    with pytest.raises(aajr.UnsupportedOperation, match=r"backward\(\) of a Dual is ambiguous"):
        d.sum().backward()
    with pytest.raises(aajr.UnsupportedOperation, match="register_hook on a Dual is ambiguous"):
        d.register_hook(print)
    with pytest.raises(aajr.UnsupportedOperation, match=r"torch\.add\(out=\.\.\.\) cannot write a Dual"):
        torch.add(d, d, out=torch.empty(1))


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, g):
        return 2 * g * ctx.saved_tensors[0]


def test_a_function_applied_to_a_dual_raises_and_to_tensors_works():
    number(1)
    x = torch.tensor([3.0], requires_grad=True)
    Square.apply(x).backward()
    assert x.grad.item() == 6
    for call in (lambda: Square.apply(number(2)), lambda: Square.apply([number(2)])):
        with pytest.raises(
            aajr.UnsupportedOperation, match=r"Square\.apply would drop the gradient of a Dual"
        ):
            call()


def model_and_input():
    model = nn.Sequential(
        nn.Linear(4, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 4), nn.Softmax(-1)
    ).double()
    return model, *pair(3, 4)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_checkpointing_is_exact(dropout):
    model, x, v = model_and_input()
    model.insert(3, nn.Dropout(dropout))
    outcomes = []
    for run in (lambda d: model(d), lambda d: checkpoint(model, d, use_reentrant=False)):
        torch.manual_seed(4)
        leaves = [x.clone().requires_grad_(), v.clone().requires_grad_(), *model.parameters()]
        y = run(dual(leaves[0], leaves[1]))
        loss = y.tangent.square().sum() + y.primal[..., 0].sum()
        outcomes.append((loss, *torch.autograd.grad(loss, leaves)))
    for got, want in zip(*outcomes):
        assert torch.equal(got, want)


def test_reentrant_checkpointing_raises():
    model, x, v = model_and_input()
    with pytest.raises(aajr.UnsupportedOperation, match="use non-reentrant checkpointing"):
        checkpoint(model, dual(x, v), use_reentrant=True)


@pytest.mark.parametrize("k", [1, 3])
def test_checkpoints_take_duals_anywhere_and_nested(k):
    x, v = pair(3, 5, k=k)
    leaves = [t.requires_grad_() for t in (x, v, torch.randn(5, 5, dtype=torch.float64))]
    again = functools.partial(checkpoint, use_reentrant=False)
    plainly = lambda function, *args, **kwargs: function(*args, **kwargs)

    def inner(d, weight, missing, pair, scale):
        assert missing is None and isinstance(d, aajr.Dual)
        return (torch.tanh(d @ weight) * pair[0] + pair[1]).sin() * scale

    def outer(run, d, weight):
        return run(inner, d * 2, weight, None, (d, weight[0]), scale=d.exp())

    def penalty(run):
        y = run(outer, run, dual(x, v), leaves[2])
        return y.tangents.square().sum() + y.primal.mean()

    for got, want in zip(*(torch.autograd.grad(penalty(run), leaves) for run in (again, plainly))):
        assert_exact(got, want)


# -- storage ----------------------------------------------------------------------------------------------------------


def test_in_place_returns_the_same_number():
    d = number(3, k=2)
    before, other = d.stacked.clone(), number(3, k=2)
    e = d
    e += other
    assert e is d and torch.equal(d.stacked, before + other.stacked)
    assert d.mul_(2) is d and torch.equal(d.stacked, 2 * (before + other.stacked))
    d.copy_(torch.ones(3))
    assert d.primal.eq(1).all() and not d.tangents.any()
    d.fill_(2.0).zero_()
    assert not d.stacked.any()


def test_in_place_agrees_with_out_of_place_in_gradient():
    x, v = (t.requires_grad_() for t in pair(4))
    gradients = []
    for function in (lambda d: d / d.sum(), lambda d: d.clone().div_(d.sum()), in_place_by_itself):
        y = function(dual(x, v).exp())
        gradients.append(torch.autograd.grad(y.tangent.square().sum() + y.primal[0], (x, v)))
    for other in gradients[1:]:
        for got, want in zip(other, gradients[0]):
            assert_exact(got, want)


def in_place_by_itself(d):
    d /= d.sum()
    return d


def test_versions_are_counted():
    x = torch.randn(3, requires_grad=True)
    y = dual(x, torch.ones(3)) * 1.0
    z = y * y  # keeps y for the backward
    version = y._version
    y.add_(1)
    assert y._version == version + 1
    with pytest.raises(RuntimeError, match=r"modified (by an )?inplace"):
        z.tangent.sum().backward()


def test_writes_through_a_view_of_a_view_reach_the_base():
    d = number(4, 3, k=2)
    before = d.stacked.clone()
    d[1:].view(3, 3)[0].mul_(2)
    before[:, 1] *= 2
    assert torch.equal(d.stacked, before)
    d.T[0].zero_()
    before[:, :, 0] = 0
    assert torch.equal(d.stacked, before)
    for row in d.unbind(0):
        row.add_(1)
    before[0] += 1
    assert torch.equal(d.stacked, before)
    other = number(3, k=2)
    d[2] = other
    before[:, 2] = other.stacked
    assert torch.equal(d.stacked, before)
    d[0, 1:] = 5.0
    before[0, 0, 1:], before[1:, 0, 1:] = 5.0, 0.0
    assert torch.equal(d.stacked, before)


def test_gradients_flow_through_writes_to_views():
    x, v = (t.requires_grad_() for t in pair(4))

    def function(x):
        y = x * 2
        y[1:][:2].mul_(x[0])
        return y.square()

    y, tangent = torch.func.jvp(function, (x,), (v[0],))
    want = torch.autograd.grad(tangent.square().sum() + y.sum(), (x, v))
    result = function(dual(x, v))
    assert_exact(result.primal, y)
    assert_exact(result.tangent, tangent)
    for a, b in zip(torch.autograd.grad(result.tangent.square().sum() + result.primal.sum(), (x, v)), want):
        assert_exact(a, b)


@pytest.mark.parametrize(
    "write",
    [
        lambda buffer, d: buffer.copy_(d),
        lambda buffer, d: buffer.add_(d),
        operator.iadd,
        lambda buffer, d: buffer.__setitem__(0, d[0]),
        lambda buffer, d: buffer.index_add_(0, torch.tensor([0]), d[:1]),
    ],
)
def test_a_plain_buffer_has_no_room_for_a_dual(write):
    with pytest.raises(aajr.UnsupportedOperation, match="new_zeros"):
        write(torch.zeros(3, dtype=torch.float64), number(3))


def test_a_buffer_made_from_a_dual_has():
    d = number(3)
    buffer = d.new_zeros(2, 3)
    buffer[1] = d
    assert torch.equal(buffer[1].stacked, d.stacked) and not buffer[0].stacked.any()


# -- torch.compile ----------------------------------------------------------------------------------------------------


def composed(x, v, weight):
    d = dual(x, v)
    y = F.linear(d, weight)
    y = torch.tanh(y) * d + torch.softmax(F.layer_norm(y, (4,)), -1).transpose(0, 1).reshape(y.shape)
    return (torch.matmul(y, weight).tangents ** 2).sum() + y.primal.mean()


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # raised by Dynamo
@pytest.mark.parametrize("backend", ["eager", pytest.param("aot_eager", marks=pytest.mark.slow)])
def test_compiled_in_one_graph(backend):
    x, v = pair(4, 4, k=2)
    weight = torch.randn(4, 4, dtype=torch.float64)
    leaves = [t.requires_grad_() for t in (x, v, weight)]
    expected = composed(*leaves)  # installs the guards and imports the ops, which cannot be traced
    gradients = torch.autograd.grad(expected, leaves)
    torch._dynamo.reset()
    actual = torch.compile(composed, fullgraph=True, backend=backend)(*leaves)
    assert_exact(actual, expected)
    for got, want in zip(torch.autograd.grad(actual, leaves), gradients):
        assert_exact(got, want)
    torch._dynamo.reset()


def test_compiled_products_are_right_and_a_swapped_operator_raises():
    """Dynamo swaps the operands of ``dual @ tensor``; a matrix that does not commute would show it."""
    weight = torch.randn(3, 3, dtype=torch.float64)
    x, v = torch.randn(2, 3, 3, dtype=torch.float64)

    def compiled(function):
        return torch.compile(function, fullgraph=True, backend="eager")(x, v)

    assert_exact(compiled(lambda x, v: torch.matmul(aajr.dual(x, v), weight).tangent), v @ weight)
    assert_exact(compiled(lambda x, v: aajr.dual(x, v).matmul(weight).tangent), v @ weight)
    with pytest.raises(Exception, match="swaps the operands"):
        compiled(lambda x, v: (aajr.dual(x, v) @ weight).tangent)
