"""Every shipped configuration compiles for every processor, within the rules and the committed budgets.

Nothing runs: see backends/triton/shipped.py for what is compiled and budgets.json for what it may take.
"""

from __future__ import annotations

import concurrent.futures
import importlib.util
import itertools
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from backends.triton import budget_rules, shipped
from backends.triton.compiler import Compiler

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

CONFIGS = shipped.shipped()
PINNED = [(config, architecture) for config in CONFIGS.values() for architecture in config.pinned]
OTHERS = [
    (config, architecture)
    for config in CONFIGS.values()
    for architecture in config.processors
    if architecture not in config.pinned
]


def runs() -> list[Any]:
    # every day the processor that the benchmarks are about and the one of another maker; `make test-all` has them all
    daily = {pair for pair in PINNED if pair[1] in ("sm_90", "gfx942")}
    pairs = [(pair, () if pair in daily else pytest.mark.slow) for pair in (*PINNED, *OTHERS)]
    return [
        pytest.param(config, architecture, id=f"{config.name}-{architecture}", marks=marks)
        for (config, architecture), marks in pairs
    ]


class Pool:
    """Two processes that compile ahead of the tests; beside other test processes, one that compiles on demand."""

    def __init__(self, ahead: list[tuple[str, str]]) -> None:
        self._local, self._compilers = threading.local(), []
        alone = "PYTEST_XDIST_WORKER" not in os.environ
        self._threads = concurrent.futures.ThreadPoolExecutor(2 if alone else 1)
        self._asked: dict[tuple[str, str, str], concurrent.futures.Future[Any]] = {}
        for config, architecture in ahead if alone else ():
            self._submit("backends.triton.shipped", config, architecture)

    def _submit(self, *question: str) -> concurrent.futures.Future[Any]:
        if question not in self._asked:
            self._asked[question] = self._threads.submit(self._ask, *question)
        return self._asked[question]

    def _ask(self, *question: str) -> Any:
        if not hasattr(self._local, "compiler"):
            self._local.compiler = Compiler()
            self._compilers.append(self._local.compiler)
        return self._local.compiler.ask(*question)

    def kernels(self, module: str, config: str, architecture: str) -> dict[str, Any]:
        return self._submit(module, config, architecture).result()

    def close(self) -> None:
        self._threads.shutdown(cancel_futures=True)
        for compiler in self._compilers:
            compiler.close()


@pytest.fixture(scope="session")
def pool(request: pytest.FixtureRequest) -> Iterator[Pool]:
    selected = [
        item.callspec.params
        for item in request.session.items
        if getattr(item, "originalname", "") == "test_within_rules_and_budget"
    ]
    made = Pool([(params["config"].name, params["architecture"]) for params in selected])
    yield made
    made.close()


@pytest.mark.parametrize(("config", "architecture"), runs())
def test_within_rules_and_budget(pool: Pool, config: shipped.Config, architecture: str):
    kernels = pool.kernels("backends.triton.shipped", config.name, architecture)
    assert kernels, "nothing was launched"
    table, version = budget_rules.load(), budget_rules.family()
    failures = budget_rules.over_budget(table, version, config, architecture, kernels)
    for name, row in kernels.items():
        failures += budget_rules.broken_rules(config, architecture, name, row)
    assert not failures, "\n".join(failures)


# ----------------------------------------------------------------------------------------- the checks themselves
TOYS = "backends.triton.toys"


def toy(pool: Pool, name: str, architecture: str) -> tuple[shipped.Config, dict[str, Any]]:
    config = shipped.Config(name, "toy", shipped.BF16, shipped.STRICT, (architecture,), lambda: None)
    return config, pool.kernels(TOYS, name, architecture)


@pytest.mark.parametrize(
    ("architecture", "kind"),
    [("sm_80", "mma"), ("sm_90", "wgmma"), ("sm_100", "tcgen05"), ("sm_120", "mma"), ("gfx942", "mfma")],
)
def test_a_good_kernel_is_read_rightly(pool, architecture, kind):
    config, kernels = toy(pool, "good", architecture)
    (row,) = kernels.values()
    assert set(row["matrix"]) == {kind} and row["products"] == 1
    assert 64 <= row["registers"] <= 256 and row["shared"] >= 32768 and row["hot_spills"] == 0
    assert (row["columns"] > 0) == (architecture == "sm_100")
    assert not budget_rules.broken_rules(config, architecture, "k", row)


@pytest.mark.parametrize(
    ("name", "architecture", "words"),
    [
        ("spills", "sm_80", "spills in its hot loop"),
        ("too much shared memory", "sm_80", "bytes of shared memory, the processor has 166912"),
        ("small products", "sm_90", "products without warpgroup instructions"),
        ("serialised", "sm_90", "the assembler serialised wgmma"),
    ],
)
def test_a_bad_kernel_is_caught(pool, name, architecture, words):
    config, kernels = toy(pool, name, architecture)
    failures = [
        text for k, row in kernels.items() for text in budget_rules.broken_rules(config, architecture, k, row)
    ]
    assert any(words in text for text in failures), (failures, kernels)


def test_spills_outside_the_hot_loop_are_told_apart(pool):
    _, kernels = toy(pool, "spills", "sm_80")
    (row,) = kernels.values()
    assert row["stack"] > 0 and row["spills"] > row["hot_spills"] > 0


def test_an_error_of_the_compiler_is_an_answer(pool):
    with pytest.raises(RuntimeError, match="broken does not compile for sm_90"):
        pool.kernels(TOYS, "broken", "sm_90")
    assert toy(pool, "good", "sm_90")[1]  # and the process goes on


def test_budgets(tmp_path):
    row = dict.fromkeys(budget_rules.BOUNDED, 10) | {"matrix": {"wgmma": 4}, "products": 2}
    config = shipped.Config("toy bf16", "toy", shipped.BF16, shipped.STRICT, ("sm_90",), lambda: None)
    table = {"3.7": {"toy bf16": {"_k": {"sm_90": row}}}, "3.6": {}}
    check = lambda kernels, version="3.7", where="sm_90": budget_rules.over_budget(
        table, version, config, where, kernels
    )
    assert check({"_k": row}) == [] == check({"_k": row | {"registers": 9}})
    for name in budget_rules.BOUNDED:
        assert check({"_k": row | {name: 11}}) == [f"_k on sm_90: {name} 11, budget 10"]
    for missing in (check({"_other": row}), check({"_k": row}, "3.6"), check({"_k": row}, where="sm_80")):
        assert len(missing) == 1 and budget_rules.REFRESH in missing[0]
    assert (
        check({"_k": row}, "3.6", "sm_80") == []
    )  # not pinned there, and the version knows pinned ones only
    assert check({"_k": row | {"stack": 99}}, "9.9") == []  # rules only
    (spills,) = check({"_k": row | {"hot_spills": budget_rules.HUNDREDS}}, "9.9")
    assert "`auto` does not avoid it" in spills
    table["3.7"]["toy bf16"]["_k"]["sm_90"] = row | {"hot_spills": budget_rules.HUNDREDS}
    assert check({"_k": row | {"hot_spills": 200}}, "9.9") == []
    budget_rules.save(table, tmp_path / "t.json")
    assert budget_rules.load(tmp_path / "t.json") == table


def test_spills_that_a_version_of_triton_is_known_for_are_bounded():
    row = dict.fromkeys(budget_rules.BOUNDED, 0) | {
        "matrix": {"wgmma": 4},
        "products": 2,
        "serialized": False,
    }
    broken = lambda op, version, count, where="sm_90": budget_rules.broken_rules(
        shipped.Config("toy bf16", op, shipped.BF16, shipped.STRICT, (where,), lambda: None),
        where,
        "_k",
        row | {"hot_spills": count},
        version,
    )
    assert budget_rules.TOLERATED
    for (version, op, architecture), most in budget_rules.TOLERATED.items():
        assert not broken(op, version, most, architecture)
        assert broken(op, version, most + 1, architecture)
        assert broken(op, "3.7", 1, architecture) and broken("toy", version, 1, architecture)


def test_the_committed_table_is_in_its_form_and_knows_only_what_is_shipped():
    table = budget_rules.load()
    assert set(itertools.chain(*(configs for configs in table.values()))) <= set(CONFIGS)
    for config in table.values():
        for kernels in config.values():
            for rows in kernels.values():
                assert set(rows) <= set(shipped.ALL)
                assert all(set(budget_rules.BOUNDED) <= set(row) for row in rows.values())


def test_the_documentation_has_the_table_of_the_budgets(tmp_path):
    root = Path(__file__).resolve().parents[3]
    spec = importlib.util.spec_from_file_location("kernel_budgets", root / "scripts" / "kernel_budgets.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    copy = shutil.copy(script.DOCS, tmp_path / "triton.md")
    assert not script.write_page(copy, budget_rules.load()), (
        "python scripts/kernel_budgets.py --docs writes it"
    )


def test_at_most_sixty_pairs_are_pinned():
    assert sum(len(config.pinned) for config in shipped.CONFIGS.values()) <= 60
