"""Strict inclusion: bounding the directions of the ascent costs less than bounding all, and where it must not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from aajr_kernels.method import baseline_penalty

from ..base import Experiment, Task
from ..plots import COLOURS, figure, save
from ..store import Row
from ..summaries import environment_line, table
from . import problem

__all__ = ["EXPERIMENT"]

TWO = torch.diag(torch.tensor([1.0, 5.0], dtype=torch.float64))
#: a policy with one output: the adversary's direction is the only one it has
ONE = torch.tensor([[3.0, 4.0]], dtype=torch.float64)


def config(quick: bool) -> dict[str, Any]:
    gammas = [1.0] if quick else [0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0]
    return {"gammas": gammas, "iterations": 200 if quick else 300, "networks": 5 if quick else 100}


def tasks(config: dict[str, Any]) -> list[Task]:
    found = [
        Task(f"{bound}/{gamma}", {"kind": bound, "gamma": gamma, "iterations": config["iterations"]})
        for bound in ("aligned", "global")
        for gamma in config["gammas"]
    ]
    found += [
        Task(f"scalar/{gamma}", {"kind": "scalar", "gamma": gamma, "iterations": config["iterations"]})
        for gamma in config["gammas"]
    ]
    return found + [
        Task(kind, {"kind": kind, "networks": config["networks"]}) for kind in ("one output", "two classes")
    ]


def work(kind: str, gamma: float = 0.0, iterations: int = 0, networks: int = 0) -> list[Row]:
    if kind in ("aligned", "global"):
        solve = problem.solve_aligned if kind == "aligned" else problem.solve_global
        weight = solve(TWO, gamma, iterations)
        found = {
            "nominal": problem.nominal(weight, TWO).item(),
            "spectral_norm": torch.linalg.matrix_norm(weight, 2).item(),
            "excess": problem.excess(weight, TWO),
        }
        return [{"bound": kind, "gamma": gamma, **found, "closed_form": problem.closed_form(kind, gamma)}]
    if kind == "scalar":
        losses = {
            bound: problem.nominal(solve(ONE, gamma, iterations), ONE).item()
            for bound, solve in (("aligned", problem.solve_aligned), ("global", problem.solve_global))
        }
        gap = losses["global"] - losses["aligned"]
        return [
            {
                "bound": kind,
                "gamma": gamma,
                **losses,
                "gap": gap,
                "closed_form": 0.5 * max(0.0, 5 - gamma) ** 2,
            }
        ]
    return [{"bound": kind, "network": seed, "gap": network_gap(kind, seed)} for seed in range(networks)]


def network_gap(kind: str, seed: int) -> float:
    """Relative gap between ‖J‖² and ‖Ju‖² of a random network with one sensitive direction."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        outputs = 1 if kind == "one output" else 2
        policy = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, outputs)).double()
        x = torch.randn(8, 6, dtype=torch.float64)
        labels = torch.randint(outputs, (8,))
    metric = "l2" if outputs == 1 else "fisher"

    def loss_fn(x: torch.Tensor) -> torch.Tensor:
        y = policy(x)
        if outputs == 1:
            return 0.5 * (y[:, 0] - 1.0).square()
        return nn.functional.cross_entropy(y, labels, reduction="none")

    point = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(loss_fn(point).sum(), point)
    options: dict[str, Any] = {"metric": metric, "reduction": "none"}
    aligned = baseline_penalty("aligned", policy, x, g / g.norm(dim=1, keepdim=True), **options)
    generator = torch.Generator().manual_seed(seed)
    top = baseline_penalty("spectral", policy, x, iterations=20, generator=generator, **options)
    return ((top - aligned).abs() / top).max().item()


def errors(rows: list[Row]) -> dict[str, float]:
    """The largest differences from the closed forms, and the largest gaps of the controls."""
    found = {"nominal": 0.0, "spectral_norm": 0.0, "excess": 0.0, "scalar": 0.0, "gap": 0.0}
    for row in rows:
        if row["bound"] in ("aligned", "global"):
            for name in ("nominal", "spectral_norm", "excess"):
                found[name] = max(found[name], abs(row[name] - row["closed_form"][name]))
        elif row["bound"] == "scalar":
            for name in ("aligned", "global"):
                found["scalar"] = max(found["scalar"], abs(row[name] - row["closed_form"]))
            found["gap"] = max(found["gap"], abs(row["gap"]))
        else:
            found[row["bound"]] = max(found.get(row["bound"], 0.0), row["gap"])
    return found


def _picture(rows: list[Row], path: Path) -> None:
    drawn, (axis, control) = figure(2, width=4.4, height=3.4)
    fine = torch.linspace(0.2, 6.2, 300).tolist()
    for colour, bound, name in (
        (COLOURS[1], "global", "‖J‖₂ ≤ γ"),
        (COLOURS[0], "aligned", "‖Juₜ‖ ≤ γ (AAJR)"),
    ):
        axis.plot(fine, [problem.closed_form(bound, g)["nominal"] for g in fine], color=colour, linewidth=1)
        here = [row for row in rows if row["bound"] == bound]
        axis.plot(
            [r["gamma"] for r in here], [r["nominal"] for r in here], "o", color=colour, label=name, ms=5
        )
    axis.set(xlabel="bound γ", ylabel="nominal loss", title="two outputs, the adversary sees one")
    axis.legend(frameon=False)
    scalar = [row for row in rows if row["bound"] == "scalar"]
    control.plot(fine, [0.5 * max(0.0, 5 - g) ** 2 for g in fine], color="#888888", linewidth=1)
    for colour, bound, marker in ((COLOURS[1], "global", "s"), (COLOURS[0], "aligned", "o")):
        values = [r[bound] for r in scalar]
        size = 8 if bound == "global" else 4
        control.plot([r["gamma"] for r in scalar], values, marker, color=colour, ms=size, label=bound)
    control.set(xlabel="bound γ", title="control: one output, no gap")
    control.legend(frameon=False)
    save(drawn, path)


def report(header: dict[str, Any], rows: list[Row], folder: Path) -> str:
    """The page; draws ``inclusion.png`` into the folder."""
    _picture(rows, folder / "inclusion.png")
    worst = errors(rows)
    seconds = sum({row["task"]: row["seconds"] for row in rows}.values())
    pairs = {
        gamma: {row["bound"]: row for row in rows if row.get("gamma") == gamma}
        for gamma in header["config"]["gammas"]
    }
    lines = [
        [f"{gamma:g}"]
        + [f"{row[name]:.7f}" for row in (by["global"], by["aligned"]) for name in ("nominal", "excess")]
        + [f"{by['aligned']['spectral_norm']:.6f}", f"{by['scalar']['gap']:+.1e}".replace("-", "−")]
        for gamma, by in pairs.items()
    ]
    heads = [
        "γ",
        "nominal, ‖J‖₂ ≤ γ",
        "excess",
        "nominal, ‖Juₜ‖ ≤ γ",
        "excess",
        "its ‖J‖₂",
        "gap, one output",
    ]
    return f"""# Strict inclusion

`python -m experiments inclusion`. {environment_line(header, seconds)}

## Question

Every policy with ‖J‖₂ ≤ γ also has ‖Juₜ‖ ≤ γ along the ascent directions uₜ. Is the second set larger where it matters,
and is it no larger where the adversary's direction is the only sensitive one?

## Set-up

A linear policy π(x) = Wx with two outputs learns diag(1, 5) x from inputs with unit second moments; the nominal loss is
half the squared error. The adversary sees output 1 alone and moves x by at most ½. With a bound of 1 the closed forms
are: nominal loss 8 and robust excess 1/8 for ‖J‖₂ ≤ 1; nominal loss 0, the same robust excess 1/8 and ‖J‖₂ = 5 for
‖Juₜ‖ ≤ 1. The global bound is met by projected gradient descent on singular values; the aligned one by an augmented
Lagrangian around `aligned` penalties at the points of `ascend`, all in float64.

Controls: the same with one output (target (3, 4)·x, of norm 5), where both bounds must cost ½(5 − γ)²; and random
networks with one output (l2 metric) or two classes (Fisher metric), where ‖Ju‖ must equal the spectral norm.

## Result

![Nominal loss against the bound](inclusion.png)

{table(heads, lines)}

| largest difference from the closed form | |
| --- | --- |
| nominal loss, two outputs | {worst["nominal"]:.1e} |
| spectral norm, two outputs | {worst["spectral_norm"]:.1e} |
| robust excess, two outputs | {worst["excess"]:.1e} |
| nominal loss, one output | {worst["scalar"]:.1e} |

| largest gap of a control | |
| --- | --- |
| nominal loss between both bounds, one output | {worst["gap"]:.1e} |
| ‖J‖² against ‖Ju‖², {header["config"]["networks"]} networks with one output (relative) | {worst["one output"]:.1e} |
| the same, two classes in the Fisher metric | {worst["two classes"]:.1e} |

From γ = 5 on the global bound does not bind either. The aligned bound lets the unused direction keep its slope of 5 and
loses nothing; its robust excess is the same. Where the adversary's direction is the only sensitive one, there is
nothing to gain.
"""


EXPERIMENT = Experiment("inclusion", config, tasks, work, report)
