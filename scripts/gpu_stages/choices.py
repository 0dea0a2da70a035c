"""Stage `choices`: what the package takes against what it could take, by device time of forward and backward.

A choice is a kind of :mod:`.kinds` and, for every alternative, attributes with other values. To add one, add a line.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

from aajr_kernels.backends.triton import launch

from .kernels import kernel_times
from .kinds import both_passes, kinds
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
    programs: dict[str, list[tuple[Any, str, Any]]] = {
        f"{count} programs": [(norm, "_resident", lambda *_, count=count: count)]
        for count in (132, 528, 1056)
    }
    return {
        "attention D128 causal": {**pointers, **loose},
        "attention D64 causal": {**pointers, **loose},
        "attention D128 packed": loose,
        "rms_norm 2048": programs,
        "attention D64 float32": {"products of float32": [(launch, "_TF32X3", ())]},
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
                    times = kernel_times(stage, both_passes(one.kind, one.length, backend))
            except Exception as error:
                stage.row(f"{name}: {label}", "failed", reason=f"{type(error).__name__}: {error}"[:400])
                continue
            total = sum(us * count for us, count in times.values())
            kernels = {kernel: round(us, 1) for kernel, (us, _) in list(times.items())[:6]}
            stage.row(f"{name}: {label}", us=round(total, 1), kernels=kernels)


@contextlib.contextmanager
def replaced(*patches: tuple[Any, str, Any]) -> Iterator[None]:
    """Attributes with other values inside the block, which calls recorded before do not outlive."""
    try:
        with contextlib.ExitStack() as attributes:
            for patch in patches:
                attributes.enter_context(mock.patch.object(*patch))
            launch.forget()
            yield
    finally:
        launch.forget()
