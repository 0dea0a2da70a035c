"""Places where a Dual could lose its derivative in silence: each gives the right answer, an error or a warning."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

import aajr_kernels as aajr
from aajr_kernels import UnsupportedOperation, dual
from aajr_kernels.rules import fallback, guards
from aajr_kernels.rules.registry import RULES


@torch.library.custom_op("aajr_test::twice", mutates_args=())
def twice(x: Tensor, others: list[Tensor]) -> Tensor:
    return x * 2


twice.register_autograd(lambda ctx, g: (g * 2, None))


class Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * 2


def made(*shape: int, k: int = 1) -> aajr.Dual:
    return dual(torch.randn(*shape).double(), torch.randn(k, *shape).double())


# -- refused, with a message ----------------------------------------------------------------------------------------

BARRED: dict[str, Callable[[aajr.Dual], Any]] = {
    "scatter_reduce": lambda x: x.scatter_reduce(0, torch.zeros(3, 3, dtype=torch.long), x, "prod"),
    "index_reduce": lambda x: x.index_reduce(0, torch.tensor([0, 1, 0]), x, "prod"),
    "bessel_j0": torch.special.bessel_j0,
    "chebyshev": lambda x: torch.special.chebyshev_polynomial_t(x, 2),
    "aten op": lambda x: torch.ops.aten.add(x, x),
    "custom op": lambda x: twice(x, []),
    "custom op packet": lambda x: torch.ops.aajr_test.twice(x, []),
    "custom op overload": lambda x: torch.ops.aajr_test.twice.default(x, []),
    "custom op, in a list": lambda x: twice(x.primal, [x]),
    "make_dual": lambda x: forward_ad.make_dual(x, x),
    "Function.apply": lambda x: Twice.apply(x),
    "reentrant checkpoint": lambda x: torch.utils.checkpoint.checkpoint(torch.sin, x, use_reentrant=True),
    "out=": lambda x: torch.add(x, x, out=torch.empty(3, 3).double()),
    "out= of a rule in F": lambda x: F.normalize(x, out=torch.empty(3, 3).double()),
    "numpy": np.asarray,
    "numpy ufunc": np.sin,
    "Tensor.numpy": lambda x: x.numpy(),
    "backward": lambda x: x.backward(),
    "autograd.grad": lambda x: torch.autograd.grad(x, x),
    "register_hook": lambda x: x.register_hook(print),
    "pack_padded": lambda x: nn.utils.rnn.pack_padded_sequence(x[None], torch.tensor([3]), batch_first=True),
    "into a plain buffer": lambda x: torch.empty(3, 3).double().copy_(x),
    "by index into a plain buffer": lambda x: torch.empty(3, 3).double().__setitem__(0, x[0]),
}


@pytest.mark.parametrize("name", BARRED)
def test_it_raises(name: str) -> None:
    with forward_ad.dual_level(), pytest.raises(UnsupportedOperation) as caught:
        BARRED[name](made(3, 3))
    assert str(caught.value).endswith(".") and len(str(caught.value)) > 40


class TwiceInTwo(Twice):
    """The form with ``setup_context``, whose forward has no context."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:  # type: ignore[override]
        return x * 2

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass


class Scaled(Twice):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factors: Any) -> Tensor:  # type: ignore[override]
        return x * factors[0]


class Returned(Twice):
    """Forward runs no function of torch."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x


class Nested(Twice):
    """Forward calls a Function that was bound earlier."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return original_apply(Twice)(x)


def original_apply(cls: type) -> Callable[..., Any]:
    """``cls.apply`` as a module has it that bound it before the first dual: what the guard replaced."""
    return torch._C._FunctionBase.__dict__["apply"].__get__(None, cls)


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("cls", [Twice, TwiceInTwo, Returned, Nested])
def test_an_apply_bound_earlier_raises_too(cls: type, k: int) -> None:
    x = made(3, k=k)
    calls: list[Callable[..., Any]] = [original_apply(cls), cls.apply, original_apply(cls)]
    for call in calls:
        with pytest.raises(UnsupportedOperation, match=rf"{cls.__name__}\.apply would drop the gradient"):
            call(x)
        leaf = x.primal.clone().requires_grad_()
        call(leaf).sum().backward()
        assert torch.equal(leaf.grad, torch.full((3,), 2.0).double())


def test_an_apply_bound_earlier_sees_duals_that_are_not_its_first_argument() -> None:
    x, plain = made(3), torch.ones(3).double().requires_grad_()
    with pytest.raises(UnsupportedOperation, match="drop the gradient"):
        original_apply(Scaled)(plain, [x])


def test_an_apply_bound_before_the_first_dual_raises() -> None:
    """The real order, in a process of its own."""
    done = subprocess.run([sys.executable, "-c", BOUND_FIRST], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["raised"] * 2 + ["4.0"] * 2, done.stderr


BOUND_FIRST = """
import torch, aajr_kernels as aajr

class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x) if isinstance(x, torch.Tensor) else None
        return x * x

    @staticmethod
    def backward(ctx, g):
        return 2 * g * ctx.saved_tensors[0]

first = Square.apply
x = torch.full((), 2.0, requires_grad=True)
y = aajr.dual(x, x)
for apply in (first, Square.apply):
    try:
        apply(y)
    except aajr.UnsupportedOperation:
        print("raised")
for apply in (first, Square.apply):
    print(torch.autograd.grad(apply(x), x)[0].item())
"""


def test_the_message_names_function_and_remedy_and_coverage_counts_it() -> None:
    with (
        aajr.coverage() as coverage,
        pytest.raises(UnsupportedOperation, match=r"bessel_j0 has no derivative rule.*rules\.rule"),
    ):
        torch.special.bessel_j0(made(3, 3))
    assert coverage.unsupported == ["torch.special_bessel_j0"]


def test_nothing_barred_is_on_the_fallbacks_list() -> None:
    barred = "layer_norm native_layer_norm instance_norm batch_norm solve det slogdet logdet".split()
    assert not set(barred) & {name.split(".")[-1] for name in fallback.ALLOWED}


def test_barred_functions_a_transformer_needs_have_rules_of_their_own() -> None:
    for function in (
        F.layer_norm,
        torch.layer_norm,
        F.batch_norm,
        F.instance_norm,
        F.scaled_dot_product_attention,
    ):
        assert function in RULES


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "kind", ["script function", "traced function", "script module", "traced module", "trace"]
)
def test_torchscript_raises(kind: str) -> None:
    x, example = made(3, 3), torch.randn(3, 3).double()
    layer = nn.Linear(3, 3).double()

    def function(x: Tensor) -> Tensor:
        return x * 2

    calls: dict[str, Callable[[], Any]] = {
        "script function": lambda: torch.jit.script(function)(x),
        "traced function": lambda: torch.jit.trace(function, (example,))(x),
        "script module": lambda: torch.jit.script(layer)(x),
        "traced module": lambda: torch.jit.trace(layer, (example,))(x),
        "trace": lambda: torch.jit.trace(function, (x,)),
    }
    if kind.endswith("module"):
        with pytest.raises(UnsupportedOperation, match="call the module that torch.jit was given"):
            calls[kind]()
    else:  # words of torch's own
        with pytest.raises(RuntimeError, match="found type 'Dual'|infer type of .Dual"):
            calls[kind]()


def test_functions_of_others_keep_the_words_of_torch_inside_of_a_transform() -> None:
    made(2)
    with pytest.raises(RuntimeError, match="setup_context"):
        torch.func.grad(lambda z: Twice.apply(z).sum())(torch.ones(2))


# -- hooks ----------------------------------------------------------------------------------------------------------


class _Pair(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, int]:
        return x * 2, 1


@pytest.mark.parametrize("register", ["register_full_backward_hook", "register_full_backward_pre_hook"])
def test_full_backward_hooks_warn(register: str) -> None:
    guards.guard_backward_hooks()
    guards.guard_backward_hooks()  # idempotent
    for layer in (nn.Linear(3, 2).double(), _Pair()):
        getattr(layer, register)(lambda *args: None)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            layer(made(3, 3))
        ours = [w for w in caught if "y.stacked" in str(w.message)]
        assert ours and type(layer).__name__ in str(ours[0].message)


def test_full_backward_hooks_still_fire_on_tensors() -> None:
    guards.guard_backward_hooks()
    layer, seen = nn.Linear(3, 2), []
    layer.register_full_backward_hook(lambda module, grad_in, grad_out: seen.append(grad_out[0].shape))
    layer(torch.randn(4, 3, requires_grad=True)).sum().backward()
    assert seen == [(4, 2)]


def test_forward_hooks_see_the_dual() -> None:
    layer, seen = nn.Linear(3, 2).double(), []
    layer.register_forward_hook(lambda module, args, out: seen.append((args[0], out)))
    y = layer(made(4, 3))
    assert seen[0][1] is y and aajr.is_dual(seen[0][0])


def test_a_cast_to_complex_numbers_does_not_drop_the_tangent():
    x = aajr.dual(torch.ones(2), torch.ones(2))
    for cast in (lambda: x.to(torch.complex64), lambda: x.type(torch.complex64), lambda: x.cfloat()):
        assert torch.equal(cast().tangent, torch.ones(2, dtype=torch.complex64))


#: slots and methods in C, which Python refuses a Dual for before torch is asked
UNBOUND = ("add", "exp", "view", "__getitem__", "__radd__")


@pytest.mark.parametrize("name", UNBOUND)
def test_an_unbound_method_of_tensor_has_a_remedy_inside_of_a_derivative(name: str) -> None:
    x = torch.randn(3, 3).double()
    arguments = {"exp": (), "view": (9,)}.get(name, (1,))
    model = lambda z: getattr(Tensor, name)(z, *arguments)
    for run in (lambda: aajr.jvp(model, (x,), (x,)), lambda: aajr.aligned_penalty(model, x, x, metric="l2")):
        with pytest.raises(UnsupportedOperation, match=rf"torch\.Tensor\.{name} cannot be called unbound"):
            run()


def test_unbound_methods_in_python_ask_the_dual() -> None:
    x = made(3, 3)
    assert torch.equal(Tensor.norm(x).stacked, x.norm().stacked)
    assert torch.equal(Tensor.__rsub__(x, 1.0).stacked, (1.0 - x).stacked)
