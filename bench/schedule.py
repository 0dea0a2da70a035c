"""The order of programs of the attention kernels, simulated: the share of a device that they keep busy.

    python -m bench.schedule              print the table
    python -m bench.schedule --write      and put it into docs/triton.md

Nothing runs. The launchers' grids are recorded, and the kernels' own functions say which block of which head a program
takes and how far its loop goes. Programs start in order, each on the multiprocessor that is free first, and take one
unit of time per tile of their loop and one for all before and after it. The share is the time of an even division of
the work over the time until the last program ends. Shares of "blocks first" are of the same work where all blocks of a
head start before those of the next one, and no group is split.
"""

from __future__ import annotations

import heapq
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from aajr_kernels.backends.triton import launch as gpu
from aajr_kernels.ops.attention.options import Options
from common import pages

PAGE = Path(__file__).resolve().parent.parent / "docs" / "triton.md"
BEGIN, END = "<!-- schedule: python -m bench.schedule --write -->", "<!-- end of schedule -->"
MULTIPROCESSORS = 132


@dataclass(frozen=True)
class Shape:
    """One call of attention in bfloat16, with a tangent of every operand, after a context of so many keys."""

    batch: int
    heads: int
    key_heads: int
    length: int
    head_size: int = 128
    causal: bool = True
    window: int | None = None
    context: int = 0

    def __str__(self) -> str:
        mask = f"window {self.window}" if self.window else "causal" if self.causal else "full"
        length = f"{self.context}+{self.length}" if self.context else self.length
        return f"B{self.batch} H{self.heads}/{self.key_heads} S{length} D{self.head_size} {mask}"


SHAPES = (
    Shape(1, 32, 8, 1024),
    Shape(1, 32, 8, 2048),
    Shape(1, 32, 8, 4096),
    Shape(4, 32, 8, 4096),
    Shape(1, 32, 8, 8192, window=1024),
    Shape(1, 24, 24, 8192),
    Shape(1, 24, 24, 8192, causal=False),
    Shape(8, 12, 12, 512, head_size=64),
    Shape(4, 32, 8, 2048, head_size=64),
    Shape(1, 32, 8, 1024, context=3072),
)


@dataclass(frozen=True)
class Program:
    """Head, block and units of time of a program; parts of a key head's group are heads of their own."""

    head: int
    block: int
    time: int


@dataclass(frozen=True)
class Launch:
    """The programs of one launch in the order in which they start.

    Attributes:
        name: the gradients or outputs that it computes.
        programs: in order.
        tile: pairs of a query and a key in a unit of time.
        parts: programs that share the query heads of a key head.
    """

    name: str
    programs: list[Program]
    tile: int
    parts: int = 1

    def blocks_first(self) -> list[int]:
        """Times where the blocks of a head start before those of the next, and no group is split."""
        times: dict[tuple[int, int], int] = {}
        order = {program.block: None for program in self.programs}
        for program in self.programs:
            at = program.head // self.parts, program.block
            times[at] = times.get(at, 1) + program.time - 1
        heads = 1 + max(head for head, _ in times)
        return [times[at] for at in itertools.product(range(heads), order)]


def launches(shape: Shape, architecture: str = "sm_90") -> Iterator[Launch]:
    """Those of forward and backward, as the launchers make them."""
    from aajr_kernels.ops.attention import triton as launchers

    recorded: list[tuple[Any, ...]] = []
    sizes = [
        (2, shape.batch, shape.heads, shape.length, shape.head_size),
        (2, shape.batch, shape.key_heads, shape.length, shape.head_size),
        (1, shape.batch, shape.key_heads, shape.context, shape.head_size),
    ]
    q, k, before = (torch.empty(size, dtype=torch.bfloat16, device="meta") for size in sizes)
    options = Options(1.0, offset=shape.context if shape.causal else None, window=shape.window)
    needs: tuple[bool, ...] = (True, True, True, False)
    if shape.context:
        options, needs = options._replace(context_k=before, context_v=before), (*needs, True, True)
    with gpu.recording(lambda *launch: recorded.append(launch), architecture):
        saved = launchers.attention_fwd(q, k, k, None, options)
        launchers.attention_bwd(saved[0], q, k, k, None, *saved, options, needs)
    for kernel, grid, args, constants in recorded:
        values = {**dict(zip(kernel.arg_names, args)), **constants}
        if "_rows_" not in kernel.__name__ and "_sum_" not in kernel.__name__:
            yield _launch(kernel.__name__, grid, values)


def _launch(kernel: str, grid: tuple[int, int, int], values: dict[str, Any]) -> Launch:
    from aajr_kernels.ops.attention.triton import schedule

    of_keys = "_kv_" in kernel
    visible = schedule.visible_queries if of_keys else schedule.visible_keys
    own, other = (values[name] for name in (("BLOCK_N", "BLOCK_M") if of_keys else ("BLOCK_M", "BLOCK_N")))
    length = values["N"] if of_keys else values["M"]
    constants = [values[x] for x in ("window", "BLOCK_M", "BLOCK_N", "CAUSAL", "WINDOW")]
    # keys, and the offset of the diagonal, of every loop
    loops = [(length, values["offset"])]
    if not of_keys and values["C"] is not None:
        loops.append((values["C"], values["offset"] + values["C"]))
    share = values["SHARE"] if of_keys else 1
    last_first = values.get("LAST_FIRST", True)  # the last queries see the most keys
    programs = []
    width, height, depth = grid
    for z, y, x in itertools.product(range(depth), range(height), range(width)):
        head, block = schedule.place.fn(x, y, z, width, height, last_first)
        ranges = [visible.fn(block * own, size, offset, *constants) for size, offset in loops]
        tiles = sum(max(0, -(-(high - low) // other)) for low, high in ranges)
        programs.append(Program(head, block, 1 + share * tiles))
    if of_keys:
        gradients = {name: values[f"NEED_{name}"] for name in ("K", "V")}
        name = " and ".join({"K": "keys", "V": "values"}[x] for x, needed in gradients.items() if needed)
        name = name if values["K_TAN"] else f"{name} of the context"
        return Launch(name, programs, own * other, values["GROUP"] // share)
    return Launch("forward" if "_fwd_" in kernel else "queries", programs, own * other)


def share(times: Iterable[int], multiprocessors: int = MULTIPROCESSORS) -> float:
    """The even division of all times over the time until the last one ends, greedily in order."""
    times = list(times)
    free = [0] * multiprocessors
    for time in times:
        heapq.heapreplace(free, free[0] + time)
    return sum(times) / multiprocessors / max(free)


def table(shapes: Iterable[Shape] = SHAPES) -> str:
    """Shares of every launch, blocks first and as launched, in Markdown."""
    rows = []
    for shape in shapes:
        for i, launch in enumerate(launches(shape)):
            split = f", {launch.parts} parts" if launch.parts > 1 else ""
            shares = [share(launch.blocks_first()), share(program.time for program in launch.programs)]
            rows.append(
                ["" if i else shape, launch.name, f"{len(launch.programs):,}{split}"]
                + [f"{x:.2f}" for x in shares]
            )
    text = f"Simulated for {MULTIPROCESSORS} multiprocessors, bfloat16, one tangent, tiles of sm_90:"
    return f"{text}\n\n" + pages.table(["attention", "kernel", "programs", "blocks first", "share"], rows)


def main(arguments: list[str], show: Callable[[str], None] = print) -> None:
    text = table()
    show(text)
    if "--write" in arguments:
        pages.between(PAGE, BEGIN, END, text)


if __name__ == "__main__":
    main(sys.argv[1:])
