"""`python -m bench --tune`: measures tiles of the attention kernels on the device and writes the best into the table.

Every candidate is compared with the default tile first; one that is wrong, does not compile or does not fit is left out
with the reason. Times are of one kernel at a time, on inputs as a language model has them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.benchmark import Timer

from aajr_kernels.backends.triton import launch as gpu
from aajr_kernels.ops.attention import configs
from aajr_kernels.ops.attention.options import Options
from aajr_kernels.training.progress import Progress

from .tables import grid

#: kernels and which gradients of q, k, v make the backward launch them
NEEDS = {
    "fwd": None,
    "dq": (True, False, False, False),
    "dk": (False, True, False, False),
    "dv": (False, False, True, False),
    "dkv": (False, True, True, False),
}
QUERY_SIDE = ("fwd", "dq")
HEADS, KEY_HEADS = 16, 4


@dataclass
class Line:
    """A line of the table: milliseconds of the tiles that are right, and why the others are left out."""

    name: str
    times: dict[configs.Sizes, float] = field(default_factory=dict)
    left_out: dict[configs.Sizes, str] = field(default_factory=dict)

    @property
    def best(self) -> configs.Sizes | None:
        return min(self.times, key=lambda sizes: self.times[sizes], default=None)


def candidates(kernel: str, arch: str) -> Iterator[configs.Sizes]:
    """Tiles worth trying. A group of 4 warps multiplies 64 rows at a time from sm_90 on, fewer would be idle."""
    for own, other, warps, stages in itertools.product((64, 128), (16, 32, 64, 128), (4, 8), (1, 2, 3)):
        if other <= own and (arch not in ("sm_90", "sm_100") or own >= 16 * warps):
            yield (own, other, warps, stages) if kernel in QUERY_SIDE else (other, own, warps, stages)


def calls(
    kernel: str, head: int, causal: bool, length: int, dtype: torch.dtype, device: str
) -> Callable[[], Any]:
    """A call whose time is the kernel's (with the pass over rows in the backward); returns its results."""
    from aajr_kernels.ops.attention import triton as launchers

    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 1, heads, length, head) for heads in (HEADS, KEY_HEADS, KEY_HEADS)]
    q, k, v = (torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes)
    options, needs = Options(head**-0.5, offset=0 if causal else None), NEEDS[kernel]
    if needs is None:
        return lambda: launchers.attention_fwd(q, k, v, None, options)[:1]
    saved = launchers.attention_fwd(q, k, v, None, options)
    bar = torch.randn(saved[0].shape, generator=generator).to(device, dtype)
    return lambda: launchers.attention_bwd(bar, q, k, v, None, *saved, options=options, needs=needs)


def measure(
    kernel: str,
    head: int,
    causal: bool,
    *,
    timer: Callable[[Callable[[], Any]], float],
    length: int = 4096,
    dtype: torch.dtype = torch.bfloat16,
    device: str = "cuda",
    tried: Iterator[configs.Sizes] | None = None,
    progress: Callable[[], None] = lambda: None,
) -> Line:
    """Times of all candidates for one line of the table.

    Args:
        kernel: a key of NEEDS.
        head: head size; stands for all of its class (up to 64, 128, 256).
        causal: whether keys above the diagonal are hidden.
        timer: milliseconds of a call.
        length, dtype, device: of the inputs.
        tried: candidates instead of the usual ones.
        progress: called after every candidate.
    """
    arch = gpu.architecture(torch.device(device))
    limit = 64 if head <= 64 else 128 if head <= 128 else 256
    line = Line(configs.key(kernel, arch, dtype, limit, causal))
    call = calls(kernel, head, causal, length, dtype, device)
    expected = call()
    for sizes in candidates(kernel, arch) if tried is None else tried:
        try:
            with configs.trial(line.name, sizes):
                error = _difference(call(), expected)
                if error < 4 * torch.finfo(dtype).eps:
                    line.times[sizes] = timer(call)
                else:
                    line.left_out[sizes] = f"differs from the default by {error:.1e}"
        except Exception as reason:  # of the compiler, the driver or memory: this tile is not for this device
            line.left_out[sizes] = f"{type(reason).__name__}: {reason}".partition("\n")[0]
        progress()
    return line


def _difference(results: Any, expected: Any) -> float:
    """Largest relative difference of any result, infinite where one is NaN."""
    errors = [
        ((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30)).item()
        for a, b in zip(results, expected)
        if isinstance(a, Tensor)
    ]
    return max(error if error == error else float("inf") for error in errors)


def on_device(head_sizes: tuple[int, ...] = (64, 128)) -> list[Line]:
    """Measure every line for the device, with progress; the best tiles are written into the table."""
    # one kernel for keys and values up to 64, two above
    jobs = [
        (kernel, head, causal)
        for head in head_sizes
        for causal in (False, True)
        for kernel in NEEDS
        if kernel in QUERY_SIDE or (kernel == "dkv") == (head <= 64)
    ]
    arch = gpu.architecture(torch.device("cuda"))
    timer: Callable[[Callable[[], Any]], float] = lambda call: (
        Timer("call()", globals={"call": call}).blocked_autorange(min_run_time=0.2).median * 1e3
    )
    lines = []
    with Progress() as progress:
        progress.stage(f"tiles on {arch}", sum(len(list(candidates(kernel, arch))) for kernel, *_ in jobs))
        for kernel, head, causal in jobs:
            lines.append(measure(kernel, head, causal, timer=timer, progress=progress.step))
            if (best := lines[-1].best) is not None:
                configs.write({lines[-1].name: best})  # an interrupted run keeps the lines before
    return lines


def show(lines: list[Line], console: Any) -> None:
    """The best tile of every line beside the next best, and how many were left out."""
    rows = []
    for line in lines:
        best = "none" if line.best is None else ", ".join(map(str, line.best))
        times = [*(f"{t:.3f}" for t in sorted(line.times.values())[:2]), "", ""]
        rows.append((line.name, best, *times[:2], str(len(line.left_out))))
    header = ("line", "best (queries, keys, warps, stages)", "ms", "next, ms", "left out")
    console.print(grid(header, rows, left=header[:2]))
    console.print(f"written to {configs.PATH}")
