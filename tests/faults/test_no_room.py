"""Files of results on a disk that fills up in the middle of a write stay as they were; the error names them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from benchmark_rows import PLAIN
from faults.children import files_of_at_most, in_a_child
from faults.scale import scaled

from aajr_kernels import files
from aajr_kernels.backends.selfcheck_record import Record
from bench import row as bench_files
from bench.row import Row
from common.trust import count
from experiments.store import Store, read


def a_benchmark(path: Path, number: int) -> None:
    bench_files.append_rows(path, [Row(**PLAIN | {"min_ms": float(number + part)}) for part in (0, 100)])


def an_experiment(path: Path, number: int) -> None:
    store = Store(path, "squares", {"numbers": [1, 2, 3]})
    store.add(f"n{number}", [{"number": number}, {"number": -number}], 0.0)


def a_page(path: Path, number: int) -> None:
    files.write_text(path, f"<p>{number}</p>\n" * 100)


def results_of_a_benchmark(path: Path) -> list[float]:
    return [row.min_ms for row in bench_files.read_rows(path)]


def results_of_an_experiment(path: Path) -> list[str]:
    return [row["task"] for row in read(path)[1]]


@scaled(quick=6)
@pytest.mark.parametrize(
    ("write", "results"),
    [
        (a_benchmark, results_of_a_benchmark),
        (an_experiment, results_of_an_experiment),
        (a_page, Path.read_text),
    ],
    ids=["a_benchmark", "an_experiment", "a_page"],
)
def test_a_file_of_results_stays_as_it_was(
    drawn, write: Callable[[Path, int], None], results: Callable[[Path], Any], tmp_path
):
    expected = {}
    for numbers in ((1,), (1, 2), (1, 3), (1, 2, 3)):
        path = tmp_path / f"expected{len(expected)}"
        for number in numbers:
            write(path, number)
        expected[numbers] = results(path)
    path = tmp_path / "results"
    write(path, 1)
    before = path.read_bytes()
    write(path, 2)
    last = len(path.read_bytes()) + 1
    for size in drawn(range(0, last, 7)):
        path.write_bytes(before)

        def work(size: int = size) -> None:
            with files_of_at_most(size):
                write(path, 2)

        code, said = in_a_child(work)
        if code == 0:
            numbers: tuple[int, ...] = (1, 2)
        else:
            assert code == 1 and str(path) in said, (size, said)
            assert path.read_bytes() == before, size
            numbers = (1,)
        assert results(path) == expected[numbers], size
        assert sorted(p.name for p in tmp_path.iterdir()) == [*(f"expected{n}" for n in range(4)), "results"]
        write(path, 3)
        assert results(path) == expected[(*numbers, 3)], size
        count("full disks", sizes=1)


@scaled(quick=6)
def test_a_kernel_whose_failure_found_no_room_is_not_taken(drawn, tmp_path):
    """Its check began, and the next process sees that it did not end."""
    path = tmp_path / "device.jsonl"
    Record("device", path).end("good", "")
    before = path.read_bytes()
    for size in drawn(range(0, 400, 3)):
        path.write_bytes(before)

        def work(size: int = size) -> None:
            record = Record("device", path)
            record.begin("bad")
            with files_of_at_most(size):
                record.end("bad", "wrong in float16")

        code, said = in_a_child(work)
        assert code == 0, said
        read_back = Record("device", path)
        assert read_back.outcome("good") == "" and read_back.outcome("bad"), size
        count("full disks", sizes=1)
