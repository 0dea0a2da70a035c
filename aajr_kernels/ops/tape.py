"""Many calls of ops as one step of autograd: what a call costs the host is paid once, not for every op.

:func:`in_one_step` runs code that is made of ops, their Functions' forwards as they are, and notes the calls. The
backward runs the Functions' backwards in reverse and adds the gradients of what several calls read. All that they save
goes through autograd's ``save_for_backward``: hooks on saved tensors and checks of versions see it.

Nothing may happen to a value that is not noted. An argument with numbers that neither was given nor came out of a noted
call is a value whose gradient would be lost, and raises :class:`Untaped`.

What was noted is a :class:`Program`. Given again what its calls depend on, only these are repeated, without the checks
of the ops, their choice of backend and the code around them.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import sharding
from ..autocast import autocasting
from ..backends import choice, selfcheck
from ..backends.errors import first_order
from ..backends.triton import launch as gpu
from ..coverage import recording
from ..recompute import is_recomputed
from ..torch_private import has_dispatch_modes, transforms_active
from .autograd import Function, taken_down

__all__ = ["Programs", "Untaped", "in_one_step", "is_undisturbed"]


class Untaped(Exception):
    """A value was computed by something else than an op; its message names the op that was given it."""


def is_undisturbed(device_type: str) -> bool:
    """Whether ops do now what they do by themselves, and nothing watches them.

    False under autocast, ``recompute``, :func:`aajr_kernels.coverage`, frozen parameters, transforms and modes of
    torch's dispatcher, and without gradients.
    """
    return torch.is_grad_enabled() and not (
        torch.compiler.is_compiling()
        or has_dispatch_modes()
        or transforms_active()
        or recording()
        or autocasting(device_type)
        or sharding.frozen()
        or is_recomputed("norms")
        or is_recomputed("activations")
    )


def in_one_step(
    body: Callable[[], Tensor],
    inputs: Sequence[Tensor],
    programs: Programs | None = None,
    key: Hashable = None,
) -> Tensor:
    """``body()``, whose Functions become one step of autograd, while :func:`is_undisturbed`.

    Args:
        body: calls ops on `inputs`, and on what ops made of these; its result is one of an op.
        inputs: every tensor that a gradient may reach, and masks.
        programs: what bodies called, kept here for a later call.
        key: all that calls of the `body` depend on, but for forms of `inputs`, devices and the choice of a backend.

    Returns:
        The result. Values and gradients are those of ``body()`` itself.

    Raises:
        Untaped: `body` does something else; nothing has happened then.
    """
    result: Tensor = _Step.apply(body, {} if programs is None else programs, key, *inputs)
    return result


class _Context:
    """In the place of autograd's, for one noted call."""

    materializes = True
    saved_tensors: tuple[Tensor | None, ...] = ()

    def __init__(self, needs: tuple[bool, ...]) -> None:
        self.needs_input_grad = needs

    def set_materialize_grads(self, value: bool) -> None:
        self.materializes = value

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        self.saved_tensors = tensors


class _Call(NamedTuple):
    """A Function, the numbers of its arguments and results, which arguments need a gradient, and whether one does."""

    function: type[Function]
    read: list[int]
    made: list[int]
    needs: tuple[bool, ...]
    needed: bool


class _View(NamedTuple):
    """A tensor without gradient that is a view of an input."""

    number: int
    source: int
    size: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int


@dataclass
class Program:
    """The calls of a body. Values have numbers, the inputs the first ones, then in the order in which they came.

    Attributes:
        calls: in order.
        memory: values by number, None in the place of tensors.
        views: those among the values.
        result: number of the result.
        forms: shape and dtype of what a call made, by number; None of other values.
        repeats: whether the calls would be the same again: all other values are constants or views of inputs.
    """

    calls: list[_Call]
    memory: list[Any]
    views: list[_View]
    result: int
    forms: list[tuple[torch.Size, torch.dtype] | None]
    repeats: bool

    def run(self, inputs: Sequence[Tensor]) -> tuple[Tensor, list[_Context]]:
        """The result of the calls, and their contexts."""
        memory, contexts = self.memory.copy(), []
        memory[: len(inputs)] = inputs
        for number, source, size, strides, offset in self.views:
            x = memory[source]
            memory[number] = x.as_strided(size, strides, x.storage_offset() + offset)
        for function, read, made, needs, _ in self.calls:
            context = _Context(needs)
            results = function.forward(context, *[memory[number] for number in read])
            if type(results) is tuple:
                for number, y in zip(made, results):
                    memory[number] = y
            else:
                memory[made[0]] = results
            contexts.append(context)
        return memory[self.result], contexts

    def saved(self, contexts: list[_Context]) -> tuple[list[Tensor], list[list[int]]]:
        """All that contexts saved, each tensor once, and its places by context; contexts keep nothing."""
        tensors: list[Tensor] = []
        known: dict[int, int] = {}
        places = []
        for call, context in zip(self.calls, contexts):
            own = []
            for x in context.saved_tensors if call.needed else ():
                place = -1
                if x is not None and (place := known.get(id(x), -1)) < 0:
                    place = known[id(x)] = len(tensors)
                    tensors.append(x)
                own.append(place)
            places.append(own)
            context.saved_tensors = ()
        return tensors, places

    def backward(
        self, contexts: list[_Context], places: list[list[int]], saved: Sequence[Tensor], bar: Tensor
    ) -> list[Tensor | None]:
        """Gradients by number, from what was saved and that of the result."""
        forms = self.forms
        bars: list[Tensor | None] = [None] * len(forms)
        bars[self.result] = bar
        for i in range(len(contexts) - 1, -1, -1):
            function, read, made, needs, needed = self.calls[i]
            if not needed:
                continue
            y_bars, reached = [], False
            for number in made:
                y_bar, bars[number] = bars[number], None
                y_bars.append(y_bar)
                reached |= y_bar is not None
            if not reached:
                continue
            # a context of its own: a graph may run twice at once
            context = _Context(needs)
            context.__dict__.update(contexts[i].__dict__)
            context.saved_tensors = tuple([None if place < 0 else saved[place] for place in places[i]])
            x_bars = function.backward(context, *y_bars)
            for number, need, x_bar in zip(read, needs, x_bars if type(x_bars) is tuple else (x_bars,)):
                if x_bar is not None and need:
                    form = forms[number]  # of the inputs autograd sees to it
                    if form is not None and (x_bar.shape != form[0] or x_bar.dtype != form[1]):
                        x_bar = x_bar.sum_to_size(form[0]).to(form[1])
                    other = bars[number]
                    bars[number] = x_bar if other is None else other + x_bar
        return bars


#: signatures -> programs
Programs = dict[Hashable, Program]
#: programs that are kept for a body; after as many all are noted anew
LIMIT = 256
_CONSTANTS = {type(None), bool, int, float, str, torch.dtype}
_FORM = attrgetter("shape", "dtype", "device")


class _Tape:
    """Takes calls down in the place of autograd. Tensors are kept as long as calls are noted: ids tell them apart."""

    def __init__(self, inputs: Sequence[Tensor], needs: Sequence[bool]) -> None:
        self.inputs, self.needs, self.memory = inputs, list(needs), list[Any](inputs)
        self.numbers = {id(x): number for number, x in enumerate(inputs)}
        self.calls: list[_Call] = []
        self.contexts: list[_Context] = []
        self.views: list[_View] = []
        self.repeats = True

    def __call__(self, function: type[Function], args: tuple[Any, ...]) -> Any:
        read = [self._number(function, x) for x in args]
        needs = tuple([self.needs[number] for number in read])
        context, before = _Context(needs), taken_down(None)
        try:
            results = function.forward(context, *args)
        finally:
            taken_down(before)
        if context.materializes or hasattr(context, "result"):
            raise Untaped(
                f"{function.__name__} has gradients that are made, or results that are computed again"
            )
        needed = True in needs
        made = [
            self._add(y, needed and y is not None)
            for y in (results if type(results) is tuple else (results,))
        ]
        self.calls.append(_Call(function, read, made, needs, needed))
        self.contexts.append(context)
        return results

    def _add(self, value: Any, needed: bool = False) -> int:
        number = len(self.memory)
        self.memory.append(value)
        self.needs.append(needed)
        if isinstance(value, Tensor):
            self.numbers[id(value)] = number
        return number

    def _number(self, function: type[Function], x: Any) -> int:
        if not isinstance(x, Tensor):
            self.repeats &= _is_constant(x)
            return self._add(x)
        number = self.numbers.get(id(x))
        if number is None:
            if x.is_floating_point() or x.is_complex():
                raise Untaped(f"{function.__name__} was given a tensor that is no result of an op")
            number = self._add(x)
            sources = [
                i for i, y in enumerate(self.inputs) if y.dtype == x.dtype and _storage(y) == _storage(x)
            ]
            for i in sources[:1]:
                offset = int(x.storage_offset() - self.inputs[i].storage_offset())
                self.views.append(_View(number, i, tuple(x.shape), x.stride(), offset))
            self.repeats &= bool(sources)
        return number

    def program(self, result: Tensor) -> Program:
        """When there are no more calls."""
        number = self.numbers.get(id(result))
        if number is None:
            raise Untaped("the result is none of an op")
        made = {i for call in self.calls for i in call.made if self.memory[i] is not None}
        forms = [(x.shape, x.dtype) if i in made else None for i, x in enumerate(self.memory)]
        memory = [None if isinstance(x, Tensor) else x for x in self.memory]
        return Program(self.calls, memory, self.views, number, forms, self.repeats)


def _is_constant(x: Any) -> bool:
    return type(x) in _CONSTANTS or (isinstance(x, tuple) and all(map(_is_constant, x)))


def _storage(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


def _signature(key: Hashable, needs: tuple[bool, ...], inputs: Sequence[Tensor]) -> Hashable | None:
    """Equal for calls that one program serves; None where that cannot be said."""
    # a tensor given twice could be two the next time
    if len({*map(id, inputs)}) < len(inputs):
        return None
    forms = (*map(type, inputs), *map(_FORM, inputs), *map(Tensor.stride, inputs))
    return key, gpu.state(), choice.current_backend(), selfcheck.mode, needs, forms


class _Step(Function):
    """A body, which is called without arguments, programs, a key and inputs to the body's result."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        body, programs, key, *inputs = args
        needs = ctx.needs_input_grad[3:]
        ctx.set_materialize_grads(False)
        signature = _signature(key, needs, inputs)
        program = programs.get(signature)
        if program is None:
            tape, unchecked = _Tape(inputs, needs), selfcheck.left_out
            before = taken_down(tape)
            try:
                result = body()
            finally:
                taken_down(before)
            program, contexts = tape.program(result), tape.contexts
            if signature is not None and program.repeats and selfcheck.left_out == unchecked:
                if len(programs) >= LIMIT:
                    programs.clear()
                programs[signature] = program
        else:
            result, contexts = program.run(inputs)
        saved, ctx.places = program.saved(contexts)
        ctx.program, ctx.contexts = program, contexts
        ctx.save_for_backward(*saved)
        return result

    @staticmethod
    @first_order
    def backward(ctx: Any, bar: Tensor | None) -> tuple[Tensor | None, ...]:
        count = len(ctx.needs_input_grad)
        if bar is None:
            return (None,) * count
        bars = ctx.program.backward(ctx.contexts, ctx.places, ctx.saved_tensors, bar)
        return None, None, None, *bars[: count - 3]
