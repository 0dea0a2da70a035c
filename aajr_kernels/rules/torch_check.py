"""A check of values and gradients on a version of torch on which the test suite has not run.

The first ``dual()`` runs it (some milliseconds), and again compiled the first time that torch.compile meets a Dual.
Where the results are right it warns, once; where they are wrong every ``dual()`` raises.
"""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F

from .. import torch_private
from ..backends.errors import UnsupportedOperation
from ..coverage import paused
from ..dual import dual
from .registry import COMPILED_GUARDS, GUARDS

__all__ = ["check", "check_compiled"]

#: relative error allowed in float32, some hundred times its rounding
_TOLERANCE = 1e-4
_HEADS, _WIDTH, _K = 2, 8, 2


class _Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        return gradients[0] * 2


_BOUND_FIRST = _Twice.apply


def _waves(*shape: int, start: float) -> torch.Tensor:
    """Fixed numbers in [-1, 1]; draws nothing, which would change what the user draws."""
    count = torch.Size(shape).numel()
    return (torch.arange(count, dtype=torch.float64, device="cpu") * 1.7 + start).sin().reshape(shape)


def _leaves(dtype: torch.dtype) -> list[torch.Tensor]:
    """x, v, and the weights of the block."""
    shapes = (
        (1, 3, _WIDTH),
        (_K, 1, 3, _WIDTH),
        (_WIDTH,),
        (_WIDTH,),
        (3 * _WIDTH, _WIDTH),
        (_WIDTH, _WIDTH),
    )
    values = [_waves(*shape, start=i) * (0.5 if i > 3 else 1.0) for i, shape in enumerate(shapes)]
    return [value.to(dtype).requires_grad_() for value in values]


def _block(x: Any, weight: Any, bias: Any, projection: Any, out: Any) -> Any:
    """A pre-norm attention block and an activation, by torch's functions."""
    h = F.layer_norm(x, (_WIDTH,), weight, bias)
    q, k, v = (
        part.unflatten(-1, (_HEADS, -1)).transpose(1, 2) for part in F.linear(h, projection).chunk(3, -1)
    )
    a = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
    return x + F.linear(F.gelu(a), out).tanh()


def _written_out(x: Any, weight: Any, bias: Any, projection: Any, out: Any) -> Any:
    """The same in formulas."""
    centred = x - x.mean(-1, keepdim=True)
    h = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight + bias
    q, k, v = (part.unflatten(-1, (_HEADS, -1)).transpose(1, 2) for part in (h @ projection.mT).chunk(3, -1))
    later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device="cpu").triu(1)
    scores = (q @ k.mT / (_WIDTH // _HEADS) ** 0.5).masked_fill(later, float("-inf"))
    a = (scores.exp() / scores.exp().sum(-1, keepdim=True) @ v).transpose(1, 2).flatten(2)
    return x + ((a * 0.5 * (1 + (a / 2**0.5).erf())) @ out.mT).tanh()


def _by_dual(x: torch.Tensor, v: torch.Tensor, *weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    y = _block(dual(x, v), *weights)
    return y.primal, y.tangents


def _by_autograd(
    x: torch.Tensor, v: torch.Tensor, *weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tangents as the derivative of a gradient, which is linear in the cotangent u."""
    y = _written_out(x, *weights)
    u = torch.zeros_like(y, requires_grad=True)
    # sums, since `grad_outputs` would import SymPy, which takes a second
    (gradient,) = torch.autograd.grad((y * u).sum(), x, create_graph=True)
    tangents = [torch.autograd.grad((gradient * w).sum(), u, create_graph=True)[0] for w in v]
    return y, torch.stack(tangents)


def _results(
    function: Callable[..., tuple[torch.Tensor, torch.Tensor]], dtype: torch.dtype
) -> list[torch.Tensor]:
    """Value, tangents, and the gradients of a loss of both."""
    leaves = _leaves(dtype)
    y, tangents = function(*leaves)
    loss = tangents.square().sum() + (y * _waves(*y.shape, start=9).to(dtype)).sum()
    return [y, tangents, *torch.autograd.grad(loss, leaves)]


def _difference(function: Callable[..., tuple[torch.Tensor, torch.Tensor]]) -> float:
    """Largest relative error of a result."""
    worst = 0.0
    for got, expected in zip(_results(function, torch.float32), _results(_by_autograd, torch.float64)):
        error = (got.double() - expected).norm() / expected.norm()
        worst = max(worst, float(error.nan_to_num(float("inf"))))
    return worst


def _guards_hold() -> bool:
    """Whether an autograd Function raises on a Dual, also when it was bound before the first one."""
    x = dual(*(_waves(2, start=i) for i in range(2)))
    for apply in (_BOUND_FIRST, _Twice.apply):
        try:
            apply(x)
        except UnsupportedOperation:
            continue
        return False
    return True


@contextlib.contextmanager
def _as_if_fresh() -> Iterator[None]:
    with (
        paused(),
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast("cpu", enabled=False),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")  # torch.compile warns of its own doings, which may be an error here
        yield


def _fault(function: Callable[..., tuple[torch.Tensor, torch.Tensor]], guards: bool) -> str | None:
    """None where all is right, else the fault."""
    try:
        with _as_if_fresh():
            if guards and not _guards_hold():
                return "an autograd Function drops the gradient of a Dual"
            error = _difference(function)
    except Exception as exception:
        return f"it raised {type(exception).__name__}: {str(exception).splitlines()[0] if str(exception) else ''}"
    return None if error <= _TOLERANCE else f"results are wrong by {error:.0e} of their size"


def _message(fault: str, compiled: str = "") -> str:
    return (
        f"torch {torch.__version__} is untested and fails the check of{compiled} values and gradients ({fault}): "
        f"install a tested one ({torch_private.tested_range()})."
    )


def check() -> None:
    """On an untested torch: raise where values, gradients or guards are wrong, else warn.

    Raises:
        UnsupportedOperation: they are wrong.
    """
    if torch_private.is_tested():
        return
    faults: list[str | None] = []
    # a thread has no transforms, modes or autocast of the caller's
    thread = threading.Thread(target=lambda: faults.append(_fault(_by_dual, guards=True)))
    thread.start()
    thread.join()
    if faults[0] is not None:
        raise UnsupportedOperation(_message(faults[0]))
    warnings.warn(
        f"torch {torch.__version__} is untested ({torch_private.tested_range()} are); a check of values and gradients "
        "passed.",
        stacklevel=2,
    )


def check_compiled() -> str | None:
    """On an untested torch, while torch.compile traces: None where compiled gradients are right, else the message.

    Compiled by Dynamo's backend ``"eager"``: what traces Duals is Dynamo, and no other backend runs inside a trace.
    """
    if torch_private.is_tested():
        return None
    fault = _fault(torch.compile(_by_dual, backend="eager", fullgraph=True), guards=False)
    return None if fault is None else _message(fault, " compiled")


GUARDS.append(check)
COMPILED_GUARDS.append(check_compiled)
