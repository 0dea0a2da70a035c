"""Random programs of torch functions: what a step may be, and how a program runs on tensors or Duals.

A step is the name of an operation and a few integers that choose operands, axes and indices, so that the same program
runs on plain tensors, under forward mode and on Duals. Values keep to a few dozen numbers of a size around one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F

LARGEST = 96

Step = tuple[str, tuple[int, ...]]
Operation = Callable[["Choice", Any], Any]


class Choice:
    """Answers of a step's integers, one after the other."""

    def __init__(self, integers: Sequence[int], values: Sequence[Any], parameters: Sequence[Any]) -> None:
        self._integers: Iterator[int] = iter([*integers, *16 * [0]])
        self.values, self.parameters = values, parameters

    def below(self, count: int) -> int:
        return next(self._integers) % max(count, 1)

    def axis(self, x: Any) -> int:
        return self.below(2 * x.dim()) - x.dim()  # counted from either end

    def flag(self) -> bool:
        return bool(self.below(2))

    def value(self) -> Any:
        return self.values[-1 - self.below(min(len(self.values), 4))]

    def like(self, x: Any) -> Any:
        """Another value, or a parameter, of a shape that goes with `x` by broadcasting."""
        other = self.value() if self.flag() else self.parameters[self.below(len(self.parameters))]
        return fitted(other, tuple(n if self.below(4) else 1 for n in x.shape))

    def weight(self, rows: int, cols: int) -> Any:
        """Numbers of the parameters as a matrix."""
        return fitted(self.parameters[self.below(len(self.parameters))], (rows, cols)) / max(cols, 1) ** 0.5


def fitted(x: Any, shape: tuple[int, ...]) -> Any:
    """The numbers of `x`, repeated or cut, in a shape."""
    count = 1
    for n in shape:
        count *= n
    flat = x.reshape(-1)
    times = -(-count // max(flat.shape[0], 1))
    return flat.repeat(times)[:count].reshape(shape)


def tame(x: Any) -> Any:
    """Of a size of a few ones."""
    return 2.0 * torch.tanh(x / 2.0)


def index_of(c: Choice, count: int) -> torch.Tensor:
    return torch.tensor([c.below(count) for _ in range(1 + c.below(3))])


def mask_of(c: Choice, x: Any) -> torch.Tensor:
    period, offset = 2 + c.below(3), c.below(3)
    return ((torch.arange(x.numel()) + offset) % period == 0).reshape(x.shape)


def heads_of(c: Choice, x: Any) -> Any:
    """``[1, H, N, D]`` of any numbers."""
    return fitted(x, (1, 2, 3, 4)) if c.flag() else fitted(x, (2, 1, 4, 3))


def _in_place(change: Callable[[Choice, Any], None]) -> Operation:
    """A copy, changed."""

    def operation(c: Choice, x: Any) -> Any:
        copy = x.clone()
        change(c, copy)
        return copy

    return operation


def _store(c: Choice, x: Any) -> None:
    axis = c.below(x.dim())
    place = (*axis * [slice(None)], c.below(x.shape[axis]))
    x[place] = fitted(c.value(), x[place].shape)


def _unary(name: str, function: Callable[[Any], Any]) -> tuple[str, Operation]:
    return name, lambda c, x: function(x)


_UNARY: dict[str, Callable[[Any], Any]] = {
    "sin": torch.sin,
    "cos": torch.cos,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "erf": torch.erf,
    "exp": lambda x: torch.exp(tame(x)),
    "expm1": lambda x: torch.expm1(tame(x)),
    "log1p": lambda x: torch.log1p(x * x),
    "sqrt": lambda x: torch.sqrt(x * x + 0.5),
    "rsqrt": lambda x: (x * x + 0.5).rsqrt(),
    "reciprocal": lambda x: 1.0 / (x * x + 1.0),
    "square": lambda x: tame(x).square(),
    "power": lambda x: tame(x) ** 3,
    "softplus": F.softplus,
    "gelu": F.gelu,
    "gelu tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "mish": F.mish,
    "elu": F.elu,
    "leaky_relu": F.leaky_relu,
    "relu": F.relu,
    "hardtanh": lambda x: torch.clamp(x, -0.7, 0.9),
    "logsigmoid": F.logsigmoid,
    "atan": torch.atan,
    "asinh": torch.asinh,
    "negative": lambda x: -x,
    "from a number": lambda x: 0.3 - x,
    "float_power": lambda x: torch.float_power(tame(x), 2),
    "contiguous": lambda x: x.contiguous(),
}

_BINARY: dict[str, Callable[[Any, Any], Any]] = {
    "add": lambda x, y: x + y,
    "add alpha": lambda x, y: torch.add(x, y, alpha=0.7),
    "sub": lambda x, y: x - y,
    "rsub": lambda x, y: torch.rsub(x, y),
    "mul": lambda x, y: tame(x) * y,
    "div": lambda x, y: x / (y * y + 1.0),
    "maximum": torch.maximum,
    "minimum": torch.minimum,
    "lerp": lambda x, y: torch.lerp(x, fitted(y, tuple(x.shape)), 0.3),
    "lerp tensor": lambda x, y: torch.lerp(
        x, fitted(x, tuple(x.shape)), torch.sigmoid(fitted(y, tuple(x.shape)))
    ),
    "atan2": lambda x, y: torch.atan2(x, y * y + 0.5),
    "hypot": lambda x, y: torch.hypot(x, y * y + 0.5),
    "logaddexp": torch.logaddexp,
    "addcmul": lambda x, y: torch.addcmul(x, tame(x), y, value=0.5),
    "addcdiv": lambda x, y: torch.addcdiv(x, x, y * y + 1.0, value=0.5),
    "where": lambda x, y: torch.where(x > 0.1, x, y),
    "smooth_l1": lambda x, y: F.smooth_l1_loss(x, fitted(y, tuple(x.shape)), reduction="none"),
    "mse": lambda x, y: F.mse_loss(tame(x), fitted(y, tuple(x.shape)), reduction="none"),
    "xlogy": lambda x, y: torch.special.xlogy(x, y * y + 0.5),
}

_BY_AXIS: dict[str, Callable[[Any, int, bool], Any]] = {
    "sum": lambda x, axis, keep: x.sum(axis, keepdim=keep),
    "mean": lambda x, axis, keep: x.mean(axis, keepdim=keep),
    "amax": lambda x, axis, keep: x.amax(axis, keepdim=keep),
    "max": lambda x, axis, keep: x.max(axis, keepdim=keep).values,
    "logsumexp": lambda x, axis, keep: x.logsumexp(axis, keepdim=keep),
    "var": lambda x, axis, keep: x.var(axis, correction=0, keepdim=keep),
    "norm": lambda x, axis, keep: torch.linalg.vector_norm(torch.cosh(tame(x)), 2, axis, keepdim=keep),
    "prod": lambda x, axis, keep: torch.prod(tame(x), axis, keepdim=keep),
    "softmax": lambda x, axis, keep: x.softmax(axis),
    "log_softmax": lambda x, axis, keep: F.log_softmax(x, axis),
    "cumsum": lambda x, axis, keep: x.cumsum(axis),
    "logcumsumexp": lambda x, axis, keep: x.logcumsumexp(axis),
    "flip": lambda x, axis, keep: x.flip(axis),
    "roll": lambda x, axis, keep: x.roll(1, axis),
    "sort": lambda x, axis, keep: x.sort(dim=axis, stable=True).values,
    "unsqueeze": lambda x, axis, keep: x.unsqueeze(axis),
    "squeeze": lambda x, axis, keep: x.squeeze(axis),
    "unbind": lambda x, axis, keep: torch.stack(x.unbind(axis)[::-1], 0),
    "chunk": lambda x, axis, keep: torch.cat(x.chunk(2, axis)[::-1], axis),
    "split": lambda x, axis, keep: torch.cat([tame(p) for p in x.split(2, axis)], axis),
    "normalize": lambda x, axis, keep: F.normalize(torch.cosh(tame(x)), dim=axis),
    "repeat_interleave": lambda x, axis, keep: x.repeat_interleave(2, axis),
    "diff": lambda x, axis, keep: torch.cat([x.narrow(axis, 0, 1), x.diff(dim=axis)], axis),
}

OPERATIONS: dict[str, Operation] = {
    **dict(_unary(name, function) for name, function in _UNARY.items()),
    **{name: (lambda c, x, f=f: f(x, c.like(x))) for name, f in _BINARY.items()},
    **{name: (lambda c, x, f=f: f(x, c.axis(x), c.flag())) for name, f in _BY_AXIS.items()},
    # shapes
    "transpose": lambda c, x: x.transpose(c.axis(x), c.axis(x)),
    "permute": lambda c, x: x.permute(*reversed(range(x.dim()))),
    "movedim": lambda c, x: x.movedim(c.axis(x), c.axis(x)),
    "flatten": lambda c, x: x.flatten(c.below(x.dim())),
    "reshape": lambda c, x: x.reshape(-1, x.shape[-1]) if c.flag() else x.reshape(x.shape[0], -1),
    "unflatten": lambda c, x: x.unflatten(-1, (-1, 2)) if x.shape[-1] % 2 == 0 else x,
    "expand": lambda c, x: x.unsqueeze(0).expand(2, *x.shape),
    "repeat": lambda c, x: x.repeat(2, *(1,) * (x.dim() - 1)),
    "broadcast_to": lambda c, x: torch.broadcast_to(x, (1, *x.shape)),
    "narrow": lambda c, x: x.narrow(a := c.below(x.dim()), c.below(x.shape[a]), 1),
    "slice": lambda c, x: x[..., c.below(2) :: 1 + c.below(2)] if x.shape[-1] > 1 else x,
    "select": lambda c, x: x.select(a := c.below(x.dim()), c.below(x.shape[a])),
    "cat": lambda c, x: torch.cat([x, fitted(c.value(), tuple(x.shape))], c.axis(x)),
    "stack": lambda c, x: torch.stack([x, fitted(c.value(), tuple(x.shape))], c.below(x.dim() + 1)),
    "pad": lambda c, x: F.pad(x, (c.below(3), c.below(3)), value=0.4),
    "diagonal": lambda c, x: torch.diagonal(x, c.below(2), -2, -1) if x.dim() > 1 and x.shape[-1] > 1 else x,
    "tril": lambda c, x: x.tril(c.below(2)) if x.dim() > 1 else x,
    "unfold": lambda c, x: x.unfold(-1, 2, 1) if x.shape[-1] > 1 else x,
    "T": lambda c, x: x.mT if x.dim() > 1 else x,
    # indices and masks
    "index_select": lambda c, x: x.index_select(a := c.below(x.dim()), index_of(c, x.shape[a])),
    "index": lambda c, x: x[index_of(c, x.shape[0])],
    "gather": lambda c, x: x.gather(-1, torch.zeros(x.shape, dtype=torch.long) + c.below(x.shape[-1])),
    "masked_fill": lambda c, x: x.masked_fill(mask_of(c, x), 0.6),
    "where mask": lambda c, x: torch.where(mask_of(c, x), x, fitted(c.value(), tuple(x.shape))),
    "masked_select": lambda c, x: x.masked_select(mask_of(c, x)),
    "index_add": lambda c, x: x.index_add(
        0, torch.zeros(1, dtype=torch.long), fitted(c.value(), (1, *x.shape[1:]))
    ),
    "scatter_add": lambda c, x: x.scatter_add(
        -1, torch.zeros(x.shape, dtype=torch.long) + c.below(x.shape[-1]), fitted(c.value(), tuple(x.shape))
    ),
    "take_along_dim": lambda c, x: torch.take_along_dim(x, x.detach().argsort(-1), -1),
    # products
    "linear": lambda c, x: F.linear(
        tame(x), c.weight(rows := 1 + c.below(6), x.shape[-1]), c.weight(1, rows)[0]
    ),
    "matmul": lambda c, x: tame(x) @ c.weight(x.shape[-1], 1 + c.below(5)),
    "rmatmul": lambda c, x: c.weight(1 + c.below(4), x.shape[-2]) @ tame(x) if x.dim() > 1 else x,
    "self product": lambda c, x: tame(x) @ tame(x).mT / x.shape[-1] if x.dim() > 1 else tame(x) @ tame(x),
    "einsum": lambda c, x: torch.einsum("...i,...j->...ij", tame(x), tame(x)) if x.shape[-1] < 5 else x,
    "einsum weight": lambda c, x: torch.einsum("...i,ij->...j", tame(x), c.weight(x.shape[-1], 3)),
    "outer": lambda c, x: torch.outer(tame(x).flatten()[:5], fitted(c.value(), (4,))),
    "baddbmm": lambda c, x: torch.baddbmm(
        fitted(x, (2, 3, 4)), fitted(tame(c.value()), (2, 3, 2)), fitted(x, (2, 2, 4)), beta=0.6, alpha=0.3
    ),
    "bilinear": lambda c, x: F.bilinear(
        fitted(x, (3, 2)), fitted(tame(c.value()), (3, 4)), c.weight(5 * 2, 4).reshape(5, 2, 4)
    ),
    # layers
    "layer_norm": lambda c, x: F.layer_norm(x, x.shape[-1:], c.weight(1, x.shape[-1])[0], None, 0.1),
    "rms_norm": lambda c, x: F.rms_norm(x, x.shape[-1:], c.weight(1, x.shape[-1])[0], 0.1),
    "group_norm": lambda c, x: F.group_norm(
        fitted(x, (2, 4, 3)), 2, c.weight(1, 4)[0], c.weight(1, 4)[0], 0.1
    ),
    "attention": lambda c, x: F.scaled_dot_product_attention(
        q := heads_of(c, x), fitted(tame(c.value()), tuple(q.shape)), q, is_causal=c.flag()
    ),
    "conv1d": lambda c, x: F.conv1d(
        fitted(x, (2, 3, 6)), c.weight(2, 9).reshape(2, 3, 3), padding=c.below(2)
    ),
    "glu": lambda c, x: F.glu(x, -1) if x.shape[-1] % 2 == 0 else x,
    "cross_entropy": lambda c, x: F.cross_entropy(
        fitted(x, (4, 5)),
        torch.tensor([0, 3, -100, c.below(5)]),
        reduction="none",
        label_smoothing=0.1 * c.below(2),
    ),
    "kl_div": lambda c, x: F.kl_div(
        x.log_softmax(-1), fitted(c.value(), tuple(x.shape)).softmax(-1), reduction="none"
    ),
    "cosine_similarity": lambda c, x: F.cosine_similarity(
        torch.cosh(tame(x)), fitted(c.value(), tuple(x.shape)) ** 2 + 1, -1
    ),
    "avg_pool1d": lambda c, x: F.avg_pool1d(fitted(x, (1, 2, 6)), 2),
    "interpolate": lambda c, x: F.interpolate(fitted(x, (1, 2, 4)), scale_factor=2, mode="linear"),
    # in place, and casts
    "add_": _in_place(lambda c, x: x.add_(fitted(c.value(), tuple(x.shape)), alpha=0.5)),
    "mul_": _in_place(lambda c, x: x.mul_(torch.sigmoid(fitted(c.value(), tuple(x.shape))))),
    "masked_fill_": _in_place(lambda c, x: x.masked_fill_(mask_of(c, x), 0.3)),
    "copy_": _in_place(lambda c, x: x.copy_(tame(fitted(c.value(), tuple(x.shape))))),
    "clamp_": _in_place(lambda c, x: x.clamp_(max=0.8)),
    "setitem": _in_place(_store),
    "iadd slice": _in_place(lambda c, x: x[..., :1].add_(0.5 * fitted(c.value(), (*x.shape[:-1], 1)))),
    "to": lambda c, x: x.to(torch.float64).double(),
    "complex": lambda c, x: torch.fft.irfft(
        torch.fft.rfft(x.reshape(-1)[:6], norm="ortho"), n=6, norm="ortho"
    ),
}


def run(program: Sequence[Step], x: Any, parameters: Sequence[Any]) -> Any:
    """All numbers of the last values, in one axis."""
    values = [x]
    for step in program:
        values.append(_applied(step, values, parameters))
    return torch.cat([torch.tanh(value.reshape(-1)) for value in values[-3:]])


def accepted(program: Sequence[Step], x: torch.Tensor, parameters: Sequence[torch.Tensor]) -> list[Step]:
    """The steps that torch takes on plain tensors."""
    values, steps = [x], []
    for step in program:
        try:
            values.append(_applied(step, values, parameters))
        except (RuntimeError, IndexError, ValueError, TypeError):
            continue
        steps.append(step)
    return steps


def _applied(step: Step, values: Sequence[Any], parameters: Sequence[Any]) -> Any:
    name, integers = step
    choice = Choice(integers, values, parameters)
    operand = choice.value()
    y = OPERATIONS[name](choice, operand if operand.dim() else operand.reshape(1))
    if y.numel() > LARGEST:
        y = fitted(y, (2, 3, 4))
    return y if y.numel() else operand
