"""Many calls of ops as one step of autograd: what a call costs the host is paid once, not for every op.

:func:`in_one_step` runs code that is made of ops, their Functions' forwards as they are, and notes the calls. The
backward runs the Functions' backwards in reverse and adds the gradients of what several calls read. All that they save
goes through autograd's ``save_for_backward``: hooks on saved tensors and checks of versions see it.

Nothing may happen to a value that is not noted. An argument with numbers that neither was given nor came out of a noted
call is a value whose gradient would be lost, and raises :class:`Untaped`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..backends.errors import first_order
from .autograd import Function, taken_down

__all__ = ["Heads", "Joined", "Sum", "Turned", "Untaped", "in_one_step"]


class Untaped(Exception):
    """A value was computed by something else than an op; its message names the op that was given it."""


def in_one_step(body: Callable[[], Tensor], inputs: Sequence[Tensor]) -> Tensor:
    """``body()``, whose Functions become one step of autograd.

    Args:
        body: calls ops on `inputs`, and on what ops made of these; its result is one of an op.
        inputs: every tensor that a gradient may reach.

    Returns:
        The result. Values and gradients are those of ``body()`` itself.

    Raises:
        Untaped: `body` does something else; nothing has happened then.
    """
    result: Tensor = _Step.apply(body, *inputs)
    return result


class _Context:
    """In the place of autograd's, for one noted call."""

    def __init__(self, needs: tuple[bool, ...]) -> None:
        self.needs_input_grad, self.materializes = needs, True
        self.saved_tensors: tuple[Tensor | None, ...] = ()

    def set_materialize_grads(self, value: bool) -> None:
        self.materializes = value

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        self.saved_tensors = tensors


class _Tape:
    """Calls in order. Tensors have numbers, the inputs the first ones, and are kept as long as calls are noted."""

    def __init__(self, inputs: Sequence[Tensor], needs: Sequence[bool]) -> None:
        self.numbers = {id(x): number for number, x in enumerate(inputs)}
        self.tensors, self.needs, self.inputs = list(inputs), list(needs), len(inputs)
        #: Function, its context, numbers of arguments (-1: none) and results, places of what it saved
        self.calls: list[tuple[type[Function], _Context, list[int], list[int], list[int]]] = []

    def __call__(self, function: type[Function], args: tuple[Any, ...]) -> Any:
        """A call of a Function, noted if it has a backward."""
        numbers, tensors, needs = self.numbers, self.tensors, self.needs
        read = []
        for x in args:
            number = -1
            if isinstance(x, Tensor):
                number = numbers.get(id(x), -1)
                if number < 0 and (x.is_floating_point() or x.is_complex()):
                    raise Untaped(f"{function.__name__} was given a tensor that is no result of an op")
            read.append(number)
        context = _Context(tuple([number >= 0 and needs[number] for number in read]))
        before = taken_down(None)
        try:
            results = function.forward(context, *args)
        finally:
            taken_down(before)
        if context.materializes or hasattr(context, "result"):
            raise Untaped(
                f"{function.__name__} has gradients that are made, or results that are computed again"
            )
        needed = True in context.needs_input_grad
        made = []
        for y in results if isinstance(results, tuple) else (results,):
            if y is None:
                made.append(-1)
                continue
            made.append(len(tensors))
            numbers[id(y)] = len(tensors)
            tensors.append(y)
            needs.append(needed)
        if needed:
            self.calls.append((function, context, read, made, []))
        else:
            context.saved_tensors = ()
        return results

    def close(self, result: Tensor) -> list[Tensor]:
        """All that calls saved, each tensor once, when there are no more calls."""
        self.result = self.numbers.get(id(result), -1)
        if self.result < 0:
            raise Untaped("the result is none of an op")
        saved: dict[int, tuple[int, Tensor]] = {}
        for _, context, _, _, places in self.calls:
            for x in context.saved_tensors:
                places.append(-1 if x is None else saved.setdefault(id(x), (len(saved), x))[0])
            context.saved_tensors = ()
        # of the inputs autograd sees to it
        self.forms = [(x.shape, x.dtype) if i >= self.inputs else None for i, x in enumerate(self.tensors)]
        self.numbers, self.tensors = {}, []
        return [tensor for _, tensor in saved.values()]

    def backward(self, saved: Sequence[Tensor], bar: Tensor) -> list[Tensor | None]:
        """Gradients by number, from what was saved and that of the result."""
        needs, forms = self.needs, self.forms
        bars: list[Tensor | None] = [None] * len(needs)
        bars[self.result] = bar
        for function, context, read, made, places in reversed(self.calls):
            y_bars = []
            for number in made:
                y_bars.append(None if number < 0 else bars[number])
                if number >= 0:
                    bars[number] = None
            if all(y_bar is None for y_bar in y_bars):
                continue
            # a context of its own: a graph may run twice at once
            own = _Context(context.needs_input_grad)
            own.__dict__.update(context.__dict__)
            own.saved_tensors = tuple([None if place < 0 else saved[place] for place in places])
            x_bars = function.backward(own, *y_bars)
            for number, x_bar in zip(read, x_bars if isinstance(x_bars, tuple) else (x_bars,)):
                if x_bar is not None and number >= 0 and needs[number]:
                    form = forms[number]
                    if form is not None and (x_bar.shape, x_bar.dtype) != form:  # as autograd does
                        x_bar = x_bar.sum_to_size(form[0]).to(form[1])
                    other = bars[number]
                    bars[number] = x_bar if other is None else other + x_bar
        return bars


class _Step(Function):
    """A body, which is called without arguments, and its inputs to its result."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        body, *inputs = args
        ctx.set_materialize_grads(False)
        ctx.tape = tape = _Tape(inputs, ctx.needs_input_grad[1:])
        before = taken_down(tape)
        try:
            result: Tensor = body()
        finally:
            taken_down(before)
        ctx.save_for_backward(*tape.close(result))
        return result

    @staticmethod
    @first_order
    def backward(ctx: Any, bar: Tensor | None) -> tuple[Tensor | None, ...]:
        count = len(ctx.needs_input_grad) - 1
        if bar is None:
            return (None,) * (1 + count)
        return None, *ctx.tape.backward(ctx.saved_tensors, bar)[:count]


# -- what layers do between ops, as ops -------------------------------------------------------------------------------


class Heads(Function):
    """``[..., N, H D]`` to ``[..., N, H, D]``, or where it is `turned` to ``[..., H, N, D]``: a view."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, size: int, turned: bool) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.shape, ctx.turned = x.shape, turned
        y = x.view(*x.shape[:-1], -1, size)
        return y.transpose(-2, -3) if turned else y

    @staticmethod
    @first_order
    def backward(ctx: Any, y_bar: Tensor | None) -> tuple[Tensor | None, None, None]:
        if y_bar is not None:
            y_bar = (y_bar.transpose(-2, -3) if ctx.turned else y_bar).reshape(ctx.shape)
        return y_bar, None, None


class Turned(Function):
    """``[..., N, H, D]`` to ``[..., H, N, D]``: a view."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        return x.transpose(-2, -3)

    @staticmethod
    @first_order
    def backward(ctx: Any, y_bar: Tensor | None) -> Tensor | None:
        return None if y_bar is None else y_bar.transpose(-2, -3)


class Joined(Function):
    """``[..., H, N, D]`` to ``[..., N, H D]``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.size = x.shape[-1]
        return x.transpose(-2, -3).flatten(-2)

    @staticmethod
    @first_order
    def backward(ctx: Any, y_bar: Tensor | None) -> Tensor | None:
        return None if y_bar is None else y_bar.unflatten(-1, (-1, ctx.size)).transpose(-2, -3)


class Sum(Function):
    """Of two tensors of one shape and dtype."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        return torch.add(x, y)

    @staticmethod
    @first_order
    def backward(ctx: Any, bar: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        return bar, bar
