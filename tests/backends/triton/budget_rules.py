"""Rules that every compiled kernel has to obey, and the committed budgets it may not exceed.

``budgets.json`` is keyed by Triton's version family, configuration, kernel and architecture.
``python scripts/kernel_budgets.py --write`` makes it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from backends.triton.shipped import Config

PATH = Path(__file__).with_name("budgets.json")
REFRESH = "python scripts/kernel_budgets.py --write"
#: what a budget bounds, in the order of a row
BOUNDED = ("registers", "stack", "spills", "hot_spills", "shared", "columns")

#: shared memory that one program can have, in bytes
SHARED = {"sm_80": 166912, "sm_90": 232448, "sm_100": 232448, "sm_120": 101376, "gfx942": 65536}
#: spills in a hot loop from which `auto` avoids a kernel
HUNDREDS = 100
#: columns of tensor memory
TENSOR_COLUMNS = 512
#: most spills in a hot loop where none is allowed, by a version of Triton that has them at the tiles of the others
TOLERATED = {("3.9", "attention", "sm_90"): 16}

Row = dict[str, Any]
Table = dict[str, dict[str, dict[str, dict[str, Row]]]]


def family() -> str:
    """Version of Triton without its last number."""
    from importlib.metadata import version

    return ".".join(version("triton").split(".")[:2])


def load(path: Path = PATH) -> Table:
    return json.loads(path.read_text()) if path.exists() else {}


def save(table: Table, path: Path = PATH) -> None:
    """One line a kernel and architecture, so that a difference is read at a glance."""
    lines: list[str] = []
    for version in sorted(table):
        lines.append(f"{json.dumps(version)}: {{")
        configs = [name for name in table[version] if table[version][name]]
        for name in configs:
            lines.append(f" {json.dumps(name)}: {{")
            kernels = sorted(table[version][name])
            for kernel in kernels:
                lines.append(f"  {json.dumps(kernel)}: {{")
                rows = sorted(table[version][name][kernel].items())
                for i, (architecture, row) in enumerate(rows):
                    comma = "," if i + 1 < len(rows) else ""
                    lines.append(f"   {json.dumps(architecture)}: {json.dumps(row)}{comma}")
                lines.append("  }" + ("," if kernel != kernels[-1] else ""))
            lines.append(" }" + ("," if name != configs[-1] else ""))
        lines.append("}" + ("," if version != max(table) else ""))
    path.write_text("{\n" + "\n".join(lines) + "\n}\n")


def broken_rules(
    config: Config, architecture: str, kernel: str, row: Row, version: str | None = None
) -> list[str]:
    """Rules that hold whatever the budget says; `version`: of Triton, the installed one by default."""
    tolerated = TOLERATED.get((version or family(), config.op, architecture), 0)
    low = config.dtype in (torch.bfloat16, torch.float16)
    matrix = row["matrix"]
    rules = {
        f"{row['shared']} bytes of shared memory, the processor has {SHARED[architecture]}": (
            row["shared"] > SHARED[architecture]
        ),
        f"{row['columns']} columns of tensor memory, the processor has {TENSOR_COLUMNS}": (
            row["columns"] > TENSOR_COLUMNS
        ),
        f"{row['hot_spills']} spills in its hot loop": (
            architecture in config.strict and row["hot_spills"] > tolerated
        ),
        "its products wait for one another (the assembler serialised wgmma)": row["serialized"],
        f"products without warpgroup instructions ({matrix})": (
            low
            and config.warpgroups
            and architecture == "sm_90"
            and row["products"] > 0
            and (not matrix.get("wgmma") or "mma" in matrix)
        ),
    }
    return [f"{kernel} on {architecture}: {text}" for text, broken in rules.items() if broken]


def over_budget(
    table: Table, version: str, config: Config, architecture: str, kernels: dict[str, Row]
) -> list[str]:
    """Kernels without a row, and what exceeds the row of the others.

    Of a version without a table: kernels that spill by the hundred where those of no other version do, so that `auto`
    would choose them.
    """
    if version not in table:
        known_spills = [
            rows[architecture]["hot_spills"]
            for configs in table.values()
            for rows in configs.get(config.name, {}).values()
            if architecture in rows
        ]
        avoided = max(known_spills, default=0) >= HUNDREDS
        return [
            f"{kernel} on {architecture}: {row['hot_spills']} spills in its hot loop, and `auto` does not avoid it"
            for kernel, row in kernels.items()
            if row["hot_spills"] >= HUNDREDS and not avoided
        ]
    known = table[version].get(config.name)
    if known is None and architecture not in config.pinned:
        return []
    failures = []
    for kernel, row in kernels.items():
        budget = (known or {}).get(kernel, {}).get(architecture)
        if budget is None:
            failures.append(f"{kernel} on {architecture} has no budget in {PATH.name}: {REFRESH} adds it")
            continue
        for name in BOUNDED:
            if row[name] > budget[name]:
                failures.append(f"{kernel} on {architecture}: {name} {row[name]}, budget {budget[name]}")
    return failures
