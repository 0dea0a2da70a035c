"""Stage `choices`: what the package takes against what it could take, by device time of forward and backward.

A choice is a kind of :mod:`.kinds` and, for every alternative, attributes with other values. To add one, add a line.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from aajr_kernels.backends import selfcheck
from aajr_kernels.backends.choice import implementation

from .kernels import kernel_times, replaced
from .kinds import Sized, kinds
from .stage import Stage

#: name of a kind -> alternative -> attributes: module, name, value
Choices = dict[str, dict[str, list[tuple[Any, str, Any]]]]


def choices() -> Choices:
    from aajr_kernels.ops.attention import triton as attention
    from aajr_kernels.ops.attention.triton import problem
    from aajr_kernels.ops.norm import triton as norm

    pointers: dict[str, list[tuple[Any, str, Any]]] = {
        "pointers": [(module, "descriptors_fit", lambda *_: False) for module in (attention, problem)]
    }
    loose = {"operands not pinned": [(problem.Problem, "pinned", lambda self, kernel: False)]}
    programs = {
        f"{count} programs": [(norm, "_PROGRAMS", dict.fromkeys(norm._PROGRAMS, count))]
        for count in (132, 528, 1056)
    }
    return {
        "attention D128 causal": {**pointers, **loose},
        "attention D64 causal": {**pointers, **loose},
        "attention D128 packed": loose,
        "rms_norm 2048": programs,
        "attention D64 float32": {},
        "lm_head_sensitivity joint": {},
    }


def run(stage: Stage) -> None:
    by_name = {one.name: one for one in kinds(stage.dry)}
    for name, alternatives in choices().items():
        if name not in by_name:
            continue
        one = by_name[name]
        others = ["reference"] if one.kind.backend != "reference" else []
        for label, patches in {"as it is": [], **alternatives, **{other: [] for other in others}}.items():
            if stage.left < 4 and not stage.dry:
                stage.row(f"{name}: {label}", "left out", reason="no time")
                continue
            try:
                with replaced(*patches):
                    backend = label if label in others else one.kind.backend
                    times = kernel_times(stage, both_passes(one, backend))
            except Exception as error:
                stage.row(f"{name}: {label}", "failed", reason=f"{type(error).__name__}: {error}"[:400])
                continue
            total = sum(us * count for us, count in times.values())
            kernels = {kernel: round(us, 1) for kernel, (us, _) in list(times.items())[:6]}
            stage.row(f"{name}: {label}", us=round(total, 1), kernels=kernels)


def both_passes(one: Sized, backend: str) -> Callable[[], Any]:
    """Forward and backward of a trial."""
    kind = one.kind
    generator = torch.Generator(kind.device).manual_seed(0)

    def draw(dtype: torch.dtype | None, *shape: int) -> torch.Tensor | None:
        if dtype is None:
            return None
        return torch.randn(shape, generator=generator, device=kind.device).to(dtype)

    trial = implementation(kind.op, "function").trial
    operands, run = trial(draw, kind.name, kind.dtypes, kind.sizes, *kind.features, length=one.length)
    leaves = [
        x.detach().requires_grad_() if x is not None and x.is_floating_point() else x
        for x in operands.values()
    ]
    inputs = [x for x in leaves if x is not None and x.requires_grad]
    bars: list[torch.Tensor] = []

    def call() -> Any:
        outputs = [t for t in run(backend, *leaves) if t is not None]
        if not bars:
            bars.extend(selfcheck.cotangent(t.shape, t.device).to(t.dtype) for t in outputs)
        return torch.autograd.grad(outputs, inputs, bars, allow_unused=True)

    return call
