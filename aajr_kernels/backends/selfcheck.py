"""First use: kernels of a device are compared with the reference before anything depends on them.

Before the first launch of a kind (op, backend, dtypes, sizes of features, options) on a device, a small problem of that
kind (``trial`` in ``ops/<op>/function.py``) is computed by the kernels and by the reference: outputs and all gradients,
then the gradient of the first operand only, whose backward is another kernel in places. Where they differ, do not
compile or fault, ``auto`` takes the reference and says so once; a backend chosen by name raises. Results are kept on
disk (:mod:`.selfcheck_record`).

The comparison runs in a thread of its own, which starts without grad modes, hooks of saved tensors, autocast, function
modes or transforms of the caller. It is left out, and made up for later, while a CUDA graph is captured, inside a
backward, and where memory runs out. ``AAJR_SELFCHECK=0``, read at import, turns it off; ``1`` has it in Triton's
interpreter too.
"""

from __future__ import annotations

import contextlib
import importlib
import math
import os
import threading
import time
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import torch

from ..torch_private import in_backward
from . import capture
from .errors import BackendUnavailable
from .operator import constant
from .selfcheck_record import Record, record_of
from .triton.launch import float32_products

__all__ = ["BACKENDS", "Draw", "Kind", "Trial", "admit", "checked_backend", "cotangent", "difference"]

#: the backends that are checked
BACKENDS = ("triton", "cuda")
#: ops whose Triton kernels form products
_OF_PRODUCTS = ("attention", "head")
#: an error may be so many times that of the reference in the same dtype, plus so many units in the last place
FACTOR, ULPS = 4.0, 8.0
#: smallest gradient that its error is relative to, as a share of the typical one of its kind
FLOOR = 1e-2

mode = os.environ.get("AAJR_SELFCHECK", "")

#: ``draw(dtype, *shape)``: normal numbers on the device, or None for the dtype None
Draw: TypeAlias = Callable[..., Any]
#: operands by name, None where the call has none, and what computes their outputs on a backend
Trial: TypeAlias = tuple[dict[str, "torch.Tensor | None"], Callable[..., Any]]


class Kind(NamedTuple):
    """Everything that calls of one trial have in common.

    Attributes:
        op: package under ``ops``.
        name: of the operation, as coverage reports it.
        dtypes: of the operands, None for those that the call lacks.
        sizes: those that decide on kernels; empty while torch.compile traces: the trial has its own.
        features: options that decide on kernels.
        products: how the Triton kernels form products of float32, which torch's settings decide too.
    """

    op: str
    name: str
    backend: str
    device: torch.device
    dtypes: tuple[torch.dtype | None, ...]
    sizes: tuple[int, ...]
    features: tuple[Any, ...]
    products: str = "ieee"

    def __str__(self) -> str:
        dtypes = ",".join("-" if d is None else str(d).removeprefix("torch.") for d in self.dtypes)
        products = "" if self.products == "ieee" else f" products={self.products}"
        return f"{self.backend} {self.name} {dtypes} sizes={self.sizes} options={self.features}{products}"


_passed: set[tuple[Any, ...]] = set()
_refused: dict[tuple[Any, ...], str] = {}
_lock = threading.Lock()
#: calls that went unchecked: a decision of theirs is not to be kept
left_out = 0


def checked_backend(
    op: str,
    name: str,
    backend: str,
    named: bool,
    operands: tuple[torch.Tensor | None, ...],
    kind: Callable[..., tuple[tuple[int, ...], tuple[Any, ...]]],
) -> str:
    """The backend of a call whose choice is one of :data:`BACKENDS`: that one, or the reference.

    Args:
        op: package under ``ops``.
        name: of the operation.
        backend: the choice.
        named: whether the user chose it by name.
        operands: of the call; the first is a tensor.
        kind: from the operands to `sizes` and `features` of :class:`Kind`.

    Raises:
        BackendUnavailable: the check failed, and the backend was chosen by name.
    """
    first = operands[0]
    assert first is not None  # the op's input
    if mode == "0" or not (first.is_cuda or (mode == "1" and first.is_cpu)):
        return backend
    dtypes = tuple([None if t is None else t.dtype for t in operands])
    sizes, features = kind(*operands)
    products = float32_products(first) if op in _OF_PRODUCTS and backend == "triton" else "ieee"
    if torch.compiler.is_compiling():  # sizes may be symbols
        return admit(named, op, name, backend, first.device, dtypes, (), features, products)
    call = (op, name, backend, first.device, dtypes, sizes, features, products)
    return backend if call in _passed else admit(named, *call)


@constant
def admit(named: bool, *call: Any) -> str:
    """The backend of a :class:`Kind` after its check, or the reference."""
    global left_out
    kind = Kind(*call)
    with _lock:
        if kind not in _passed and kind not in _refused:
            if not in_backward() and not capture.is_capturing(kind.device):
                _decide(kind, named)
            left_out += kind not in _passed and kind not in _refused
    if kind not in _refused:
        return kind.backend
    if named:
        raise BackendUnavailable(f"{_refused[kind]} Choose the backend 'auto', which takes the reference.")
    return "reference"


def _decide(kind: Kind, named: bool) -> None:
    """Look the kind up on disk, or check it; puts it into `_passed` or `_refused`, or into neither."""
    if 0 in kind.sizes:  # nothing is launched
        _passed.add(kind)
        return
    record = record_of(kind.device)
    known = record.outcome(str(kind))
    if known is None:
        known = _checked(kind, record)
    if known is None:
        return
    if known == "":
        _passed.add(kind)
        return
    _refused[kind] = (
        f"{kind.name}: the {kind.backend} kernels failed their first-use check on {record.device} ({kind}): {known}. "
        "Please report this sentence with the output of `aajr info`; AAJR_SELFCHECK=0 leaves the check out."
    )
    if not named:
        warnings.warn(f"{_refused[kind]} The reference runs instead.", RuntimeWarning, stacklevel=2)


def _checked(kind: Kind, record: Record) -> str | None:
    """Empty where the kernels agree with the reference, else the reason; None where the check cannot be made now."""
    reason: list[str | None] = ["the check was interrupted"]
    start = time.perf_counter()
    record.begin(str(kind))  # a process that does not survive the check leaves this behind

    def check() -> None:
        try:
            # the third call of a launcher is the first that is replayed
            share, text = difference(kind, repeats=3 if kind.device.type == "cuda" else 1)
            reason[0] = "" if share <= 1.0 else text
        except torch.OutOfMemoryError:
            reason[0] = None
        except Exception as error:  # of a compiler, a launch or the device
            text = str(error).strip().split("\n")[0]
            reason[0] = f"{type(error).__name__}: {text}"

    thread = threading.Thread(target=check, name="aajr_kernels.selfcheck")
    thread.start()
    try:
        thread.join()
    except BaseException:
        record.end(str(kind), None)
        raise
    record.end(str(kind), reason[0], time.perf_counter() - start)
    if reason[0] and kind.device.type == "cuda":
        try:
            torch.cuda.synchronize(kind.device)
        except RuntimeError as error:
            raise RuntimeError(
                f"{kind.name}: the {kind.backend} kernels faulted in their first-use check ({kind}: {reason[0]}), and "
                "with them the device is lost to this process: start it again, the reference will run instead; please "
                "report this sentence."
            ) from error
    return reason[0]


def cotangent(shape: torch.Size, device: torch.device) -> torch.Tensor:
    """Weights of the outputs of a trial, the same for every backend: float64 numbers between −1 and 1."""
    return torch.arange(1.0, 1.0 + math.prod(shape), dtype=torch.float64, device=device).cos().reshape(shape)


def trial_of(kind: Kind, length: int | None = None) -> Trial:
    """Operands, drawn with a fixed seed on the device of the kind, and what computes their outputs on a backend.

    `length`: see :func:`difference`. On the meta device nothing is drawn.
    """
    is_meta = kind.device.type == "meta"
    generator = None if is_meta else torch.Generator(kind.device).manual_seed(0)

    def draw(dtype: torch.dtype | None, *shape: int) -> torch.Tensor | None:
        if dtype is None:
            return None
        x = torch.randn(shape, generator=generator, dtype=torch.float32, device=kind.device)
        return x.to(dtype)

    trial = importlib.import_module(f"aajr_kernels.ops.{kind.op}.function").trial
    lengths = {} if length is None else {"length": length}
    operands, run = trial(draw, kind.name, kind.dtypes, kind.sizes, *kind.features, **lengths)
    return operands, run


def difference(kind: Kind, length: int | None = None, repeats: int = 1) -> tuple[float, str]:
    """The largest error of an output or gradient of a trial.

    Args:
        kind: of the trial.
        length: rows, tokens or positions, instead of the trial's own small number.
        repeats: so often the kernels run; the results have to be equal bit by bit.

    Returns:
        The error over what is allowed, at most 1 where the kernels are right, and a sentence on it.
    """
    with torch.cuda.device(kind.device) if kind.device.type == "cuda" else contextlib.nullcontext():
        operands, run = trial_of(kind, length)
        wide = {n: x.double() if x is not None and x.is_floating_point() else x for n, x in operands.items()}
        exact = _results("reference", wide, run)
        eager = _results("reference", operands, run)
        # freed at once: the kernels get this memory for their results, and what they leave unwritten is NaN
        _ = [torch.full_like(t, math.nan) for t in eager.values()]
        ours = _results(kind.backend, operands, run)
        for _ in range(repeats - 1):
            for name, again in _results(kind.backend, operands, run).items():
                if not torch.equal(again, ours[name]):  # false for NaN
                    return math.inf, f"{name} has NaN or differs between two runs"
    gradients = [t for name, t in exact.items() if name.startswith("the gradient")]
    typical = math.sqrt(sum(t.square().sum().item() for t in gradients) / sum(t.numel() for t in gradients))
    worst, text = 0.0, ""
    for name, truth in exact.items():
        floor = FLOOR * typical * math.sqrt(truth.numel()) if name.startswith("the gradient") else 0.0
        size = max(truth.norm().item(), floor)
        allowed = FACTOR * (eager[name].double() - truth).norm().item()
        allowed += ULPS * torch.finfo(eager[name].dtype).eps * size
        error = (ours[name].double() - truth).norm().item()
        if math.isnan(error):
            return math.inf, f"{name} has NaN"
        share = error / allowed if allowed else math.inf if error else 0.0
        if share >= worst:
            worst = share
            text = f"the error of {name} is {error:.2g}, {allowed:.2g} is allowed, its size is {size:.2g}"
    return worst, text


def _results(
    backend: str, operands: dict[str, torch.Tensor | None], run: Callable[..., Any]
) -> dict[str, torch.Tensor]:
    """Outputs and gradients where all operands have one, then where only the first has."""
    trained = [name for name, x in operands.items() if x is not None and x.is_floating_point()]
    results: dict[str, torch.Tensor] = {}
    for names, words in ((trained, ""), *([(trained[:1], " by itself")] if len(trained) > 1 else [])):
        leaves = {
            name: x if x is None else x.detach().requires_grad_(name in names) for name, x in operands.items()
        }
        inputs = [x for name in names if (x := leaves[name]) is not None]
        outputs = [t for t in run(backend, *leaves.values()) if t is not None]
        bars = [cotangent(t.shape, t.device).to(t.dtype) for t in outputs]
        gradients = torch.autograd.grad(outputs, inputs, bars, materialize_grads=True)
        results |= {f"output {i}{words}": t.detach() for i, t in enumerate(outputs)}
        results |= {f"the gradient of {name}{words}": g for name, g in zip(names, gradients)}
    return results
