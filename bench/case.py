"""Cases and suites: a case is a set of variants that compute comparable things.

A suite is a function from a :class:`Selection` to cases, entered in :data:`bench.suites.SUITES`. A case names its
sizes, its variants and their base; a variant builds itself at any length (the gate
runs at a small one, the peak of memory in another process) and which exact gradients it has to reproduce.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

from aajr_kernels.backends import choice

from .roofline import Work

SEED = 0
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
#: relative error of all gradients together that an exact variant may have
LIMITS = {"float32": 2e-5, "bfloat16": 5e-2, "float16": 1e-2}
#: part of a call that is timed -> its passes
PARTS = {"both": ("forward", "backward"), "forward": ("forward",), "backward": ("backward",)}

#: None is a zero gradient: autograd leaves it out
Gradients = Sequence["torch.Tensor | None"]


@dataclass(frozen=True)
class Run:
    """A variant ready to be measured.

    Attributes:
        call: one forward and backward; returns the gradients.
        reset: frees the gradients afterwards, outside the clock; None where they are gone with the result of `call`.
    """

    call: Callable[[], Gradients]
    reset: Callable[[], None] | None = None


@dataclass(frozen=True, eq=False)
class Variant:
    """One way to compute the case.

    Attributes:
        name: as in the rows.
        make: builds the inputs (and the model) of a length.
        truth: the exact gradients of a length, in float64, for the same inputs.
        exact: whether the gate judges the error; otherwise it is only reported (finite differences).
        optional: left out with a note where it raises.
        backend: a backend by name in place of the one in use.
        rounds: at most so many timed runs (slow peers).
        peak: whether its peak is taken where the case measures memory.
        flops, bytes: arithmetic and memory traffic of one call, for the rates.
        gradient_bytes: size of the gradients, where memory is bounded beside them.
        bounds: ``ratio``, ``peak_ratio``, ``extra_bytes``, ``ms``, ``copy_ratio``, ``over X`` (the ratio to the
            variant X) -> largest value.
        peer: a variant that this one has to beat.
        key: the same for variants, also of other cases, that compute the same; the gate judges them once.
        compiled: torch compiles it first, which takes long; ``--quick`` leaves it out.
        work: its kernels in the roofline model; empty where it is not modelled.
    """

    name: str
    make: Callable[[int], Run]
    truth: Callable[[int], Gradients]
    exact: bool = True
    optional: bool = False
    backend: str | None = None
    rounds: int | None = None
    peak: bool = True
    flops: float | None = None
    bytes: float | None = None
    gradient_bytes: int | None = None
    bounds: Mapping[str, float] = field(default_factory=dict)
    peer: str | None = None
    key: Hashable = None
    compiled: bool = False
    work: tuple[Work, ...] = ()


@dataclass(frozen=True, eq=False)
class Case:
    """Variants to be compared at one length, in one dtype, on one device.

    Attributes:
        base: variants that ratios may refer to; the fastest of them is taken.
        gate_length: largest length at which gradients are compared with float64.
        repeats: timed rounds unless ``--repeats`` sets others.
        timed: False for a case that only measures memory.
        peak: whether the peak of memory is measured by default.
        warm_length: run once before the peak is taken, so that code and small buffers are in place.
        seconds: a sample of a short variant repeats it until it lasts about this long.
        graph: on a device, calls are replayed from a captured graph, so that short kernels do not wait for Python.
        large: takes minutes; ``--quick`` leaves it out.
        part: of :data:`PARTS`.
        why: the comparison in a few words.
    """

    suite: str
    family: str
    dtype: str
    length: int
    variants: tuple[Variant, ...]
    base: tuple[str, ...]
    config: Mapping[str, Any]
    gate_length: int = 67
    repeats: int = 20
    timed: bool = True
    peak: bool = False
    warm_length: int = 64
    device: str = "cpu"
    seconds: float = 0.02
    graph: bool = False
    large: bool = False
    part: str = "both"
    why: str = ""

    @property
    def name(self) -> str:
        part = "" if self.part == "both" else f" {self.part}"
        return f"{self.suite}:{self.family} {self.dtype} {self.length}{part}"

    def variant(self, name: str) -> Variant:
        return next(variant for variant in self.variants if variant.name == name)


@dataclass(frozen=True)
class Selection:
    """The cases to make; None leaves a suite its own choice.

    Attributes:
        part: of :data:`PARTS`, for suites that have them.
        device: where it runs, for suites that are not bound to one.
    """

    dtypes: tuple[str, ...] | None = None
    lengths: tuple[int, ...] | None = None
    families: tuple[str, ...] | None = None
    part: str = "both"
    device: str = "cpu"

    @property
    def bounded(self) -> bool:
        """Whether the bounds of suites that run anywhere hold: they are of whole calls on a CPU."""
        return self.part == "both" and self.device == "cpu"

    def wants(self, family: str) -> bool:
        return self.families is None or family in self.families

    def case(
        self, suite: str, family: str, dtype: str, length: int, variants: Sequence[Variant], **options: Any
    ) -> Case:
        """A case of the part and on the device that are selected."""
        options = {"part": self.part, "device": self.device, **options}
        return Case(suite, family, dtype, length, tuple(variants), **options)

    def grid(self, dtypes: Sequence[str], lengths: Sequence[int]) -> list[tuple[str, int]]:
        """Pairs of dtype and length, selected or from these defaults."""
        return [(dtype, n) for dtype in self.dtypes or dtypes for n in self.lengths or lengths]


@dataclass(frozen=True)
class Suite:
    """A named set of families of cases; those for a device run where there is one, or are modelled.

    Attributes:
        device: ``cuda``: it runs nowhere else; ``cpu``: there, or on ``--device``.
        usual: whether it is part of a run that names no suite.
        parts: whether forward and backward can be timed apart when asked for.
    """

    name: str
    summary: str
    families: tuple[str, ...]
    cases: Callable[[Selection], list[Case]]
    device: str = "cpu"
    usual: bool = True
    parts: bool = True


def has_kernels(op: str, device: str = "cpu") -> bool:
    """Whether ``auto`` runs the op on kernels there, so that its reference is another variant."""
    return choice.select_backend(op, torch.zeros(1, device=device)) != "reference"


def compiled(scalar: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """By torch.compile, for the shapes as they are.

    A run compiles the same functions of transformers for many models and lengths; past its limit of recompilations
    torch would go on without compiling, in silence but for a line in the log.
    """
    torch.compiler.config.recompile_limit = 256
    function: Callable[..., torch.Tensor] = torch.compile(scalar, dynamic=False)
    return function


def portion(
    forward: Callable[[], torch.Tensor],
    leaves: Sequence[torch.Tensor],
    cotangent: torch.Tensor | None,
    part: str = "both",
) -> Run:
    """``"both"`` passes of a function, its ``"forward"`` as training runs it, or its ``"backward"`` again and again."""
    if part == "both":
        return Run(lambda: torch.autograd.grad(forward(), leaves, cotangent, allow_unused=True))
    if part == "forward":
        return Run(lambda: [forward().detach()])
    out = forward()
    return Run(lambda: torch.autograd.grad(out, leaves, cotangent, retain_graph=True, allow_unused=True))


def step_run(
    parameters: Sequence[torch.Tensor],
    scalar: Callable[[], torch.Tensor],
    context: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> Run:
    """A training step in a context: the gradients stand in ``.grad``, which is freed between the timed calls."""

    def call() -> Gradients:
        with context():
            scalar().backward()
        return [p.grad for p in parameters]

    def reset() -> None:
        for p in parameters:
            p.grad = None

    return Run(call, reset)


def true_portion(
    out: torch.Tensor, leaves: Sequence[torch.Tensor], cotangent: torch.Tensor | None, part: str = "both"
) -> Gradients:
    """The exact result of :func:`portion`, from the exact `out`."""
    if part == "forward":
        return [out.detach()]
    return torch.autograd.grad(out, leaves, cotangent, allow_unused=True)


def draw(*shape: int, dtype: str, seed: int = SEED) -> torch.Tensor:
    """Normal numbers, rounded to the dtype; drawn where ``with torch.device`` says, by default on the CPU."""
    generator = torch.Generator(torch.get_default_device()).manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(DTYPES[dtype])
