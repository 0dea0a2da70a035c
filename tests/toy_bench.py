"""A suite of benchmarks whose variants take as long as they are told, and the command that runs it."""

from __future__ import annotations

import torch
from typer.testing import CliRunner

from bench import row
from bench.__main__ import bench as command
from bench.case import Case, Run, Selection, Variant
from bench.run import Outcome, run_case
from common.command import application

FACTS = row.environment()


def invoke(*arguments: object, exit_code: int = 0) -> str:
    result = CliRunner().invoke(application(command), [*map(str, arguments)])
    assert result.exit_code == exit_code, result.output
    return result.output


class Toy:
    """A case whose variants take as long as they are told, by a clock of their own, and are right or wrong."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls: list[str] = []
        self.resets = 0
        self.variants = [self.variant("plain"), self.variant("dual", seconds=1.5, bounds={"ratio": 2.0})]

    def perf_counter(self) -> float:
        return self.now

    def variant(self, name: str, *, gradient: float = 2.0, seconds: float = 1.0, **options) -> Variant:
        def make(length: int) -> Run:
            x = torch.ones(length)

            def call():
                self.calls.append(name)
                self.now += seconds * (1 + 0.1 * len(self.calls))
                return [gradient * x]

            return Run(call, self.reset)

        return Variant(name, make, lambda length: [2.0 * torch.ones(length, dtype=torch.float64)], **options)

    def reset(self) -> None:
        self.now += 100.0  # outside the clock
        self.resets += 1

    def cases(self, selection: Selection) -> list[Case]:
        return [
            Case(
                "toy", "only", dtype, n, tuple(self.variants), ("plain",), {"a": 1}, gate_length=3, repeats=4
            )
            for dtype, n in selection.grid(("float32",), (8,))
        ]

    def run(self, **options) -> Outcome:
        self.calls.clear()
        return run_case(self.cases(Selection())[0], FACTS, **options)
