"""A whole model against the oracle: value of the penalty, output, and the gradients of both for every parameter.

The oracle is the same model in float64 under PyTorch's forward mode, with written-out layers (:mod:`.oracle`); finite
differences of its penalty confirm it. :mod:`.results` says how wrong ours may be.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ...backends.errors import UnsupportedOperation
from ...coverage import Coverage, coverage
from ...dual import Dual
from ...method import aligned_penalty
from ...testing import oracle
from .budget import Results, judged, together
from .loading import CannotValidate, Subject

#: of finite differences in float64, relative to every weight; with the small ones no kink of a ReLU is crossed
DIFFERENCES = (1e-4, 1e-6, 1e-7)
CONFIRMED = 1e-5  # their error
H = 1e-2  # of the finite differences that a user would take instead, relative to the direction
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass
class Check:
    """One way to compute it, against the oracle.

    Attributes:
        name: ``"unmodified"``, ``"fused"``, or a peer.
        judged: whether errors above the budget fail; peers are only shown.
        penalty_error, output_error: relative.
        gradient_error: relative, of all parameters together; the larger one of penalty and output.
        worst: the tensor whose error takes the largest share of its budget.
        share: that share; above 1 is a failure.
        failure: one sentence, empty if it passed.
        seconds: of forward and backward.
        coverage: what ran on which backend.
    """

    name: str
    dtype: str
    device: str
    judged: bool = True
    penalty_error: float = float("nan")
    output_error: float = float("nan")
    gradient_error: float = float("nan")
    worst: str = ""
    share: float = float("nan")
    failure: str = ""
    seconds: float = 0.0
    coverage: Coverage | None = None

    @property
    def result(self) -> str:
        """``"pass"``, ``"fail"``, or ``"shown"`` for a peer."""
        return "fail" if self.failure and self.judged else "pass" if self.judged else "shown"


@dataclass
class Report:
    """Of one model.

    Attributes:
        model: its class.
        parameters: how many.
        metric: of the penalty.
        padded: whether the last row of the batch is padded, with an attention mask.
        checks: rows.
        confirmed: relative difference of the oracle's gradient from finite differences of its penalty.
        fused: (what, how many, modules) that ran on fused operations.
        left: module -> why not; of a whole model under its class name.
        fallbacks: operations without a rule of their own, which torch's forward mode computed.
    """

    model: str
    parameters: int
    metric: str
    padded: bool
    checks: list[Check] = field(default_factory=list)
    confirmed: float = float("nan")
    fused: list[tuple[str, int, str]] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)
    fallbacks: list[str] = field(default_factory=list)

    @property
    def failures(self) -> list[str]:
        """Sentences; empty if the model passed."""
        sentences = [f"{c.name} {c.dtype}: {c.failure}" for c in self.checks if c.result == "fail"]
        if not self.confirmed <= CONFIRMED:
            sentences.append(
                f"the oracle's gradient differs from finite differences of its penalty by {self.confirmed:.1e}: the "
                "model is not smooth here, or not deterministic."
            )
        return sentences


def steps(dtypes: tuple[str, ...]) -> int:
    """How often :func:`validate_model` tells what is next."""
    oracles = {torch.float32 if DTYPES[name] == torch.float64 else DTYPES[name] for name in dtypes}
    return len(oracles) + 1 + 3 * len(dtypes) + (len(PEERS) if "float32" in dtypes else 0)


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
    for dtype in dtypes:
        kind = DTYPES[dtype]
        rounded = torch.float32 if kind == torch.float64 else kind
        if rounded not in truths:
            advance(f"oracle at {str(rounded)[6:]} weights")
            exact = subject.placed("cpu", torch.float64, rounded)
            try:
                truths[rounded] = _oracle(exact, torch.float64)
            except Exception as error:
                raise CannotValidate(
                    f"PyTorch's forward mode, on which the oracle rests, does not run through {report.model}: "
                    f"{_first_line(error)}"
                ) from error
            if len(truths) == 1:
                advance("finite differences of the oracle")
                report.confirmed = _confirm(exact, truths[rounded])
            del exact
        advance(f"eager {dtype}")
        eager = None if kind == torch.float64 else _oracle(subject.placed("cpu", kind), kind)
        _check_ours(report, subject, dtype, device, truths[rounded], eager, advance)
        if kind == torch.float32:
            for name, peer in PEERS.items():
                advance(name)
                report.checks.append(_peer(name, peer, subject, truths[rounded], eager))
    return report


def _check_ours(
    report: Report,
    subject: Subject,
    dtype: str,
    device: str,
    truth: Results,
    eager: Results | None,
    advance: Callable[[str], None],
) -> None:
    kind = DTYPES[dtype]
    for name in ("unmodified", "fused"):
        advance(f"{name} {dtype}")
        placed = subject.placed(device, kind, torch.float32 if kind == torch.float64 else kind)
        check = Check(name, dtype, device)
        try:
            if name == "fused" and not _fuse(placed, report):
                return
            with coverage() as check.coverage:
                ours, check.seconds = _timed(_ours, placed)
        except UnsupportedOperation as error:
            check.failure = str(error)
        except Exception as error:  # any error of the user's model on our ops
            check.failure = _first_line(error)
        else:
            _fill(check, ours, truth, eager)
        report.checks.append(check)
        ran = check.coverage
        if ran is not None:
            report.fallbacks = sorted({*report.fallbacks, *ran.fallbacks})


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
        report.left[type(subject.model).__name__] = str(error)
        return False
    report.fused, report.left = fusion.rows(), dict(fusion.left)
    return True


def _fill(check: Check, results: Results, truth: Results, eager: Results | None) -> None:
    verdict = judged(results, truth, eager, DTYPES[check.dtype])
    check.penalty_error, check.output_error = verdict.errors["penalty"], verdict.errors["output"]
    check.gradient_error = max(
        together(results.penalty_gradients, truth.penalty_gradients),
        together(results.task_gradients, truth.task_gradients),
    )
    check.share, check.worst = verdict.share, verdict.worst
    if check.share > 1:
        check.failure = f"{check.worst} is {check.share:.1f} times as wrong as its budget allows."


def _timed(compute: Callable[[Subject], Results], subject: Subject) -> tuple[Results, float]:
    start = time.perf_counter()
    results = compute(subject)
    if subject.x.is_cuda:
        torch.cuda.synchronize(subject.x.device)
    return results, time.perf_counter() - start


# -- ways to compute it -------------------------------------------------------------------------------------------


def _gradients(subject: Subject, penalty: Tensor, output: Tensor) -> Results:
    leaves = subject.leaves()

    def of(loss: Tensor, keep: bool) -> dict[str, Tensor | None]:
        gradients = torch.autograd.grad(loss, list(leaves.values()), retain_graph=keep, allow_unused=True)
        return {
            name: g.to_dense() if g is not None and g.is_sparse else g for name, g in zip(leaves, gradients)
        }

    return Results(penalty, output, of(penalty, True), of(subject.task(output), False))


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
        return _gradients(subject, penalty, output)


def _by_forward_mode(subject: Subject) -> tuple[Tensor, Tensor]:
    y, y_tan = oracle.jvp(subject.call, subject.x, subject.v.unsqueeze(0))
    q = oracle.metric_values(y, y_tan, subject.metric)
    return oracle.mean_over_units(q, subject.mask), y


def _oracle(subject: Subject, dtype: torch.dtype) -> Results:
    with oracle.oracle_mode(float64=dtype == torch.float64):
        penalty, y = _by_forward_mode(subject)
        return _gradients(subject, penalty, y)


def _forward_mode(subject: Subject) -> Results:
    """PyTorch's own forward mode on the model as it is."""
    with sdpa_kernel(SDPBackend.MATH):
        return _gradients(subject, *_by_forward_mode(subject))


def _differences(subject: Subject) -> Results:
    """The finite difference (f(x + hv) − f(x)) / h."""
    y = subject.call(subject.x)
    y_tan = (subject.call(subject.x + H * subject.v) - y) / H
    q = oracle.metric_values(y, y_tan.unsqueeze(0), subject.metric)
    return _gradients(subject, oracle.mean_over_units(q, subject.mask), y)


PEERS: dict[str, Callable[[Subject], Results]] = {
    "finite differences": _differences,
    "torch.func.jvp": _forward_mode,
}


def _peer(
    name: str, compute: Callable[[Subject], Results], subject: Subject, truth: Results, eager: Results | None
) -> Check:
    check = Check(name, "float32", "cpu", judged=False)
    try:
        results, check.seconds = _timed(compute, subject.placed("cpu", torch.float32))
    except Exception as error:  # peers are only shown
        check.failure = _first_line(error)
    else:
        _fill(check, results, truth, eager)
    return check


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

    terms = [(g * along[name]).sum() for name, g in truth.penalty_gradients.items() if g is not None]
    # relative to what a gradient of this size gives in a random direction: the sum may happen to be small
    scale = torch.stack([(g * along[n]).norm() for n, g in truth.penalty_gradients.items() if g is not None])
    if not scale.any():
        return abs(oracle.finite_difference(value, leaves, along, DIFFERENCES[0]))
    expected, size, error = float(torch.stack(terms).sum()), float(scale.norm()), math.inf
    for step in DIFFERENCES:
        error = min(error, abs(oracle.finite_difference(value, leaves, along, step) - expected) / size)
        if error <= CONFIRMED:
            break
    return error


def as_json(report: Report) -> dict[str, Any]:
    """The report as JSON values; a number that is not finite is null."""

    def number(x: float) -> float | None:
        return x if math.isfinite(x) else None

    rows = []
    for c in report.checks:
        row = {f.name: getattr(c, f.name) for f in fields(c) if f.name not in ("judged", "coverage")}
        row = {name: number(value) if isinstance(value, float) else value for name, value in row.items()}
        row["result"] = c.result
        if c.coverage is not None:
            row["operations"] = [dict(zip(("op", "backend", "count", "share"), r)) for r in c.coverage.rows()]
        rows.append(row)
    return {
        "passed": not report.failures,
        "failures": report.failures,
        "model": report.model,
        "parameters": report.parameters,
        "metric": report.metric,
        "finite_differences": number(report.confirmed),
        "checks": rows,
        "fused": [dict(zip(("what", "count", "modules"), row)) for row in report.fused],
        "not_fused": report.left,
        "fallbacks": report.fallbacks,
    }
