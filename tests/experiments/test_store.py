"""Rows that survive an interruption, tasks that run once, and the command that runs them."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

from aajr_kernels.files import row_line
from common.command import application
from common.pages import table
from experiments.__main__ import experiment
from experiments.base import Experiment, Task, run_experiment
from experiments.store import Store, read
from experiments.summaries import interval_text

COUNTED: list[int] = []


def work(number: int) -> list[dict[str, object]]:
    COUNTED.append(number)
    if number == 13:
        raise RuntimeError("interrupted")
    return [{"number": number, "square": number**2}, {"number": number, "square": None}]


def experiment_of(numbers: list[int]) -> Experiment:
    return Experiment(
        "squares",
        lambda quick: {"numbers": numbers[:1] if quick else numbers},
        lambda config: [Task(f"n{n}", {"number": n}) for n in config["numbers"]],
        work,
        lambda header, rows, folder: f"{len(rows)} rows\n",
    )


@pytest.fixture(autouse=True)
def fresh_count() -> None:
    COUNTED.clear()


def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path):
    path, whole = tmp_path / "rows.jsonl", experiment_of([1, 2, 13, 4])
    with pytest.raises(RuntimeError):
        run_experiment(whole, Store(path, "squares", whole.config(False)))
    assert [row["number"] for row in read(path)[1]] == [1, 1, 2, 2]
    with path.open("a") as file:  # a row of a task whose others are missing, and a torn line
        file.write(
            row_line({"task": "n4", "of": 2, "seconds": 0.0, "number": 4, "square": 0}) + '{"task": "n'
        )
    assert len(read(path)[1]) == 4
    store = Store(path, "squares", whole.config(False))
    assert store.has("n2") and not store.has("n4")
    COUNTED.clear()
    with pytest.raises(RuntimeError):
        run_experiment(whole, store)
    assert COUNTED == [13]
    for line in path.read_text().splitlines():
        json.loads(line)
    header, _ = read(path)
    assert header["config"] == {"numbers": [1, 2, 13, 4]} and header["environment"]["torch"]


def test_progress_and_quick(tmp_path):
    seen = []
    small = experiment_of([3, 4, 5])
    store = Store(tmp_path / "rows.jsonl", "squares", small.config(True))
    run_experiment(small, store, quick=True, progress=lambda *a: seen.append(a))
    assert seen == [(0, 1, ""), (1, 1, "n3")]
    run_experiment(small, store, quick=True, progress=lambda *a: seen.append(a))
    assert seen[2:] == [(1, 1, "")] and COUNTED == [3]


def test_other_configurations_and_bad_rows_are_refused(tmp_path):
    path = tmp_path / "rows.jsonl"
    store = Store(path, "squares", {"a": (1, 2)})
    Store(path, "squares", {"a": [1, 2]})
    with pytest.raises(ValueError, match="another configuration"):
        Store(path, "squares", {"a": [1, 3]})
    with pytest.raises(ValueError, match="another configuration"):
        Store(path, "cubes", {"a": [1, 2]})
    with pytest.raises(ValueError, match="yielded no rows"):
        store.add("n1", [], 0.0)
    with pytest.raises(ValueError, match="not JSON compliant"):
        store.add("n1", [{"x": float("nan")}], 0.0)
    (tmp_path / "other.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match="header"):
        read(tmp_path / "other.jsonl")


def test_texts():
    assert interval_text((0.5, 0.25, 0.75), 2) == "**+0.50 [+0.25, +0.75]**"
    assert interval_text((0.5, -0.25, 0.75), 2) == "+0.50 [−0.25, +0.75]"
    assert table(["a", "b"], [[1, 2]]) == "| a | b |\n|---|---|\n| 1 | 2 |"


def invoke(*arguments: str):
    return CliRunner().invoke(application(experiment), [*arguments])


def test_the_command_lists_what_there_is():
    from experiments import EXPERIMENTS

    output = invoke().output
    assert all(name in output for name in EXPERIMENTS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(("alchemy",), "alchemy"), (("digits", "--quick", "--publish"), "are not evidence")],
)
def test_bad_arguments(arguments, message, tmp_path):
    result = invoke(*arguments, "--out", str(tmp_path))
    assert result.exit_code == 2 and message in " ".join(result.output.split())


def test_a_folder_of_another_configuration_is_an_error_in_one_line(tmp_path):
    Store(tmp_path / "rows.jsonl", "squares", {})
    result = invoke("digits", "--quick", "--out", str(tmp_path))
    assert result.exit_code == 2 and "--fresh" in result.output
