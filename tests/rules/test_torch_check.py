"""On a torch outside the tested range the first dual() checks values and gradients, and compiled ones when compiled."""

from __future__ import annotations

import functools
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import aajr_kernels as aajr
from aajr_kernels import UnsupportedOperation, torch_private
from aajr_kernels.rules import common, registry, torch_check

pytestmark = [  # of Dynamo's doings
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
]


@pytest.fixture
def untested(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As in a new process, on a torch that is to come."""
    first_dual()  # the other guards are installed
    monkeypatch.setattr(torch_private, "VERSION", (9, 3))
    monkeypatch.setattr(torch, "__version__", "9.3.0")
    monkeypatch.setattr(registry, "GUARDS", [torch_check.check])
    monkeypatch.setattr(registry, "COMPILED_GUARDS", [torch_check.check_compiled])
    monkeypatch.setattr(registry, "_compiled_fault", None)
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def first_dual() -> aajr.Dual:
    return aajr.dual(torch.ones(3), torch.ones(3))


def test_a_tested_one_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_private, "VERSION", torch_private.TESTED[1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch_check.check()
    assert torch_check.check_compiled() is None


@pytest.mark.parametrize(
    ("version", "tested"), [((2, 10), False), ((2, 11), True), ((2, 13), True), ((3, 0), False)]
)
def test_the_range(version: tuple[int, int], tested: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_private, "VERSION", version)
    assert torch_private.is_tested() == tested


def test_a_right_one_warns_once(untested: None) -> None:
    state = torch.get_rng_state()
    with (
        aajr.coverage() as coverage,
        pytest.warns(UserWarning, match=r"torch 9\.3\.0 is untested \(2\.11 to"),
    ):
        first_dual()
    assert not coverage.entries and torch.equal(torch.get_rng_state(), state)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first_dual()


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, lambda: torch.device("meta")])
def test_the_contexts_of_the_first_dual_are_not_those_of_the_check(
    untested: None, context: Callable[[], Any]
) -> None:
    with pytest.warns(UserWarning, match="passed"), context():
        first_dual()


def test_a_transform_around_the_first_dual_is_not_around_the_check(untested: None) -> None:
    def penalty(w: Tensor) -> Tensor:
        return (aajr.dual(torch.ones(3), torch.ones(3)) * w).sin().tangents.square().sum()

    with pytest.warns(UserWarning, match="passed"):
        torch.func.grad(penalty)(torch.ones(3))


def wrong_tangent(x: Any, *args: Any, **kwargs: Any) -> Any:
    y = F.gelu(x.stacked[0])
    return common.join(y, x.tangents * 0.5)


def dropped_gradient(function: Callable[..., Any], x: Any, *args: Any, **kwargs: Any) -> Any:
    """Right values, and no gradient to the weights."""
    return function(x, *(a.detach() for a in args), **kwargs)


BROKEN: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "tangent": (F.gelu, wrong_tangent),
    "gradient": (F.linear, functools.partial(dropped_gradient, registry.RULES[F.linear])),
    "exception": (F.layer_norm, lambda *args, **kwargs: 1 / 0),
    "not a number": (F.gelu, lambda x: x * float("nan")),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_wrong_one_raises_at_every_dual(name: str, untested: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.RULES, *BROKEN[name])
    for _ in range(2):
        with pytest.raises(UnsupportedOperation, match=r"torch 9\.3\.0 is untested and fails.*install"):
            first_dual()


def test_guards_that_do_not_hold_raise(untested: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_check, "_BOUND_FIRST", lambda x: x)
    with pytest.raises(UnsupportedOperation, match="autograd Function drops the gradient"):
        first_dual()


def penalty(x: Tensor) -> Tensor:
    return aajr.dual(x, x.cos()).sin().tangents.square().sum()


@pytest.mark.slow
def test_compiled_gradients_are_checked_when_a_dual_is_compiled(untested: None) -> None:
    registry.GUARDS.clear()
    x = torch.ones(3, requires_grad=True)
    value = torch.compile(penalty, backend="aot_eager", fullgraph=True)(x)
    (gradient,) = torch.autograd.grad(value, x)
    torch.testing.assert_close(gradient, torch.autograd.grad(penalty(x), x)[0])
    assert not registry.COMPILED_GUARDS


@pytest.mark.slow
@pytest.mark.parametrize("place", ["inside", "outside"])
def test_compiled_gradients_are_checked_in_a_new_process(place: str) -> None:
    """Nothing of Dynamo is warm, and the first dual is made in compiled code or given to it."""
    program = f"""
import torch
import aajr_kernels as aajr
from aajr_kernels import torch_private
from aajr_kernels.rules import registry

torch_private.VERSION = (9, 3)
norm = torch.nn.LayerNorm(8)
x = torch.arange(24.0).reshape(3, 8).sin()


def inside(x):
    return outside(aajr.dual(x, x.cos()))


def outside(d):
    return norm(d).tangents.square().sum()


argument = x if {place!r} == "inside" else aajr.dual(x, x.cos())
value = torch.compile({place}, backend="aot_eager", fullgraph=True)(argument)
(gradient,) = torch.autograd.grad(value, norm.weight)
(expected,) = torch.autograd.grad({place}(argument), norm.weight)
torch.testing.assert_close(gradient, expected)
assert not registry.COMPILED_GUARDS and registry._compiled_fault is None
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tangent", "gradient"])
def test_wrong_compiled_gradients_raise(name: str, untested: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong only while torch.compile traces, as an old Dynamo was."""
    function, broken = BROKEN[name]
    right = registry.RULES[function]

    def rule(*args: Any, **kwargs: Any) -> Any:
        return (broken if torch.compiler.is_compiling() else right)(*args, **kwargs)

    monkeypatch.setitem(registry.RULES, function, rule)
    registry.GUARDS.clear()
    x = torch.ones(3, requires_grad=True)
    for _ in range(2):
        with pytest.raises(UnsupportedOperation, match="fails the check of compiled values"):
            torch.compile(penalty, backend="eager")(x)
        torch.compiler.reset()
    with pytest.raises(Exception, match="fails the check of compiled values"):
        torch.compile(penalty, backend="eager", fullgraph=True)(x)
