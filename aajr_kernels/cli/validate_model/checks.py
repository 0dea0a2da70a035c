"""A whole model against the oracle: value of the penalty, output, and the gradients of both for every parameter.

The oracle is the same model in float64 under PyTorch's forward mode, with written-out layers
(:mod:`aajr_kernels.testing.oracle`); finite differences of its penalty confirm it.

In float64 every number and every gradient may be off by :data:`EXACT`. In a lower dtype the same written-out model in
that dtype sets the budget: :data:`~aajr_kernels.testing.budgets.FACTOR` times its error plus :data:`ULPS` units in the
last place. Eager may be right by luck in one gradient, so that its error is the largest one among the same parameter of
all layers, and at least that of all gradients together.
"""

from __future__ import annotations

import contextlib
import math
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ...backends.errors import UnsupportedOperation
from ...coverage import coverage
from ...dual import Dual
from ...method import aligned_penalty
from ...testing import oracle
from ...testing.budgets import FACTOR, error_of, gradient_floors, norm
from .loading import CannotValidate, Subject

EXACT = 1e-9  # of a deep model; a single op is held to 1e-10
#: what chance adds to the error of a small sum; bfloat16 has only eight bits to hide errors in
ULPS = {torch.float32: 16.0, torch.bfloat16: 1.0, torch.float16: 2.0}
#: of finite differences in float64, relative to every weight; with the small ones no kink of a ReLU is crossed
DIFFERENCES = (1e-4, 1e-6, 1e-7)
CONFIRMED = 1e-5  # their error
H = 1e-2  # of the finite differences that a user would take instead, relative to the direction
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}

#: "penalty", "output" and, after one of :data:`GRADIENTS`, the leaves -> tensor
Results = dict[str, "Tensor | None"]
#: of the penalty, and of a loss of the output
GRADIENTS = ("gradient of the penalty for ", "gradient of the output for ")


@dataclass
class Check:
    """One way to compute it, against the oracle.

    Attributes:
        name: ``"unmodified"``, ``"fused"``, or a peer.
        result: ``"pass"``, ``"fail"``, or ``"shown"`` for a peer, whose errors fail nothing.
        penalty_error, output_error: relative.
        gradient_error: relative, of all parameters together; the larger one of penalty and output.
        worst: the tensor whose error takes the largest share of its budget.
        share: that share; above 1 is a failure.
        failure: one sentence, empty if it passed.
        seconds: of forward and backward.
        operations: what ran on which backend: op, backend, count, share of the arithmetic.
    """

    name: str
    dtype: str
    device: str
    result: str = "pass"
    penalty_error: float = math.nan
    output_error: float = math.nan
    gradient_error: float = math.nan
    worst: str = ""
    share: float = math.nan
    failure: str = ""
    seconds: float = 0.0
    operations: list[dict[str, Any]] = field(default_factory=list)

    @property
    def judged(self) -> bool:
        """Whether it is one of ours."""
        return self.result != "shown"

    def fail(self, sentence: str) -> None:
        """Note why its errors are too large, or why there is nothing to compare."""
        self.failure = sentence
        self.result = "fail" if self.judged else self.result

    def compare(self, ours: Results, truth: Results, eager: Results | None) -> None:
        """Fill in the errors of `ours`; `eager`: the written-out model in the low dtype, None in float64."""
        errors = errors_of(ours, truth)
        self.penalty_error, self.output_error = errors["penalty"], errors["output"]
        self.gradient_error = max(together(ours, truth, kind) for kind in GRADIENTS)
        allowed = allowed_errors(truth, eager, DTYPES[self.dtype])
        shares = {name: error / allowed[name] for name, error in errors.items()}
        self.worst = max(shares, key=lambda name: shares[name])
        self.share = shares[self.worst]
        if self.share > 1:
            self.fail(f"{self.worst} is {self.share:.1f} times as wrong as its budget allows.")


@dataclass
class Report:
    """Of one model; as a dictionary it is what ``--json`` prints.

    Attributes:
        model: its class.
        parameters: how many.
        metric: of the penalty.
        padded: whether the last row of the batch is padded, with an attention mask.
        checks: rows.
        finite_differences: relative difference of the oracle's gradient from those of its penalty.
        fused: what ran on fused operations, how many, and the class of the modules.
        not_fused: module -> why not; of a whole model under its class name.
        fallbacks: operations without a rule of their own, which torch's forward mode computed.
    """

    model: str
    parameters: int
    metric: str
    padded: bool
    checks: list[Check] = field(default_factory=list)
    finite_differences: float = math.nan
    fused: list[dict[str, Any]] = field(default_factory=list)
    not_fused: dict[str, str] = field(default_factory=dict)
    fallbacks: list[str] = field(default_factory=list)

    @property
    def failures(self) -> list[str]:
        """Sentences; empty if the model passed."""
        sentences = [f"{c.name} {c.dtype}: {c.failure}" for c in self.checks if c.result == "fail"]
        if not self.finite_differences <= CONFIRMED:
            sentences.append(
                "the oracle's gradient differs from finite differences of its penalty by "
                f"{self.finite_differences:.1e}: the model is not smooth here, or not deterministic."
            )
        return sentences


def validate_model(
    subject: Subject,
    dtypes: tuple[str, ...],
    device: str,
    advance: Callable[[str], None] = lambda what: None,
) -> Report:
    """Run everything; `advance` is told what is next.

    Args:
        subject: from :func:`.loading.prepare`, in float32.
        dtypes: of :data:`DTYPES`.
        device: of ours; the oracle runs on the CPU.
        advance: called with a few words.
    """
    count = sum(p.numel() for p in subject.model.parameters())
    report = Report(type(subject.model).__name__, count, subject.metric, not bool(subject.mask.all()))
    truths: dict[torch.dtype, Results] = {}
    for name in dtypes:
        dtype = DTYPES[name]
        weights = torch.float32 if dtype == torch.float64 else dtype
        if weights not in truths:
            advance(f"oracle at {str(weights)[6:]} weights")
            exact = subject.placed("cpu", torch.float64, weights)
            try:
                truths[weights] = _oracle(exact)
            except Exception as error:
                raise CannotValidate(
                    f"PyTorch's forward mode, on which the oracle rests, does not run through {report.model}: "
                    f"{_first_line(error)}"
                ) from error
            if len(truths) == 1:
                advance("finite differences of the oracle")
                report.finite_differences = _confirm(exact, truths[weights])
            del exact
        advance(f"eager {name}")
        eager = None if dtype == torch.float64 else _oracle(subject.placed("cpu", dtype))
        peers = PEERS if dtype == torch.float32 else {}
        for way, compute in {"unmodified": _ours, "fused": _ours, **peers}.items():
            advance(f"{way} {name}")
            check = Check(way, name, "cpu", "shown") if way in peers else Check(way, name, device)
            placed = subject.placed(check.device, dtype, weights)
            try:
                if way == "fused" and not _fuse(placed, report):
                    continue
                with coverage() as seen:
                    results = _timed(check, compute, placed)
                check.compare(results, truths[weights], eager)
            except UnsupportedOperation as error:
                check.fail(str(error))
            except Exception as error:  # any error of the user's model on our ops, or of a peer
                check.fail(_first_line(error))
            else:
                names = ("op", "backend", "count", "share")
                check.operations = [dict(zip(names, row)) for row in seen.rows()]
                report.fallbacks = sorted({*report.fallbacks, *seen.fallbacks})
            report.checks.append(check)
    return report


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"


def _fuse(subject: Subject, report: Report) -> bool:
    """Whether it is a model that fuse() knows; any other failure of fuse() is one of ours."""
    from ...integrations.transformers import KNOWN, fuse

    kind = getattr(getattr(subject.model, "config", None), "model_type", None)
    try:
        fusion = fuse(subject.model)
    except (ImportError, TypeError, ValueError) as error:
        if kind in KNOWN:
            raise
        report.not_fused[type(subject.model).__name__] = str(error)
        return False
    report.fused = [dict(zip(("what", "count", "modules"), row)) for row in fusion.rows()]
    report.not_fused = dict(fusion.left)
    return True


# -- errors -------------------------------------------------------------------------------------------------------


def _gradients_of(results: Results, kind: str) -> Results:
    return {name: gradient for name, gradient in results.items() if name.startswith(kind)}


def errors_of(results: Results, truth: Results) -> dict[str, float]:
    """Relative error of every tensor; infinite for NaN, or for a gradient that is missing or there for no reason."""
    floors = {"penalty": 0.0, "output": 0.0}
    for kind in GRADIENTS:
        floors |= gradient_floors(_gradients_of(truth, kind))
    return {name: error_of(results[name], t, floor=floors[name]).relative for name, t in truth.items()}


def together(results: Results, truth: Results, kind: str) -> float:
    """Relative error of all gradients of a kind as one vector."""
    errors = sizes = 0.0
    for name, exact in _gradients_of(truth, kind).items():
        if exact is not None:
            ours = results[name]
            sizes += norm(exact) ** 2
            errors += norm(exact if ours is None else ours.detach().double().cpu() - exact) ** 2
    return math.sqrt(errors / (sizes or 1.0))


def allowed_errors(truth: Results, eager: Results | None, dtype: torch.dtype) -> dict[str, float]:
    """The largest relative error that every tensor may have."""
    if eager is None:
        return dict.fromkeys(truth, EXACT)

    def finite(error: float) -> float:
        return (
            error if math.isfinite(error) else 0.0
        )  # a formula that overflows in the low dtype excuses nothing

    rounding = {name: finite(error) for name, error in errors_of(eager, truth).items()}
    among: dict[str, float] = {}
    for name, error in rounding.items():
        among[_any_layer(name)] = max(among.get(_any_layer(name), 0.0), error)
    for kind in GRADIENTS:
        least = finite(together(eager, truth, kind))
        among |= {name: max(error, least) for name, error in among.items() if name.startswith(kind)}
    return {name: FACTOR * among[_any_layer(name)] + ULPS[dtype] * torch.finfo(dtype).eps for name in truth}


def _any_layer(name: str) -> str:
    """A name with layer numbers written as ``*``."""
    return re.sub(r"(?<![^.\s])\d+(?![^.])", "*", name)


# -- ways to compute it -------------------------------------------------------------------------------------------


def _timed(check: Check, compute: Callable[[Subject], Results], subject: Subject) -> Results:
    start = time.perf_counter()
    results = compute(subject)
    if subject.x.is_cuda:
        torch.cuda.synchronize(subject.x.device)
    check.seconds = time.perf_counter() - start
    return results


def _results(subject: Subject, penalty: Tensor, output: Tensor) -> Results:
    """With the gradients of the penalty and of the task loss."""
    results: Results = {"penalty": penalty, "output": output}
    leaves = subject.leaves()
    for kind, loss, keep in zip(GRADIENTS, (penalty, subject.task(output)), (True, False)):
        gradients = torch.autograd.grad(loss, list(leaves.values()), retain_graph=keep, allow_unused=True)
        for name, g in zip(leaves, gradients):
            results[kind + name] = g.to_dense() if g is not None and g.is_sparse else g
    return results


def _ours(subject: Subject) -> Results:
    whole = oracle.KeepFloat64(Dual) if subject.x.dtype == torch.float64 else contextlib.nullcontext()
    with whole:
        penalty, output = aligned_penalty(
            subject.call,
            subject.x,
            subject.v,
            metric=subject.metric,
            mask=subject.mask.to(subject.x.device),
            return_primal=True,
        )
        return _results(subject, penalty, output)


def _penalty(subject: Subject, y: Tensor, y_tan: Tensor) -> Tensor:
    return oracle.mean_over_units(oracle.metric_values(y, y_tan, subject.metric), subject.mask)


def _by_forward_mode(subject: Subject) -> tuple[Tensor, Tensor]:
    y, y_tan = oracle.jvp(subject.call, subject.x, subject.v.unsqueeze(0))
    return _penalty(subject, y, y_tan), y


def _oracle(subject: Subject) -> Results:
    with oracle.oracle_mode(float64=subject.x.dtype == torch.float64):
        return _results(subject, *_by_forward_mode(subject))


def _forward_mode(subject: Subject) -> Results:
    """PyTorch's own forward mode on the model as it is."""
    with sdpa_kernel(SDPBackend.MATH):
        return _results(subject, *_by_forward_mode(subject))


def _differences(subject: Subject) -> Results:
    """The finite difference (f(x + hv) − f(x)) / h."""
    y = subject.call(subject.x)
    y_tan = (subject.call(subject.x + H * subject.v) - y) / H
    return _results(subject, _penalty(subject, y, y_tan.unsqueeze(0)), y)


PEERS: dict[str, Callable[[Subject], Results]] = {
    "finite differences": _differences,
    "torch.func.jvp": _forward_mode,
}


# -- the oracle itself --------------------------------------------------------------------------------------------


def _keep_still(model: torch.nn.Module, along: dict[str, Tensor]) -> None:
    """Zero a direction where an embedding gives its table another gradient than the derivative, as torch means it.

    Of a padding row it drops the gradient, and ``scale_grad_by_freq`` divides it. A table that other layers share is
    one parameter, under the first of its names.
    """
    names = {id(p): name for name, p in model.named_parameters()}
    for module in model.modules():
        if isinstance(module, (torch.nn.Embedding, torch.nn.EmbeddingBag)) and id(module.weight) in names:
            direction = along[names[id(module.weight)]]
            if module.scale_grad_by_freq:
                direction.zero_()
            elif module.padding_idx is not None:
                direction[module.padding_idx] = 0


@torch.no_grad()
def _confirm(subject: Subject, truth: Results) -> float:
    """The oracle's gradient along a random change of all leaves, against differences of its penalty."""
    leaves = subject.leaves()
    generator = torch.Generator().manual_seed(1)
    along = {}
    for name, p in leaves.items():
        along[name] = p.square().mean().sqrt() * torch.randn(p.shape, generator=generator, dtype=p.dtype)
    _keep_still(subject.model, along)

    def value() -> Tensor:
        with oracle.oracle_mode():
            return _by_forward_mode(subject)[0]

    expected = size = 0.0
    for name, direction in along.items():
        gradient = truth[GRADIENTS[0] + name]
        if gradient is not None:
            expected += (gradient * direction).sum().item()
            # relative to what a gradient of this size gives in a random direction: the sum may happen to be small
            size = math.hypot(size, norm(gradient * direction))
    if not size:
        return abs(oracle.finite_difference(value, leaves, along, DIFFERENCES[0]))
    error = math.inf
    for step in DIFFERENCES:
        error = min(error, abs(oracle.finite_difference(value, leaves, along, step) - expected) / size)
        if error <= CONFIRMED:
            break
    return error
