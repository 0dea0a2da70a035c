"""Suite `memory`: the peak memory of a penalty step, and the ways to bring it down; it runs when it is named.

The 4-layer Llama of suite `step`, forward and backward to every parameter, metric `l2`. Nothing is timed: a busy
machine does no harm. On a CPU glibc is told to give freed memory back at once, so that peaks are those of what is alive
and not of the holes in its heap.

======================  =============================================================================
variant                 kept between forward and backward
======================  =============================================================================
``plain``               Hugging Face's training step
``exact, fused``        the penalty after ``fuse(model)``
``recomputed``          the same after ``fuse(model, recompute=True)``
``checkpointed``        the inputs of the layers, which run again (also for the plain step)
``offloaded``           nothing above 1 MB: it waits in files, or in the memory of a device's host
======================  =============================================================================
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from aajr_kernels.integrations.transformers import fuse

from ..allocator import return_memory
from ..case import Case, Run, Selection, Suite, Variant, step_run
from . import models, step

LENGTHS = (1024, 2048, 4096, 8192, 16384)
#: bytes below which a tensor is not worth a file
SMALL = 1 << 20


@dataclasses.dataclass(frozen=True)
class Way:
    """How one variant keeps its memory down.

    Attributes:
        penalty: the exact penalty on a fused model; otherwise the plain step on the model as it comes.
        recompute, checkpoint, offload: as in the table above.
    """

    penalty: bool = True
    recompute: bool = False
    checkpoint: bool = False
    offload: bool = False


WAYS = {
    "plain": Way(penalty=False),
    "plain, checkpointed": Way(penalty=False, checkpoint=True),
    "exact, fused": Way(),
    "exact, recomputed": Way(recompute=True),
    "exact, checkpointed": Way(checkpoint=True),
    "exact, offloaded": Way(offload=True),
}


class Files(torch.autograd.graph.saved_tensors_hooks):
    """Context in which tensors that autograd saves wait in files of a folder, as bytes; parameters stay.

    ``torch.autograd.graph.save_on_cpu`` is this for the memory of the host. Here the device is the host.

    Args:
        folder: where the files go.
        parameters: in memory in any case.
        small: tensors of fewer bytes stay.

    Attributes:
        written: bytes that went to files.
    """

    def __init__(self, folder: Path, parameters: Iterable[Tensor], small: int = SMALL) -> None:
        self.folder, self.small, self.written, self._count = folder, small, 0, 0
        self._resident = {p.untyped_storage().data_ptr() for p in parameters}
        super().__init__(self._pack, self._unpack)

    def __enter__(self) -> Files:  # type: ignore[override]
        super().__enter__()
        return self

    def _pack(self, t: Tensor) -> Any:
        if t.nbytes < self.small or t.untyped_storage().data_ptr() in self._resident:
            return t
        path = self.folder / str(self._count)
        self._count += 1
        self.written += t.nbytes
        # with its strides, if its numbers lie side by side: kernels then see what they saw
        strides = t.stride()
        order = sorted(range(t.dim()), key=lambda axis: -strides[axis])
        dense = t.detach().permute(order).contiguous()
        dense.view(torch.uint8).numpy().tofile(path)
        return path, dense.shape, order, t.dtype

    def _unpack(self, packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        path, shape, order, dtype = packed
        size = torch.Size(shape).numel()
        # into memory of its own: pages of a mapped file would count as resident
        t = torch.empty(size * dtype.itemsize, dtype=torch.uint8)
        with path.open("rb") as file:
            file.readinto(t.numpy())
        inverse = [order.index(axis) for axis in range(len(order))]
        return t.view(dtype).view(shape).permute(inverse)


def cases(selection: Selection) -> list[Case]:
    if not selection.wants("llama"):
        return []
    return [_case(dtype, length, selection) for dtype, length in selection.grid(("float32",), LENGTHS)]


def _case(dtype: str, length: int, selection: Selection) -> Case:
    variants = [_variant(name, way, dtype, selection.device) for name, way in WAYS.items()]
    why = "peak memory of the exact step ÷ the plain step's"
    config = {"freed memory": "returned"} if selection.device == "cpu" else {}
    case = step.step_case(
        "llama", "llama", dtype, length, selection, variants, ("plain",), why, config, timed=False, peak=True
    )
    return dataclasses.replace(case, suite="memory")


def _variant(name: str, way: Way, dtype: str, device: str) -> Variant:
    task = step.Task("penalty" if way.penalty else "plain", "llama", dtype, device=device)
    truth = functools.partial(step.true_gradients, dataclasses.replace(task, device="cpu"))
    return Variant(name, functools.partial(make, way, task), truth, key=("memory", way, device))


def make(way: Way, task: step.Task, length: int) -> Run:
    """A step with its gradients in ``.grad``; from now on freed memory goes back to the system."""
    return_memory()
    model, _, x, v, labels = step.problem(task, length)
    if way.checkpoint:
        models.checkpoint(model)
    if way.penalty:
        fuse(model, recompute=way.recompute)
    parameters = list(model.parameters())
    scalar: Callable[[], Tensor] = lambda: step.loss(task, model, None, x, v, labels)
    return step_run(parameters, scalar, functools.partial(_offloaded, way.offload, task.device, parameters))


@contextlib.contextmanager
def _offloaded(active: bool, device: str, parameters: list[nn.Parameter]) -> Iterator[None]:
    """Saved tensors wait in files, or in the memory of a device's host."""
    with contextlib.ExitStack() as stack:
        if active and device == "cpu":
            stack.enter_context(Files(Path(stack.enter_context(tempfile.TemporaryDirectory())), parameters))
        elif active:
            stack.enter_context(torch.autograd.graph.save_on_cpu(pin_memory=True))
        yield


SUITE = Suite(
    "memory",
    "peak memory of the penalty step, and ways to bring it down (only when named)",
    ("llama",),
    cases,
    usual=False,
    parts=False,
)
