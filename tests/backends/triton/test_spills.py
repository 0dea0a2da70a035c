"""``auto`` never chooses kernels that spill by the hundred in an innermost loop: rules of the ops and the budgets."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

from backends.triton import budget_rules, shipped  # noqa: E402

from aajr_kernels.backends import choice  # noqa: E402
from aajr_kernels.backends.triton import launch as gpu  # noqa: E402


class Asked(Exception):
    """Arguments that a call gave to the choice of its backend."""


def avoided(config: shipped.Config, architecture: str, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether ``auto`` avoids the Triton kernels of a configuration on a processor."""

    def ask(op: str, *tensors: Any, triton_spills: Any = None, **options: Any) -> str:
        raise Asked(triton_spills is not None and triton_spills(*tensors))

    monkeypatch.setattr(choice, "select_backend", ask)
    with gpu.dry_run(architecture), pytest.raises(Asked) as asked:
        config.run()
    (answer,) = asked.value.args
    return answer


@pytest.mark.parametrize("name", shipped.shipped())
def test_auto_avoids_what_spills_by_the_hundred(name, monkeypatch):
    """By the committed budgets, on every processor and version of Triton; and nothing else is avoided."""
    table, config = budget_rules.load(), shipped.shipped()[name]
    for architecture in config.processors:
        spills = [
            rows[architecture]["hot_spills"]
            for configs in table.values()
            for rows in configs.get(name, {}).values()
            if architecture in rows
        ]
        if spills:
            expected = max(spills) >= budget_rules.HUNDREDS
            assert avoided(config, architecture, monkeypatch) == expected, (architecture, max(spills))


def test_every_configuration_has_budgets_on_every_processor():
    """Without them there would be nothing to compare the rule with; the short one has the kernels of another."""
    newest = budget_rules.load()[max(budget_rules.load())]
    for name, config in shipped.shipped().items():
        if name == "attention D128 causal GQA short bfloat16":
            continue
        known = {processor for rows in newest.get(name, {}).values() for processor in rows}
        assert known >= set(config.processors), name
