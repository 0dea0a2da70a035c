"""A whole step captured in one CUDA graph: replayed, it costs the host one call instead of one per kernel."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..autocast import autocasting
from ..backends import capture
from ..backends.errors import UnsupportedOperation
from ..torch_private import pytree
from .attack_state import modules_of

__all__ = ["Graphed", "graphed"]

#: calls before the capture: the first compiles kernels and checks values, the last reads none, as the capture will
WARM_UP = 3


class Graphed:
    """A captured step; see :func:`graphed`, which makes it.

    Attributes:
        inputs: the arguments of `step` in the memory that the graph reads.
        results: what `step` returned, in the memory that the graph writes.
        gradients: parameter -> its gradient, likewise.
    """

    def __init__(self, graph: Any, inputs: Any, results: Any, gradients: dict[nn.Parameter, Tensor]) -> None:
        self._graph, self.inputs, self.results, self.gradients = graph, inputs, results, gradients

    def __call__(self, *inputs: Any) -> Any:
        """Run the step on these inputs, like those it was captured with.

        Returns:
            The results, which the next call overwrites.

        Raises:
            ValueError: the inputs have another structure, or one of them another shape, dtype, device or value.
        """
        given, structure = pytree.tree_flatten(inputs)
        kept, expected = pytree.tree_flatten(self.inputs)
        if structure != expected:
            raise ValueError(f"inputs must have the structure of example, {expected}, got {structure}.")
        for new, old in zip(given, kept):
            _check_like(new, old)
        with torch.no_grad():
            for new, old in zip(given, kept):
                if isinstance(old, Tensor) and new is not old:
                    old.copy_(new)
        self._graph.replay()
        for parameter, gradient in self.gradients.items():
            parameter.grad = gradient
        return self.results


def graphed(
    step: Callable[..., Any],
    example: Sequence[Any],
    *,
    module: nn.Module | Iterable[nn.Module] | None = None,
) -> Graphed:
    """Capture a whole step in a CUDA graph: a function of the same arguments that replays it.

    A step is anything from inputs to results that reads no value on the host: a penalty and its backward, an attack
    with a given step size, the penalty along its trajectory and the backward. It runs three times, which compiles and
    checks kernels, and is captured once, on a stream of its own.

        def step(x, labels):
            traj = aajr.ascend(loss_fn(labels), x, radius=0.1, steps=3, step_size=0.05, module=model)
            penalty, _ = aajr.trajectory_penalty(policy, x, traj, head=model.lm_head)
            penalty.backward()
            return penalty

        replay = aajr.graphed(step, (x, labels), module=model)
        penalty = replay(x, labels)  # and the gradients are in .grad

    Parameters, buffers and whatever else `step` reaches are read where they were at the capture: optimizers that write
    in place go on as usual. Numbers of Python (λ, a radius, a learning rate) are part of the graph: pass those that
    change as tensors on the device. What checks values, such as labels out of range, a loss that is not finite and
    offsets of packed sequences, checks them in the warm-up. One graph is captured at a time.

    Args:
        step: of the tensors in `example`. It changes nothing but the gradients of `module`; it draws random numbers
            from the device's default generator, if at all, and none inside the `loss_fn` of an attack.
        example: its arguments, tensors on one CUDA device and trees of them, whose values the warm-up takes. Other
            values among them are constants.
        module: the model, or several, whose parameters get their gradients in ``.grad``, by ``backward()``. A call
            replaces ``.grad`` by the gradient of that call, it adds nothing to an earlier one.

    Returns:
        Graphed: called with arguments of the same shapes, dtypes and device it copies them, replays the step and
        returns its results, detached. They lie in the memory of the graph: the next call overwrites them, and the
        gradients, so clone what has to stay.

    Raises:
        TypeError: `module` is no module.
        ValueError: no example is a tensor, or one is not on the CUDA device of the first; autocast is on, whose casts
            of the parameters would be captured: enter it inside `step`.
        UnsupportedOperation: `step` uses a part of this package that reads values (see docs/triton.md).
        RuntimeError: `step` does something else that a graph cannot hold.
    """
    device = _device_of(example)
    if autocasting(device.type) and torch.is_autocast_cache_enabled():
        raise ValueError(
            "graphed was called under autocast, whose casts of parameters a graph would keep: enter autocast inside "
            "of step."
        )
    parameters = [p for one in modules_of(module) for p in one.parameters() if p.requires_grad]
    earlier = [p.grad for p in parameters]
    inputs = pytree.tree_map(_own, tuple(example))
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    try:
        # a backward runs on the streams of its forward, and adds to .grad on that of the first forward: one for all
        with torch.cuda.stream(stream), torch.random.fork_rng(devices=[device]):
            for call in range(WARM_UP):
                _forget(parameters)
                with capture.rehearsal() if call == WARM_UP - 1 else contextlib.nullcontext():
                    step(*inputs)
        _forget(parameters)
        results = _captured(graph, stream, step, inputs)
        gradients = {p: p.grad for p in parameters if p.grad is not None}
    finally:
        for p, gradient in zip(parameters, earlier):
            p.grad = gradient
        torch.cuda.current_stream(device).wait_stream(stream)
    results = pytree.tree_map(lambda x: x.detach() if isinstance(x, Tensor) else x, results)
    return Graphed(graph, inputs, results, gradients)


def _captured(graph: Any, stream: Any, step: Callable[..., Any], inputs: tuple[Any, ...]) -> Any:
    reason: Exception | None = None
    try:
        with torch.cuda.graph(graph, stream=stream):
            try:
                return step(*inputs)
            except Exception as error:
                reason = error  # the end of a capture that failed raises another one
                raise
    except Exception as error:
        reason = reason or error
        if isinstance(reason, UnsupportedOperation):
            raise reason from None
        raise RuntimeError(
            f"step cannot be captured ({str(reason).splitlines()[0]}): a CUDA graph can neither read a value on the "
            "host nor load a kernel that the warm-up did not use, see docs/triton.md."
        ) from reason


def _device_of(example: Sequence[Any]) -> torch.device:
    tensors = [leaf for leaf in pytree.tree_leaves(tuple(example)) if isinstance(leaf, Tensor)]
    if not tensors:
        raise ValueError("example must hold the tensors that step takes, got none.")
    for x in tensors:
        if x.device.type != "cuda" or x.device != tensors[0].device:
            raise ValueError(
                f"example must hold tensors on one CUDA device, got one on {x.device}: move it there."
            )
    return tensors[0].device


def _own(x: Any) -> Any:
    return x.detach().clone().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x


def _forget(parameters: list[nn.Parameter]) -> None:
    """Without a gradient to add to, a backward leaves its own, in memory that the graph keeps."""
    for p in parameters:
        p.grad = None


def _check_like(new: Any, old: Any) -> None:
    if isinstance(old, Tensor):
        if not isinstance(new, Tensor) or (new.shape, new.dtype, new.device) != (
            old.shape,
            old.dtype,
            old.device,
        ):
            got = type(new).__name__
            if isinstance(new, Tensor):
                got = f"{new.dtype} {tuple(new.shape)} on {new.device}"
            raise ValueError(
                f"inputs must be like those of the capture, {old.dtype} {tuple(old.shape)} on {old.device}, got {got}: "
                "capture a graph for every shape, or pad."
            )
    elif new is not old and new != old:
        raise ValueError(
            f"inputs other than tensors are part of the graph, {old!r}, got {new!r}: pass a tensor."
        )
