"""Tables of the package stop growing when shapes and models change, and keep no model alive."""

from __future__ import annotations

import ast
import functools
import gc
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from training.tiny_lm import ATTACK, fit_config, quiet, tiny_lm

import aajr_kernels as aajr
from aajr_kernels.backends import choice
from aajr_kernels.training import Penalty
from common.trust import count as counted

#: tables that are filled while modules are imported, or once per device, dtype, backend or op
_TABLES = dict, set, list, weakref.WeakKeyDictionary


def sizes() -> dict[str, int]:
    """Entries of every cached function and every table of the package's modules and classes, by name."""
    entries: dict[str, int] = {}

    def look(name: str, value: Any, owner: str) -> None:
        if hasattr(value, "cache_info"):
            if getattr(value, "__module__", owner) == owner:
                entries[name] = value.cache_info().currsize
        elif isinstance(value, _TABLES) and "__" not in name.rpartition(".")[2]:
            entries[name] = len(value)

    for owner, module in list(sys.modules.items()):
        if owner.startswith("aajr_kernels"):
            for name, value in list(vars(module).items()):
                look(f"{owner}.{name}", value, owner)
                if isinstance(value, type) and value.__module__ == owner:
                    for inner, held in list(vars(value).items()):
                        look(f"{owner}.{name}.{inner}", held, owner)
    return entries


def grown(before: dict[str, int]) -> dict[str, int]:
    gc.collect()
    return {name: size - before.get(name, 0) for name, size in sizes().items() if size > before.get(name, 0)}


def fused_training(length: int, recompute: bool = False) -> weakref.ref[Any]:
    """One step of a model of its own with a shared context; what is left of it."""
    from integrations.transformers.subjects import tiny

    from aajr_kernels.integrations.transformers import fuse

    model = tiny("llama", num_hidden_layers=1)
    fuse(model, recompute=recompute)
    ids = torch.randint(3, 90, (2, length))
    batch = {
        "input_ids": ids,
        "labels": ids,
        "attack_mask": (torch.arange(length) >= length // 2).expand(2, length),
    }
    config = fit_config(steps=1, attack=ATTACK, penalty=Penalty(weight=0.2, steps="all"), share_context=True)
    quiet(model.train(), [batch], config)
    return weakref.ref(model)


def plain_training(length: int) -> weakref.ref[Any]:
    model = tiny_lm()
    quiet(
        model,
        [torch.randint(13, (2, length))],
        fit_config(steps=1, attack=ATTACK, penalty=Penalty(weight=0.2)),
    )
    return weakref.ref(model)


@pytest.mark.parametrize(
    "recompute", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["kept", "recomputed"]
)
def test_fused_models_are_freed_and_tables_stop_growing(recompute):
    pytest.importorskip("transformers")
    models = [fused_training(length, recompute) for length in (8,)]
    gc.collect()
    before = sizes()
    models += [fused_training(length, recompute) for length in (11, 16)]
    assert not grown(before)
    assert not any(model() for model in models)
    counted("caches", tables=len(before), models=len(models))


def test_models_are_freed_and_tables_stop_growing():
    models = [plain_training(length) for length in (3, 4)]
    gc.collect()
    before = sizes()
    models += [plain_training(length) for length in range(5, 40, 5)]
    assert not grown(before)
    assert not any(model() for model in models)
    counted("caches", models=len(models))


def test_a_model_or_an_entry_that_stays_is_seen(monkeypatch):
    kept: list[Any] = []
    monkeypatch.setattr(choice, "_leaking", {}, raising=False)
    monkeypatch.setattr(choice, "_cached", functools.cache(lambda key: key), raising=False)
    choice._cached.__module__ = choice.__name__
    before = sizes()
    model = tiny_lm()
    kept.append(model)
    choice._leaking["length"] = 5
    choice._cached("key")
    assert grown(before) == {f"{choice.__name__}._leaking": 1, f"{choice.__name__}._cached": 1}
    left = weakref.ref(model)
    del model
    gc.collect()
    assert left() is not None


def test_the_choice_of_backends_keeps_a_bounded_number_of_kinds(monkeypatch):
    monkeypatch.setattr(choice, "LIMIT", 4)
    for size in range(8, 24):
        q = torch.randn(1, 2, 3, size)
        aajr.attention(aajr.dual(q, q), q, q)
        assert len(choice._found) <= 4


#: reason -> cached functions without a bound
UNBOUNDED = {
    "keys are backends, dtypes, devices or ops": (
        "_has_module _has_native _offers _lacks_products _architecture multiprocessors _multiprocessors _record"
    ),
    "one entry": ("module _library register _trainer _versions _not_installed _interpreted exact_bfloat16"),
    "keys are forms that the package knows": "_rms_norm_forward _activation_forward _gated_forward _packed_gate",
    "made anew for every call": "other of_context kept",
}


def cached_without_bound() -> set[str]:
    functions = set()
    for file in Path(aajr.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                functions |= {node.name for x in node.decorator_list if ast.unparse(x) == "functools.cache"}
    return functions


def test_every_cached_function_has_a_bound_or_a_reason():
    assert cached_without_bound() == {name for names in UNBOUNDED.values() for name in names.split()}
