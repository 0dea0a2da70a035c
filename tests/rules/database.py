"""A walk over torch's own database of operations: every sample of every entry, against oracles in float64.

The tangent is compared with ``torch.func.jvp`` and, where the two differ, with central differences of the function.
The gradient of a random functional of value and tangents is compared with central differences of that functional, in
a random direction of all inputs together: torch's second derivative, which is wrong for some functions, is trusted
only where differences are not defined (at kinks).
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import random
import sys
import types
import unittest
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from aajr_kernels import Dual, UnsupportedOperation, dual, is_dual

#: h of central differences: truncation h², rounding ε/h
STEP = 1e-5
#: h of a five-point stencil, where a difference of differences is taken: truncation h⁴, rounding ε/h
WIDE = 1e-3
#: error of a value, of a tangent and of central differences, relative to the size of what is compared
VALUE, TANGENT, DIFFERENCE = 1e-10, 1e-8, 2e-6


def entries() -> list[Any]:
    """Operations of the database that support forward mode in float64, loaded without the package for doctests."""
    if "expecttest" not in sys.modules:
        try:
            import expecttest  # noqa: F401
        except ImportError:  # the database imports a base class of its unit tests from there
            stand_in = types.ModuleType("expecttest")
            stand_in.TestCase = unittest.TestCase  # type: ignore[attr-defined]
            sys.modules["expecttest"] = stand_in
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.testing._internal.common_methods_invocations import op_db
    # the import forbids plain assignments to torch.backends, which other tests of the process make
    torch.backends.__allow_nonbracketed_mutation_flag = True  # type: ignore[attr-defined]
    return [op for op in op_db if op.supports_forward_ad and torch.float64 in op.supported_dtypes("cpu")]


def title(op: Any) -> str:
    return f"{op.name}.{op.variant_test_name}" if op.variant_test_name else op.name


@dataclass
class Finding:
    """Outcomes of one entry: how many cases were right, why others raised, and all that is wrong."""

    right: int = 0
    raised: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)


class Wrong(Exception):
    """A value, tangent or gradient that no oracle confirms."""


# -- one call -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _seeded() -> Iterator[None]:
    """The same random state for each of the calls that are compared."""
    state = torch.get_rng_state()
    torch.manual_seed(3)
    random.seed(3)
    try:
        yield
    finally:
        torch.set_rng_state(state)


def _is_leaf(x: Any) -> bool:
    return is_dual(x) or isinstance(x, torch.Size)


class Call:
    """A function of the floating-point tensors in a sample; everything else is closed over."""

    def __init__(
        self, function: Callable[..., Any], sample: Any, dtype: torch.dtype, in_place: bool = False
    ) -> None:
        self.leaves, self.structure = pytree.tree_flatten(
            (sample.input, tuple(sample.args), dict(sample.kwargs)), is_leaf=_is_leaf
        )
        self.places = [
            i
            for i, leaf in enumerate(self.leaves)
            if isinstance(leaf, Tensor) and leaf.dtype == dtype and leaf.layout == torch.strided
        ]
        self.points = [self.leaves[i].detach().clone() for i in self.places]
        self.function, self.in_place = function, in_place
        self.process = sample.output_process_fn_grad

    def __call__(self, *values: Any) -> Any:
        filled = list(self.leaves)
        for place, value in zip(self.places, values):
            filled[place] = value
        x, args, kwargs = pytree.tree_unflatten(filled, self.structure)
        with _seeded(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if self.in_place:
                x = x.clone()
                self.function(x, *args, **kwargs)
                return x
            return self.process(self.function(x, *args, **kwargs))

    def outputs(self, *values: Any) -> list[Any]:
        return [
            y for y in pytree.tree_leaves(self(*values), is_leaf=_is_leaf) if isinstance(y, (Tensor, Dual))
        ]


def _differentiable(y: Any) -> bool:
    return y.is_floating_point() or y.is_complex()


# -- oracles ------------------------------------------------------------------------------------------------------


def _close(got: Tensor, want: Tensor, tolerance: float, scale: float = 0.0) -> bool:
    if got.shape != want.shape or got.dtype != want.dtype:
        return False
    got, want = got.detach().resolve_conj(), want.detach().resolve_conj()
    if not got.is_floating_point() and not got.is_complex():
        return torch.equal(got, want)
    if got.numel() == 0 or torch.equal(got, want):
        return True
    finite = torch.isfinite(want)
    size = want[finite].abs().max().item() if finite.any() else 0.0
    return torch.allclose(got, want, tolerance, tolerance * max(size, scale), equal_nan=True)


def _where_finite(got: Tensor, want: Tensor) -> Tensor:
    """`got`, with the oracle's NaN where a derivative does not exist."""
    return torch.where(want.isnan(), want, got) if got.shape == want.shape else got


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """The real inner product."""
    return (
        (torch.view_as_real(a.resolve_conj()) * torch.view_as_real(b.resolve_conj())).sum()
        if a.is_complex()
        else (a * b).sum()
    )


@dataclass
class Problem:
    """One call with the places that become Duals, K directions for each, and the weights of the functional."""

    call: Call
    reference: Call
    lifted: list[int]
    k: int
    generator: torch.Generator

    def __post_init__(self) -> None:
        self.directions = [
            self.noise(self.k, *self.call.points[i].shape, like=self.call.points[i]) for i in self.lifted
        ]
        self.weights: list[tuple[Tensor, Tensor]] = []

    def noise(self, *shape: int, like: Tensor) -> Tensor:
        return torch.randn(shape, dtype=like.dtype, generator=self.generator)

    def jvp(self, points: list[Tensor], directions: list[Tensor]) -> tuple[list[Tensor], list[list[Tensor]]]:
        """Value and, per direction, tangents of the differentiable outputs, by torch's forward mode."""

        def function(*values: Tensor) -> tuple[Tensor, ...]:
            filled = list(points)
            for i, value in zip(self.lifted, values):
                filled[i] = value
            return tuple(y for y in self.reference.outputs(*filled) if _differentiable(y))

        primals = tuple(points[i] for i in self.lifted)
        runs = [torch.func.jvp(function, primals, tuple(d[k] for d in directions)) for k in range(self.k)]
        return list(runs[0][0]), [list(run[1]) for run in runs]

    def numeric(
        self, points: list[Tensor], directions: list[Tensor]
    ) -> tuple[list[Tensor], list[list[Tensor]]]:
        """The same by differences of the function, where torch's forward mode is missing or wrong."""

        def moved(k: int, t: float) -> list[Tensor]:
            filled = [p.clone() for p in points]
            for i, d in zip(self.lifted, directions):
                filled[i] = filled[i] + t * d[k]
            return [y.detach() for y in self.reference.outputs(*filled) if _differentiable(y)]

        values = [
            y.detach() for y in self.reference.outputs(*[p.clone() for p in points]) if _differentiable(y)
        ]
        slopes = []
        for k in range(self.k):
            near, far = (moved(k, WIDE), moved(k, -WIDE)), (moved(k, 2 * WIDE), moved(k, -2 * WIDE))
            slopes.append([(8 * (a - b) - (c - d)) / (12 * WIDE) for a, b, c, d in zip(*near, *far)])
        return values, slopes

    def ours(self, points: list[Tensor], directions: list[Tensor]) -> list[Any]:
        filled: list[Any] = list(points)
        for i, d in zip(self.lifted, directions):
            # dual() takes real tensors only: complex Duals exist inside functions
            filled[i] = dual(filled[i], d) if not d.is_complex() else Dual(torch.cat([filled[i][None], d]))
        return self.call.outputs(*filled)

    def functional(self, values: list[Tensor], tangents: list[list[Tensor]]) -> Tensor:
        """Σ c·y + Σ_k c_k·ẏ_k + ½ Σ_k |ẏ_k|², over real and imaginary parts."""
        total = torch.zeros((), dtype=torch.float64)
        for j, y in enumerate(values):
            if not y.numel():
                continue
            total = total + _dot(y, self.weights[j][0])
            for k in range(self.k):
                t = tangents[k][j]
                total = total + _dot(t, self.weights[j][1][k]) + 0.5 * _dot(t, t)
        return total


def _gradient(f: Callable[..., Tensor], values: list[Tensor], places: list[int]) -> list[Tensor]:
    """Gradients of f(values) in the values at `places`."""
    filled = list(values)
    for i in places:
        filled[i] = values[i].detach().clone().requires_grad_()
    leaves = [filled[i] for i in places]
    phi = f(filled)
    if not phi.requires_grad:
        return [torch.zeros_like(v) for v in leaves]
    gradients = torch.autograd.grad(phi, leaves, allow_unused=True)
    return [torch.zeros_like(v) if g is None else g for v, g in zip(leaves, gradients)]


def _takes_gradients(call: Call) -> bool:
    """Whether torch differentiates in every floating-point tensor of a call: it refuses weights of nll_loss."""
    try:
        call(*[p.clone().requires_grad_() for p in call.points])
    except RuntimeError as error:
        return "not differentiable with respect to argument" not in str(error)
    return True


def compare(problem: Problem, expected: list[Tensor]) -> None:
    """Raise :class:`Wrong` unless value, tangents and gradients of one call are right."""
    call, k = problem.call, problem.k
    outputs = problem.ours(call.points, problem.directions)
    if len(outputs) != len(expected):
        raise Wrong(f"{len(outputs)} outputs instead of {len(expected)}")
    for got, want in zip(outputs, expected):
        primal = got.primal if is_dual(got) else got
        if not _close(primal, want, VALUE, 1.0):
            raise Wrong(f"value {_show(primal)}, expected {_show(want)}")
    kept = [y for y in outputs if _differentiable(y)]
    forward, numeric, oracle = None, None, problem.jvp
    with contextlib.suppress(Exception):  # no forward mode for these arguments
        forward = problem.jvp(call.points, problem.directions)[1]
    for j, y in enumerate(kept):
        tangents = y.tangents if is_dual(y) else torch.zeros((k, *y.shape), dtype=y.dtype)
        scale = y.primal.detach().abs().max().item() if is_dual(y) and y.numel() else 1.0
        for i in range(k):
            if forward is not None and _close(
                _where_finite(tangents[i], forward[i][j]), forward[i][j], TANGENT, 1e-3
            ):
                continue
            numeric = numeric or problem.numeric(call.points, problem.directions)[1]
            oracle = problem.numeric
            if not _close(tangents[i].detach(), numeric[i][j], 1e-7, max(scale, 1.0)):
                raise Wrong(
                    f"tangent {_show(tangents[i])}, expected {_show(forward[i][j] if forward else numeric[i][j])}"
                )
    if not any(is_dual(y) for y in kept):
        return
    problem.weights = [
        (problem.noise(*y.shape, like=y), problem.noise(k, *y.shape, like=y))
        for y in expected
        if _differentiable(y)
    ]
    _compare_gradients(problem, oracle)


def _compare_gradients(problem: Problem, oracle: Callable[..., Any]) -> None:
    points, directions, k = problem.call.points, problem.directions, problem.k
    n = len(points)

    def ours(values: list[Tensor]) -> Tensor:
        outputs = [y for y in problem.ours(values[:n], values[n:]) if _differentiable(y)]
        zero = lambda y: y.new_zeros((k, *y.shape))
        primals = [y.primal if is_dual(y) else y for y in outputs]
        tangents = [y.tangents if is_dual(y) else zero(y) for y in outputs]
        return problem.functional(primals, [[t[i] for t in tangents] for i in range(k)])

    def theirs(values: list[Tensor]) -> Tensor:
        return problem.functional(*oracle(values[:n], values[n:]))

    everything = [*points, *directions]
    places = list(range(len(everything)))
    if not _takes_gradients(problem.reference):
        places = [*problem.lifted, *places[n:]]
    gradients = _gradient(ours, everything, places)
    along = [problem.noise(*everything[i].shape, like=everything[i]) for i in places]
    got = sum(_dot(g, d).item() for g, d in zip(gradients, along))
    size = sum(_dot(g, g).sqrt().item() for g in gradients)

    def moved(t: float) -> float:
        values = list(everything)
        for i, d in zip(places, along):
            values[i] = values[i] + t * d
        return theirs(values).item()

    slopes: list[float] = []
    base = abs(theirs(everything).item())
    if math.isnan(base):  # of a NaN among the inputs
        return
    for h in (STEP, 10 * STEP, STEP / 10) if oracle == problem.jvp else (WIDE, WIDE / 4):
        near, far = moved(h) - moved(-h), moved(2 * h) - moved(-2 * h)
        slopes.append((8 * near - far) / (12 * h))
        if abs(got - slopes[-1]) <= DIFFERENCE * max(size, base, 1.0):
            return
    # a kink, where differences mean nothing: torch's own gradient, as far as it is finite
    try:
        upstream = _gradient(
            lambda values: problem.functional(*problem.jvp(values[:n], values[n:])), everything, places
        )
    except Exception:
        raise Wrong(f"gradient {got}, differences {slopes}") from None
    scale = max((x[x.isfinite()].abs().max().item() for x in upstream if x.isfinite().any()), default=1.0)
    for g, u in zip(gradients, upstream):
        if not _close(_where_finite(g, u), u, TANGENT, scale):
            raise Wrong(
                f"gradient {_show(g)}, torch has {_show(u)}; along a line {got}, differences {slopes}"
            )


def _show(x: Tensor) -> str:
    return f"{tuple(x.shape)} {x.dtype} {x.detach().flatten()[:4].tolist()}"


# -- one entry ----------------------------------------------------------------------------------------------------


def variants(op: Any) -> dict[str, tuple[Callable[..., Any], bool]]:
    """Name -> (function, whether it writes into its first argument) of all forms of an operation."""

    def method(variant: Any) -> Callable[..., Any]:
        if not hasattr(variant, "__objclass__"):
            return variant
        name = variant.__name__
        return lambda x, *args, **kwargs: getattr(x, name)(*args, **kwargs)

    forms: dict[str, tuple[Callable[..., Any], bool]] = {"function": (op.op, False)}
    for alias in (op, *op.aliases):
        prefix = "" if alias is op else alias.name + " "
        if alias is not op and alias.op is not None:
            forms[alias.name] = (alias.op, False)
        if alias.method_variant is not None:
            forms[prefix + "method"] = (method(alias.method_variant), False)
        if alias.inplace_variant is not None:
            forms[prefix + "in-place"] = (method(alias.inplace_variant), True)
    if op.operator_variant is not None:
        forms["operator"] = (op.operator_variant, False)
    if op.inplace_operator_variant is not None:
        forms["in-place operator"] = (op.inplace_operator_variant, True)
    return forms


def spread(items: list[Any], limit: int) -> list[Any]:
    """At most `limit` of `items`, evenly over the list."""
    if len(items) <= limit:
        return items
    return [items[i * len(items) // limit] for i in range(limit)]


def _cases(number: int, form: str, n: int, in_place: bool, quick: bool) -> list[tuple[list[int], int]]:
    """Which of the `n` tensors of a sample become Duals, and with how many tangents."""
    if n == 0:
        return []
    everything = list(range(n))
    if quick:
        return [(everything, 2)]
    cases = [([0], 1), (everything, 2)]
    if n > 1 and not in_place:
        cases.append((everything[1:], 1))
    return cases if form == "function" or number == 0 else cases[:1]


def examine(op: Any, limit: int, dtype: torch.dtype = torch.float64, quick: bool = False) -> Finding:
    """Every form of `op` on at most `limit` samples, with one and with two tangents.

    Args:
        op: entry of the database.
        limit: number of samples, taken evenly over those of the database.
        dtype: of the tensors that become Duals.
        quick: the function only, with all tensors Duals of two tangents.
    """
    finding = Finding()
    generator = torch.Generator().manual_seed(7)
    torch.manual_seed(7)
    wrapper = (
        op.gradcheck_wrapper
    )  # makes the input symmetric, triangular, ... where the function takes it for that
    reference = functools.partial(wrapper, op.op)
    forms = {"function": (op.op, False)} if quick else variants(op)
    for number, sample in enumerate(
        spread(list(itertools.islice(op.sample_inputs("cpu", dtype), 300)), limit)
    ):
        oracle = Call(reference, sample, dtype)
        for form, (function, in_place) in forms.items():
            call = (
                Call(function, sample, dtype, True)
                if in_place
                else Call(functools.partial(wrapper, function), sample, dtype)
            )
            for lifted, k in _cases(number, form, len(call.places), in_place, quick):
                try:
                    expected = [y.detach() for y in call.outputs(*[p.clone() for p in call.points])]
                except Exception:
                    continue  # torch refuses this form of this sample
                where = f"{form}, sample {number}, duals {lifted}, K = {k}"
                try:
                    # many in-place forms have no forward mode: their oracle is the function
                    compare(Problem(call, oracle if in_place else call, lifted, k, generator), expected)
                except UnsupportedOperation as error:
                    finding.raised.append(f"{where}: {error}")
                except Wrong as error:
                    finding.wrong.append(f"{where}: {error}")
                except Exception as error:
                    finding.wrong.append(f"{where}: {type(error).__name__}: {error}")
                else:
                    finding.right += 1
    return finding
