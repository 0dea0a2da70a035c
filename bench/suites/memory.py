"""Suite `memory`: the peak memory of a penalty step, and the ways to bring it down; it runs when it is named.

The 4-layer Llama of suite `step`, forward and backward to every parameter, metric `l2`. Nothing is timed: a busy
machine does no harm. On a CPU glibc is set to give freed memory back at once, so that peaks are those of live tensors
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
import itertools
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..allocator import return_memory
from ..case import Case, Run, Selection, Suite
from . import step

LENGTHS = (1024, 2048, 4096, 8192, 16384)
#: bytes below which a tensor is not worth a file
SMALL = 1 << 20


#: variant -> its fields of a step's task
WAYS: dict[str, dict[str, Any]] = {
    "plain": {"kind": "plain"},
    "plain, checkpointed": {"kind": "plain", "checkpoint": True},
    "exact, fused": {"form": "fused"},
    "exact, recomputed": {"form": "fused", "recompute": True},
    "exact, checkpointed": {"form": "fused", "checkpoint": True},
    "exact, offloaded": {"form": "fused", "offload": True},
}


class Files(torch.autograd.graph.saved_tensors_hooks):
    """Context in which tensors that autograd saves wait in files of a folder; parameters stay.

    ``torch.autograd.graph.save_on_cpu`` is this for the memory of the host. Here the device is the host.

    Args:
        folder: where the files go.
        parameters: in memory in any case.
        small: tensors of fewer bytes stay.

    Attributes:
        written: bytes that went to files.
    """

    def __init__(self, folder: Path, parameters: Iterable[Tensor], small: int = SMALL) -> None:
        self.written = 0
        names = itertools.count()
        resident = {p.untyped_storage().data_ptr() for p in parameters}

        def pack(t: Tensor) -> Tensor | Path:
            if t.nbytes < small or t.untyped_storage().data_ptr() in resident:
                return t
            self.written += t.nbytes
            path = folder / str(next(names))
            whole = (
                t.untyped_storage().nbytes() == t.nbytes
            )  # else a view, whose other numbers are not wanted
            save_file({"t": t.detach().contiguous() if whole else t.detach().clone()}, path)
            return path

        super().__init__(
            pack, lambda packed: packed if isinstance(packed, Tensor) else load_file(packed)["t"]
        )

    def __enter__(self) -> Files:  # type: ignore[override]
        super().__enter__()
        return self


def cases(selection: Selection) -> list[Case]:
    if not selection.wants("llama"):
        return []
    return [_case(dtype, length, selection) for dtype, length in selection.grid(("float32",), LENGTHS)]


def _case(dtype: str, length: int, selection: Selection) -> Case:
    task = step.tasks(selection, model="llama", dtype=dtype)
    tasks = {name: task(**{"kind": "penalty", **fields}) for name, fields in WAYS.items()}
    variants = [step.variant(name, one, make) for name, one in tasks.items()]
    why = "peak memory of the exact step ÷ the plain step's"
    config = {"freed memory": "returned"} if selection.device == "cpu" else {}
    options = {"timed": False, "peak": True}
    case = step.step_case(
        "llama", "llama", dtype, length, selection, variants, ("plain",), why, config, **options
    )
    return dataclasses.replace(case, suite="memory")


def make(task: step.Task, length: int) -> Run:
    """A step in a process where, from now on, freed memory goes back to the system."""
    return_memory()
    return step.make(task, length, functools.partial(_offloaded, task))


@contextlib.contextmanager
def _offloaded(task: step.Task, parameters: list[nn.Parameter]) -> Iterator[None]:
    """Saved tensors wait in files, or in the memory of a device's host."""
    with contextlib.ExitStack() as stack:
        if task.offload and task.device == "cpu":
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            stack.enter_context(Files(Path(folder), parameters))
        elif task.offload:
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
