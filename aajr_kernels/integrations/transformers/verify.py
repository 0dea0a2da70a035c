"""Whether a replacement does what a module's own method does: both run on a small twin of the module.

A twin has the class and the attributes of its module, none of its hooks, and random parameters on the CPU: it runs
where the module cannot (meta, sharded, quantised), and no weight of zero hides a difference. Linear layers of any make
become random maps of low rank between the same sizes, dropout modules a smooth function: a dropout in another place
shows. Values and one directional derivative are compared on eight tokens; that of the module's own method is
``torch.func.jvp``'s, which knows none of the rules of this package.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from math import inf
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ...backends.choice import use_backend
from ...coverage import Coverage, coverage, paused
from ...dual import Dual, dual
from ...torch_private import DROPOUT
from .wrappers import is_bare

__all__ = [
    "FLOATS",
    "Case",
    "LowRank",
    "Method",
    "Trial",
    "draw",
    "first",
    "linear_sizes",
    "signature",
    "undisturbed",
]

Method = Callable[[Any, Any], Any]  # of a twin and tokens
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

_COMMON = vars(nn.Module()).keys()
#: rank of the maps in the place of linear layers; entries of the largest parameters that a twin has
_RANK, _LARGEST = 8, 2**22
#: relative errors: in float64, where many layers round to float32; in lower dtypes, where both sides round, twice the
#: own method's error and some units in the last place
_EXACT, _FACTOR, _ULPS = 64 * torch.finfo(torch.float32).eps, 2.0, 16.0


class Case(NamedTuple):
    """Dtypes of the tokens, of the parameters, and of those children whose parameters have another one."""

    tokens: torch.dtype
    parameters: torch.dtype
    children: Mapping[str, torch.dtype] = {}


_WIDE = Case(torch.float64, torch.float64)


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Inside, code runs on the CPU with the reference backend, and leaves random state and coverage as they are."""
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        torch.autocast("cpu", enabled=False),
        torch.random.fork_rng(devices=[]),
        torch.device("cpu"),
        sdpa_kernel(SDPBackend.MATH),
        use_backend("reference"),
        paused(),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        yield


# -- twins ------------------------------------------------------------------------------------------------------------


def linear_sizes(module: nn.Module) -> tuple[int, int] | None:
    """(inputs, outputs) of a linear layer of any make: torch's, transformers', adapted or quantised."""
    for names in (("in_features", "out_features"), ("nx", "nf")):
        inputs, outputs = (getattr(module, name, None) for name in names)
        if isinstance(inputs, int) and isinstance(outputs, int):
            return inputs, outputs
    inner = module._modules.get("base_layer")  # under an adapter
    return None if inner is None else linear_sizes(inner)


def draw(shape: Sequence[int], dtype: torch.dtype, generator: torch.Generator, scale: Any = 1.0) -> Tensor:
    """Random numbers that bfloat16 can hold, so that they are the same in every dtype."""
    numbers = torch.randn(*shape, generator=generator, dtype=torch.float64, device="cpu") * scale
    return numbers.to(torch.bfloat16).to(dtype)


class LowRank(nn.Module):
    """In the place of a linear layer."""

    def __init__(self, inputs: int, outputs: int, dtype: torch.dtype, generator: torch.Generator) -> None:
        super().__init__()
        self.inner = draw((_RANK, inputs), dtype, generator, inputs**-0.5)
        self.weight = draw((outputs, _RANK), dtype, generator, _RANK**-0.5)
        self.bias = draw((outputs,), dtype, generator)

    def forward(self, x: Any) -> Any:
        if x.dtype != self.weight.dtype:
            raise RuntimeError(f"a linear layer in {self.weight.dtype} was given {x.dtype}")
        return nn.functional.linear(nn.functional.linear(x, self.inner), self.weight, self.bias)


class _Mark(nn.Dropout):
    """In the place of a dropout module: neither linear nor random."""

    def forward(self, x: Any) -> Any:
        return x + 0.5 * torch.sin(x)


def _twin(module: nn.Module, case: Case, generator: torch.Generator) -> nn.Module:
    sizes = linear_sizes(module)
    if sizes is not None:
        return LowRank(*sizes, case.parameters, generator)
    if isinstance(module, DROPOUT):
        return _Mark()
    twin: nn.Module = object.__new__(type(module))
    fresh = vars(nn.Module())
    for name, value in vars(module).items():
        # a compiled call would run the module itself; a container may be filled by the forward
        if name not in fresh and name not in ("forward", "_compiled_call_impl"):
            twin.__dict__[name] = copy.copy(value) if isinstance(value, (dict, list)) else value
    twin.__dict__.update(fresh)
    for name, p in module._parameters.items():
        if p is None or p.numel() <= _LARGEST:
            random = None if p is None else draw(p.shape, case.parameters, generator)
            twin._parameters[name] = None if random is None else nn.Parameter(random, requires_grad=False)
    for name, b in module._buffers.items():
        if b is not None and b.is_floating_point():
            b = draw(b.shape, case.parameters, generator)
        twin._buffers[name] = b if b is None or b.is_meta else b.detach().cpu().clone()
    for name, child in module._modules.items():
        dtype = case.children.get(name, case.parameters)
        twin._modules[name] = None if child is None else _twin(child, Case(case.tokens, dtype), generator)
    return twin


def _setting(value: Any) -> Any:
    if isinstance(value, functools.partial):
        value = (value.func, value.args, value.keywords)
    if isinstance(value, dict):
        value = tuple(value.items())
    if isinstance(value, (list, tuple)):
        return tuple(map(_setting, value))
    if is_bare(value):  # the kernels library gives every layer modules made of functions
        return type(value)
    return value if isinstance(value, (bool, int, float, str, type(None))) else id(value)


def signature(module: nn.Module, but: tuple[str, ...] = ()) -> Any:
    """Equal for modules with equal twins: of one class, with the same sizes and settings, `but` for some of these."""
    settings = ((k, v) for k, v in vars(module).items() if k not in _COMMON and k not in but)
    tensors = (*module._parameters.items(), *module._buffers.items())
    return (
        type(module),
        tuple((name, _setting(value)) for name, value in settings),
        tuple((name, None if t is None else (t.shape, t.dtype)) for name, t in tensors),
        tuple((name, None if m is None else signature(m, but)) for name, m in module._modules.items()),
    )


# -- trials -----------------------------------------------------------------------------------------------------------


def first(output: Any) -> Any:
    """The output, or the first of several."""
    return output[0] if isinstance(output, tuple) else output


def _raised(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"


def _gradients(run: _Run, parameters: Mapping[str, Tensor], method: Method) -> Sequence[Tensor | None]:
    """Of a linear function of the result, by the parameters."""
    if not parameters:
        return ()
    with undisturbed(), torch.enable_grad():
        try:
            for p in parameters.values():
                p.requires_grad_()
            y = first(method(run.twin, run.x))
            if not y.requires_grad:
                return [None] * len(parameters)
            weights = torch.arange(y.numel(), dtype=y.dtype).cos().reshape(y.shape)
            return torch.autograd.grad(y, list(parameters.values()), weights, allow_unused=True)
        finally:
            for p in parameters.values():
                p.requires_grad_(False)


def _times(ran: Coverage, op: str) -> int:
    return sum(int(n) for (name, _), (n, _) in ran.entries.items() if name == op)


class _Run(NamedTuple):
    """A twin, what it was given, and what its module's own method gave."""

    twin: nn.Module
    x: Tensor
    v: Tensor
    value: Tensor
    derivative: Tensor
    ulp: float


class Trial:
    """A module's own method on twins, in several dtypes, for replacements to be compared with.

    Attributes:
        reason: why the method cannot be run, or "".
        runs: in float64, in the module's dtype, and in those mixed cases in which the method runs at all.
    """

    def __init__(
        self,
        module: nn.Module,
        dtype: torch.dtype,
        own: Method,
        width: int,
        mixed: Sequence[Case] = (),
        tokenwise: bool = True,
    ) -> None:
        """Run `own`, which is called with a twin of `module` and tokens ``[2, 4, width]``.

        A `tokenwise` method is given tokens of very different sizes, each compared for itself: around the epsilon of a
        norm, where its place shows, and up to where activations saturate. It runs in training mode, too.
        """
        self.reason, self.tokenwise, self._own = "", tokenwise, own
        self.runs: list[_Run] = []
        sizes = torch.logspace(-6, 1, 8, dtype=torch.float64, device="cpu").reshape(2, 4, 1)
        usual = [(_WIDE, False), (_WIDE, True), (Case(dtype, dtype), False)]
        for case, training in (*(usual if tokenwise else usual[::2]), *((case, False) for case in mixed)):
            generator = torch.Generator("cpu").manual_seed(0)
            try:
                with undisturbed():
                    twin = _twin(module, case, generator).train(training)
                    shape, scale = (2, 4, width), sizes if tokenwise else 2.0
                    x, v = (draw(shape, case.tokens, generator, scale) for _ in range(2))
                    call = functools.partial(lambda twin, z: first(own(twin, z)), twin)
                    y, tangent, *_ = torch.func.jvp(call, (x,), (v,))
            except Exception as error:  # any error of a module's code
                if case not in mixed:
                    self.reason = f"cannot be run for a check ({_raised(error)})"
                    return
                continue
            ulp = max(torch.finfo(d).eps for d in (case.tokens, case.parameters, *case.children.values()))
            self.runs.append(_Run(twin, x, v, y, tangent, ulp))

    def count(self, method: Method, op: str) -> int:
        """How often `method` runs `op`; 0 where it raises."""
        run = self.runs[0]
        with undisturbed(), coverage() as ran, contextlib.suppress(Exception):
            method(run.twin, dual(run.x, run.v))
        return _times(ran, op)

    def difference(self, method: Method, op: str, count: int = 1) -> tuple[float, str] | None:
        """How far off `method` is, and that in words; or None where it agrees and runs `op` so many times."""
        for run in self.runs:
            try:
                with undisturbed(), coverage() as ran:
                    y = first(method(run.twin, dual(run.x, run.v)))
                with undisturbed():
                    plain = first(method(run.twin, run.x))
            except Exception as error:
                return inf, f"the fused one raises {_raised(error)}"
            times = _times(ran, op)
            if times != count or not isinstance(y, Dual):
                return inf, f"{op} ran {times} times instead of {count}"
            wide = run.ulp == torch.finfo(torch.float64).eps
            for what, got in (("value", plain), ("value", y.primal), ("derivative", y.tangent)):
                own, exact = getattr(run, what), getattr(run if wide else self.runs[0], what)
                if (got.shape, got.dtype) != (own.shape, own.dtype):
                    return inf, f"{got.dtype} {list(got.shape)} instead of {own.dtype} {list(own.shape)}"
                distance, allowed = self._error(got, exact), _EXACT
                if not wide:
                    allowed = max(allowed, _FACTOR * self._error(own, exact) + _ULPS * run.ulp)
                if not distance <= allowed:
                    dtype = str(run.x.dtype).removeprefix("torch.")
                    return (
                        distance,
                        f"its {what} is off by {distance:.0e} in {dtype}, by more than {allowed:.0e}",
                    )
        return self._difference_of_gradients(method)

    def _difference_of_gradients(self, method: Method) -> tuple[float, str] | None:
        """The same of the gradients of parameters that the method uses itself: it may detach one."""
        run = self.runs[0]
        parameters = {name: p for name, p in run.twin._parameters.items() if p is not None}
        try:
            own, fused = (_gradients(run, parameters, one) for one in (self._own, method))
        except Exception as error:
            return inf, f"there is no gradient to compare ({_raised(error)})"
        for name, exact, got in zip(parameters, own, fused):
            if exact is None or got is None:
                if exact is not got:
                    return _EXACT, f"its {name} gets {'no' if got is None else 'a'} gradient"
            elif not (got - exact).norm() <= _EXACT * exact.norm():
                return _EXACT, f"the gradient of its {name} is another one"
        return None

    def depends_on(self, name: str, values: Sequence[Any]) -> bool:
        """Whether the value of the method in float64 changes with an attribute of the twin."""
        run = self.runs[0]
        before = run.twin.__dict__[name]
        try:
            for run.twin.__dict__[name] in values:
                with undisturbed():
                    if not torch.equal(first(self._own(run.twin, run.x)), run.value):
                        return True
        except Exception:  # an index that is none of the model's
            return True
        finally:
            run.twin.__dict__[name] = before
        return False

    def _error(self, x: Tensor, exact: Tensor) -> float:
        """The largest relative error of a token, or that of all together."""
        axis = -1 if self.tokenwise else (-1, -2)
        sizes = exact.norm(dim=axis).clamp_min(torch.finfo(torch.float64).tiny)
        return ((x.double() - exact).norm(dim=axis) / sizes).max().item()
