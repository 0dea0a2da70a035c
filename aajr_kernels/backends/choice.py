"""Backend choice, autocast and the rule registry; what ran is recorded by :mod:`.recording`.

This is the bottom of the package: it knows neither :class:`~aajr_kernels.dual.Dual` nor any operation. Operations
ask it which backend to run on and tell it what ran; rules register themselves here and the number looks them up.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import os
import pkgutil
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any, NoReturn

import torch
import torch.nn.functional as F

from . import sharding
from .backends import cpu as native
from .backends import cuda
from .backends import triton as gpu
from .backends.operator import constant
from .recording import Coverage, coverage, record, record_unsupported, recording
from .torch_private import NN, VARIABLE_FUNCTIONS, break_graph, has_memory, separate_outputs

__all__ = [
    "BackendUnavailable",
    "Coverage",
    "UnsupportedOperation",
    "backends",
    "coverage",
    "record",
    "record_unsupported",
    "recording",
    "refuse_transform",
    "unsupported",
    "use_backend",
]


class UnsupportedOperation(NotImplementedError):
    """A function was called on a Dual for which no exact derivative rule is known.

    Not a TypeError: torch turns those into NotImplemented inside operators, and Python would then rebind the name in
    ``buffer += dual`` instead of raising.
    """


def unsupported(message: str) -> NoReturn:
    """Raise :class:`UnsupportedOperation`, in a way that reaches the user of compiled code too.

    Dynamo hides the text of exceptions in what it traces. Of a graph break it shows it, and without ``fullgraph=True``
    the code then runs as it stands and raises.
    """
    break_graph(message)
    raise UnsupportedOperation(message)


def refuse_transform(error: Exception | None = None) -> NoReturn:
    """Raise :class:`UnsupportedOperation`: an op with a hand-written backward ran inside a transform of torch."""
    raise UnsupportedOperation(
        "the ops of aajr_kernels are no functorch transforms (torch.func, forward_ad): take torch.autograd.grad, or "
        "aajr_kernels.jvp for a derivative along a direction."
    ) from error


class BackendUnavailable(RuntimeError):
    """A backend was asked for by name that cannot run here; the message says why."""


# ---------------------------------------------------------------------------------------------------------------
# Backends
# ---------------------------------------------------------------------------------------------------------------

BACKENDS = ("reference", "native", "triton", "cuda")
_choice = os.environ.get("AAJR_BACKEND", "auto")


def backends() -> dict[str, str | None]:
    """Every backend by name, with None where it can run and a one-sentence reason where it cannot."""
    return {name: _missing(name) for name in BACKENDS}


def _missing(name: str) -> str | None:
    """Why one backend cannot run here; asked at every operation while it is chosen by name."""
    if name == "native":
        try:
            return native.missing()
        except ValueError as error:
            return str(error)
    if name == "triton":
        return gpu.missing()
    return cuda.missing() if name == "cuda" else None


class use_backend:
    """Choose the backend of every operation: ``"auto"``, ``"reference"``, ``"native"``, ``"triton"`` or ``"cuda"``.

    Takes effect when called; used as a context manager it restores the previous choice on exit. The environment
    variable ``AAJR_BACKEND`` sets the initial choice. A backend chosen by name never falls back to another one, with
    one exception that is no surprise: ``"cuda"`` (experimental) has kernels for norms and sensitivities alone, and
    leaves the other operations to what ``"auto"`` takes. :func:`coverage` shows who ran what.

    Raises:
        ValueError: the name is unknown.
        BackendUnavailable: the named backend cannot run here.
    """

    def __init__(self, name: str) -> None:
        global _choice
        check_backend(name)
        self._previous, _choice = _choice, name

    def __enter__(self) -> use_backend:
        return self

    def __exit__(self, *exc: object) -> None:
        global _choice
        _choice = self._previous


def check_backend(name: str) -> None:
    """Raise unless `name` is "auto" or the name of a backend that can run here."""
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"backend {name!r} is unknown: choose one of auto, {', '.join(BACKENDS)}.")
    if name in BACKENDS[1:] and (reason := _missing(name)) is not None:
        raise BackendUnavailable(f"backend {name!r} cannot run here: {reason.rstrip('.')}.")


def chosen() -> str:
    """The backend that :class:`use_backend` or AAJR_BACKEND names, or ``"auto"``."""
    return _choice


_NATIVE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.bool, torch.int64)


def _module(op: str, backend: str) -> str:
    return f"aajr_kernels.ops.{op}.{'cpu' if backend == 'native' else backend}"


@functools.cache
def _found(op: str, backend: str) -> bool:
    return importlib.util.find_spec(_module(op, backend)) is not None


@constant  # torch.compile looks through a cache, and cannot trace what is behind it
def _has(op: str, backend: str) -> bool:
    return _found(op, backend)


@constant
def _named(op: str, backend: str) -> str:
    """The backend that was chosen by name, checked and loaded."""
    check_backend(backend)
    implementation(op, backend)
    return backend


@constant
def _on_device(op: str) -> str:
    """What ``auto`` takes on CUDA and ROCm devices, loaded."""
    if gpu.missing() is not None or not _has(op, "triton"):
        return "reference"
    implementation(op, "triton")
    return "triton"


@functools.cache
def _has_native(op: str) -> bool:
    """Whether the native module was built and has kernels for the op; raises where a wish cannot be granted."""
    try:
        reason = native.missing()
    except ValueError as error:
        raise BackendUnavailable(str(error)) from error
    return reason is None and _has(op, "native")


@constant
def _on_cpu(op: str) -> str:
    """What ``auto`` takes on a CPU, loaded."""
    if not _has_native(op):
        return "reference"
    implementation(op, "native")
    return "native"


@constant
def _load_all(backend: str) -> None:
    """Have every op's module of a backend: torch.compile sees those alone that were loaded before it looked at one."""
    for found in pkgutil.iter_modules([os.path.join(os.path.dirname(__file__), "ops")]):
        if _has(found.name, backend):
            implementation(found.name, backend)


@constant
def _ready_to_trace() -> None:
    """Mend what torch.compile does to our autograd Functions: compiled code may be the first to use them."""
    separate_outputs()


def _fits_native(t: torch.Tensor) -> bool:
    """A CPU tensor with memory of its own, now or when compiled code runs, and a dtype that has kernels."""
    fits = t.device.type == "cpu" and t.dtype in _NATIVE_DTYPES
    return fits and (torch.compiler.is_compiling() or has_memory(t))


#: backends of devices -> why their kernels do not take a tensor
_WHY_NOT = {"triton": gpu.why_not, "cuda": cuda.why_not}


def _why_not(backend: str, *tensors: torch.Tensor | None) -> str | None:
    first: torch.Tensor | None = None
    for t in tensors:
        if t is None:
            continue
        if (reason := _WHY_NOT[backend](t)) is not None:
            return reason
        # DTensor, for one, has a pointer of zero
        if not torch.compiler.is_compiling() and not has_memory(t):
            return f"a {type(t).__name__}, which has no memory of its own: pass the local tensor"
        first = t if first is None else first
        if t.device != first.device:
            return f"tensors on {first.device} and on {t.device}: move them to one device"
    return None


def select_backend(
    op: str, *tensors: torch.Tensor | None, triton_lacks: str | None = None, in_cuda: bool = True
) -> str:
    """The backend that `op` runs on for these inputs.

    A name chosen by the user is final (``cuda``: for what it has kernels for). ``auto`` takes the native kernels for
    float32, bfloat16 and float16 on a CPU, the Triton kernels for the same on CUDA and ROCm devices, and the reference
    for everything else: float64 and other devices. Compiled code runs the same kernels, as operators of torch.

    Args:
        op: package under ``ops``.
        tensors: its inputs.
        triton_lacks: what this call asks for that the Triton kernels do not have, and what they have; None if nothing.
        in_cuda: whether the op's CUDA C++ kernels, if there are any, have this part of it.

    Raises:
        BackendUnavailable: the backend chosen by name cannot run here, or not on these tensors.
        UnsupportedOperation: a tensor is a DTensor, or complex.
    """
    if any(t is not None and t.is_complex() for t in tensors):
        raise UnsupportedOperation(
            f"{op} got complex numbers and takes real ones: pass real and imaginary parts, torch.view_as_real(x)."
        )
    if sharding.spread(*tensors):
        raise UnsupportedOperation(f"{op} got a DTensor and has no rule for shards: pass x.to_local().")
    backend = _select(op, tensors, triton_lacks, in_cuda)
    if torch.compiler.is_compiling():
        _ready_to_trace()
        _load_all(backend)
    return backend


def _select(
    op: str, tensors: tuple[torch.Tensor | None, ...], triton_lacks: str | None, in_cuda: bool
) -> str:
    named = _choice != "auto"
    if _choice == "cuda":
        named = in_cuda and _has(op, "cuda")
    if named:
        _named(op, _choice)
        if _choice == "triton" and triton_lacks is not None:
            raise BackendUnavailable(f"{op}: backend 'triton' {triton_lacks}: use backend 'auto'.")
        if _choice in _WHY_NOT and (reason := _why_not(_choice, *tensors)) is not None:
            raise BackendUnavailable(f"{op}: backend {_choice!r} got {reason}, or use backend 'auto'.")
        return _choice
    if any(t is not None and t.device.type == "cuda" for t in tensors):
        fits = triton_lacks is None and _why_not("triton", *tensors) is None
        return _on_device(op) if fits else "reference"
    return _on_cpu(op) if all(_fits_native(t) for t in tensors if t is not None) else "reference"


def implementation(op: str, backend: str) -> ModuleType:
    """The module of ``aajr_kernels.ops.<op>`` with the kernels of one op on one backend, imported lazily.

    Raises:
        BackendUnavailable: there is no such module, or it cannot be imported.
    """
    name = _module(op, backend)
    module = sys.modules.get(name)  # torch.compile traces the look-up, it could not trace an import
    if module is None:
        try:
            module = importlib.import_module(name)
        except ImportError as error:
            raise BackendUnavailable(f"op {op!r} has no {backend!r} backend: {error}.") from error
    return module


def first_order(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator of a ``Function.backward`` that has no derivative of its own: under create_graph=True it raises.

    ``torch.autograd.function.once_differentiable`` raises only in ``.backward()``; ``torch.autograd.grad`` with
    allow_unused=True and ``torch.autograd.functional.hvp`` get None or zeros from it.
    """

    @functools.wraps(backward)
    def checked(ctx: Any, *grads: Any) -> Any:
        # grad mode is on in a backward exactly when it is to be recorded; tracing says nothing of that
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(
                "the gradient of an aajr_kernels op has no derivative: call backward without create_graph=True."
            )
        return backward(ctx, *grads)

    return checked


# ---------------------------------------------------------------------------------------------------------------
# Autocast
# ---------------------------------------------------------------------------------------------------------------


def autocasting(device_type: str) -> bool:
    """Whether autocast is active; torch raises for the devices that have none, such as ``meta``."""
    return device_type != "meta" and torch.is_autocast_enabled(device_type)


def _autocast(dtype: torch.dtype | None, tensors: tuple[torch.Tensor | None, ...]) -> tuple[Any, ...]:
    device = next((t.device.type for t in tensors if t is not None), "cpu")
    if not autocasting(device):
        return tensors
    target = torch.get_autocast_dtype(device) if dtype is None else dtype

    def cast(t: torch.Tensor | None) -> torch.Tensor | None:
        # float64 stays, as under torch's own autocast
        return t.to(target) if t is not None and t.is_floating_point() and t.dtype != torch.float64 else t

    return tuple(cast(t) for t in tensors)


def autocast_low(*tensors: torch.Tensor | None) -> tuple[Any, ...]:
    """Under an active autocast, the tensors in its low dtype (differentiable casts); otherwise unchanged."""
    return _autocast(None, tensors)


def autocast_float32(*tensors: torch.Tensor | None) -> tuple[Any, ...]:
    """Under an active autocast, the tensors in float32 (differentiable casts); otherwise unchanged."""
    return _autocast(torch.float32, tensors)


def no_autocast(device_type: str) -> contextlib.AbstractContextManager[Any]:
    """Switch autocast off inside a Function, whose inputs were cast by its caller."""
    if not autocasting(device_type):
        return contextlib.nullcontext()
    return torch.autocast(device_type, enabled=False)


# ---------------------------------------------------------------------------------------------------------------
# Rules
# ---------------------------------------------------------------------------------------------------------------

#: torch function -> rule, called with the function's own arguments (some of them Duals)
RULES: dict[Callable[..., Any], Callable[..., Any]] = {}
#: torch function -> "view" | "torch" | "op" | "fallback": what coverage() calls it ("op" records itself)
KINDS: dict[Callable[..., Any], str] = {}

#: torch function -> rule where an argument is complex: of ``rules/complex.py``, or the same where that is right
COMPLEX: dict[Callable[..., Any], Callable[..., Any]] = {}

#: name -> rule of what torch.compile calls in place of a function, and does not find in a table by itself
TRACED: dict[str, Callable[..., Any]] = {}

#: method name -> rule: torch.compile cannot look up the methods that torch writes in Python by themselves
METHODS: dict[str, Callable[..., Any]] = {}

_NAMESPACES = (torch, torch.Tensor, F, NN, torch.special, torch.linalg, VARIABLE_FUNCTIONS)


def functions_named(name: str) -> list[Callable[..., Any]]:
    """Every torch callable of that name: function, method, functional wrapper and the builtin behind it."""
    found: list[Callable[..., Any]] = []
    for namespace in _NAMESPACES:
        candidate = getattr(namespace, name, None)
        if callable(candidate) and not isinstance(candidate, type) and candidate not in found:
            found.append(candidate)
    return found


def register(func: Callable[..., Any], rule: Callable[..., Any], kind: str) -> None:
    """Enter the rule of one torch callable; :func:`rule` is the form for users."""
    RULES[func], KINDS[func] = rule, kind
    name = getattr(func, "__name__", "")
    if getattr(torch.Tensor, name, None) is func:
        METHODS[name] = rule


def rule(*targets: str | Callable[..., Any], kind: str = "torch") -> Callable[[Callable[..., Any]], Any]:
    """Register a derivative rule.

    Args:
        targets: torch callables, or names that are looked up in torch, torch.Tensor, torch.nn.functional,
            torch.special and torch.linalg (all matches are registered). A trailing ``?`` marks a name that only
            some torch versions have.
        kind: what :func:`coverage` reports: ``"torch"``, ``"view"``, ``"fallback"``, or ``"op"`` for rules that call
            an op which records itself.

    Returns:
        A decorator. The rule is called with the function's own arguments, of which at least one is or contains a Dual.

    Raises:
        LookupError: a name matches no torch function.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        for target in targets:
            matches = functions_named(target.rstrip("?")) if isinstance(target, str) else [target]
            if not matches and not (isinstance(target, str) and target.endswith("?")):
                raise LookupError(f"no torch function is called {target!r}.")
            for match in matches:
                register(match, function, kind)
        return function

    return decorate


#: names by which torch takes NumPy's keywords, and the operands after the first in the order of their positions
_ALIASES = {"axis": "dim", "keepdims": "keepdim", "self": "input"}
_OPERANDS = """
mat1 mat batch1 tensor1 vec1 other exponent mat2 batch2 tensor2 vec vec2 tensor
""".split()


def positional(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Operands that were named moved to their places, and NumPy's keywords under torch's names.

    Rules name their operands as the mathematics does; torch's builtins accept ``input=``, ``other=``, ``mat2=``...
    """
    if "condition" in kwargs or "sorted_sequence" in kwargs:
        return args, kwargs  # torch.where and searchsorted, whose ``input`` is the second operand
    kwargs = {_ALIASES.get(name, name): value for name, value in kwargs.items()}
    if not args and "input" in kwargs:
        args = (kwargs.pop("input"),)
    if "input" not in kwargs:
        args = (*args, *(kwargs.pop(name) for name in _OPERANDS if name in kwargs))
    return args, kwargs
