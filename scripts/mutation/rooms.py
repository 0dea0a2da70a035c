"""Rooms of the house: their sources, and the tests that should see a fault in each."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

__all__ = ["ROOMS", "Room"]

#: of C++ and Triton kernels: the op by a part of the file's name, first match
OPS = ("activation", "attention", "head", "linear", "math", "norm", "rotary", "sensitivity")
FENCED = "tests/backends/test_argument_fuzz.py::test_memory_beside_tensors_is_not_touched"
#: of sources that several ops include
SHARED = {"gemm": ("head", "attention"), "rows": ("linear", "rotary", "norm")}


@dataclass(frozen=True)
class Room:
    """A part of the package.

    Attributes:
        name: of it.
        patterns: of the sources, for git.
        traced: what pytest collects; of these a fault gets the tests that call its function.
        processes: part of a source's name, and tests that start processes, slow ones too, which a fault in what
            these count together gets last.
        tests: without `traced`: from a source to what pytest gets, nearest tests first.
        slow: whether `tests` are also slow ones.
        named: of these tests only those that pytest's ``-k`` selects by it.
        module: the compiled module that the sources go into, or None.
        limit: processor seconds of those tests with a fault.
        skipped: sources whose faults no test of this machine could see, with the reason.
    """

    name: str
    patterns: tuple[str, ...]
    traced: tuple[str, ...] = ()
    processes: tuple[tuple[str, str], ...] = ()
    tests: Callable[[str], list[str]] = lambda _: []
    slow: bool = False
    named: str = ""
    module: str | None = None
    limit: int = 120
    skipped: tuple[tuple[str, str], ...] = ()

    def sources(self, root: Path) -> list[str]:
        """Paths from the root, in git's order."""
        listed = subprocess.run(
            ["git", "ls-files", *self.patterns], cwd=root, text=True, stdout=subprocess.PIPE, check=True
        ).stdout.split()
        return [path for path in listed if not any(part in path for part, _ in self.skipped)]


def _op_of(path: str) -> str | None:
    parts = path.replace("gated", "activation").replace("elementwise", "activation")
    return next((op for op in OPS if op in parts), None)


def _native(path: str) -> list[str]:
    op = _op_of(path)
    ops = SHARED.get(Path(path).stem, OPS) if op is None else [op]
    own = [f"tests/backends/cpu/test_{name}.py" for name in ops]
    more = ("tests/backends/cpu/test_cross.py", FENCED)
    return [*own, *more, *(test for name in ops for test in _op_tests(name))]


def _op_tests(op: str) -> list[str]:
    names = {
        "attention": ["attention", "attention_behaviour", "attention_context"],
        "head": ["head", "head_counted"],
        "math": [],
    }
    return [f"tests/ops/test_{name}.py" for name in names.get(op, [op])]


def _cuda(path: str) -> list[str]:
    ops = [_op_of(path)] if _op_of(path) else ["norm", "sensitivity"]
    return ["tests/backends/test_cuda.py", FENCED, *(f"tests/ops/test_{op}.py" for op in ops)]


def _triton(path: str) -> list[str]:
    op = _op_of(path)
    tests = "tests/backends/triton"
    if op is None:
        return [
            f"{tests}/test_{name}.py"
            for name in (
                "rows",
                "devices",
                "norm",
                "sensitivity",
                "activation",
                "rotary",
                "head",
                "attention",
            )
        ]
    more = {
        "attention": ["attention_context", "masks", "lengths"],
        "head": ["head_counted"],
        "norm": ["rows"],
    }
    return [*(f"{tests}/test_{name}.py" for name in (op, *more.get(op, []))), *_op_tests(op)]


ROOMS = {
    room.name: room
    for room in (
        Room(
            "method",
            ("aajr_kernels/method/*.py",),
            ("tests/method", "tests/training", "tests/integrations/trainer/test_dialogue.py"),
            (("", "tests/method/test_distributed.py"),),
        ),
        Room(
            "rules",
            ("aajr_kernels/rules/*.py",),
            ("tests/rules", "tests/test_dual.py", "tests/test_coverage.py"),
        ),
        Room(
            "training",
            ("aajr_kernels/training/*.py",),
            (
                "tests/training",
                "tests/integrations/trainer",
                "tests/faults/test_interruptions.py::test_rows_are_on_the_disk_before_the_checkpoint_that_they_belong_to",
            ),
            (
                (
                    "wrappers",
                    "tests/integrations/distributed/test_distributed.py::test_a_shared_context_under_fsdp2",
                ),
                ("", "tests/training/test_constraint_runs.py"),
            ),
            skipped=(("report.py", "the text of a page"), ("progress.py", "the text of a line")),
        ),
        Room(
            "cpp",
            ("csrc/*.cpp", "csrc/*.h", "csrc/cpu/*", "csrc/ops/*"),
            tests=_native,
            named="cpu or native",  # the folder, and targets of the suite of all backends
            module="_native",
            skipped=(
                ("csrc/cuda", "a room of its own"),
                ("csrc/tests", "tests"),
                ("amx", "needs a processor with AMX"),
                ("bindings", "no arithmetic"),
            ),
        ),
        Room(
            "triton",
            (
                "aajr_kernels/ops/**/triton*.py",
                "aajr_kernels/ops/attention/triton/*.py",
                "aajr_kernels/backends/triton/*.py",
            ),
            tests=_triton,
            slow=True,
            named="triton",
            limit=1200,
            skipped=(
                ("triton/replay.py", "launches of compiled kernels by a stub driver: test_replay.py"),
                ("triton/direct.py", "the same"),
                ("__init__.py", "choice of tiles"),
            ),
        ),
        Room(
            "cuda",
            ("csrc/cuda/*.cu", "csrc/cuda/*.cuh", "csrc/cuda/*.h"),
            tests=_cuda,
            named="cuda",
            module="_cuda_host",
            skipped=(
                ("host/", "the stand-in of a device"),
                ("launch", "grids of a device"),
                ("facts", "asks the compiler"),
            ),
        ),
    )
}
