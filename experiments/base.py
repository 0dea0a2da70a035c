"""Parts of an experiment, and the running of its tasks."""

from __future__ import annotations

import json
import multiprocessing
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .store import Row, Store


@dataclass(frozen=True)
class Task:
    """One unit of work, the smallest that is lost when a run is interrupted.

    Attributes:
        key: unique among the tasks of a configuration.
        arguments: of the experiment's ``work``; they travel to other processes.
    """

    key: str
    arguments: dict[str, Any]


def by_part(*parts: str) -> Callable[[dict[str, Any]], list[Task]]:
    """Tasks of ``work(config, part, seed)``: one of every part and seed, whose runs share what they start from."""

    def tasks(config: dict[str, Any]) -> list[Task]:
        return [
            Task(f"{part}/{seed}", {"config": config, "part": part, "seed": seed})
            for part in parts
            for seed in range(config[part]["seeds"])
        ]

    return tasks


def configured(module: str) -> Callable[[bool], dict[str, Any]]:
    """Configurations from ``config.json`` beside a module: ``full``, and for a quick run what ``quick`` changes in it.

    Args:
        module: ``__file__`` of the caller.
    """

    def config(quick: bool) -> dict[str, Any]:
        parts = json.loads(Path(module).with_name("config.json").read_text(encoding="utf-8"))
        return _changed(parts["full"], parts["quick"] if quick else {})

    return config


def _changed(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """With other values, in dictionaries of dictionaries too."""
    return values | {
        name: _changed(values[name], value) if isinstance(value, dict) else value
        for name, value in changes.items()
    }


@dataclass(frozen=True)
class Experiment:
    """A configuration, tasks that are independent of each other, and a report drawn from their rows only.

    Attributes:
        name: on the command line.
        config: everything that decides the result, for the full run and the quick one; written with the rows.
        tasks: from the configuration to tasks.
        work: from a task's arguments to the rows it yields; a function at the top level of a module, deterministic.
        report: from the header of the file and its rows to a page in Markdown; draws its figures into the folder.
    """

    name: str
    config: Callable[[bool], dict[str, Any]]
    tasks: Callable[[dict[str, Any]], list[Task]]
    work: Callable[..., list[Row]]
    report: Callable[[dict[str, Any], list[Row], Path], str]


def _single(work: Callable[..., list[Row]], arguments: dict[str, Any]) -> tuple[list[Row], float]:
    """A task on one thread: results do not depend on the machine's number of cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    start = time.perf_counter()
    try:
        return work(**arguments), time.perf_counter() - start
    finally:
        torch.set_num_threads(before)


def run_experiment(
    experiment: Experiment,
    store: Store,
    *,
    quick: bool = False,
    jobs: int = 1,
    progress: Callable[[int, int, str], None] = lambda done, total, key: None,
) -> None:
    """Run the tasks whose rows the store does not hold yet.

    Args:
        experiment: what to run.
        store: opened with the experiment's configuration.
        quick: the small configuration.
        jobs: processes, of one thread each.
        progress: called with the number of finished tasks, of all tasks, and the key of the last one.
    """
    tasks = experiment.tasks(experiment.config(quick))
    pending = [task for task in tasks if not store.has(task.key)]
    done = len(tasks) - len(pending)
    progress(done, len(tasks), "")
    for task, (rows, seconds) in _results(experiment.work, pending, jobs):
        store.add(task.key, rows, seconds)
        done += 1
        progress(done, len(tasks), task.key)


def _results(
    work: Callable[..., list[Row]], pending: list[Task], jobs: int
) -> Iterable[tuple[Task, tuple[list[Row], float]]]:
    if jobs == 1 or len(pending) < 2:
        for task in pending:
            yield task, _single(work, task.arguments)
        return
    # spawned: a fork would copy torch's threads
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = {pool.submit(_single, work, task.arguments): task for task in pending}
        for future in as_completed(futures):
            yield futures[future], future.result()
