"""Strict inclusion: bounding the directions of the ascent costs less than bounding all, and where it must not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from aajr_kernels.method import baseline_penalty
from common.pages import table
from common.plots import COLOURS, figure, save

from ..base import Experiment, Task, configured
from ..store import Row
from ..summaries import page
from . import problem

TWO = torch.diag(torch.tensor([1.0, 5.0], dtype=torch.float64))
#: a policy with one output: the adversary's direction is the only one it has
ONE = torch.tensor([[3.0, 4.0]], dtype=torch.float64)
SOLVERS = (("aligned", problem.solve_aligned), ("global", problem.solve_global))


def tasks(config: dict[str, Any]) -> list[Task]:
    bounded = [
        Task(f"{kind}/{gamma}", {"kind": kind, "gamma": gamma, "iterations": config["iterations"]})
        for kind in ("aligned", "global", "scalar")
        for gamma in config["gammas"]
    ]
    controls = ("one output", "two classes")
    return bounded + [Task(kind, {"kind": kind, "networks": config["networks"]}) for kind in controls]


def work(kind: str, gamma: float = 0.0, iterations: int = 0, networks: int = 0) -> list[Row]:
    if networks:
        return [{"bound": kind, "network": seed, "gap": network_gap(kind, seed)} for seed in range(networks)]
    if kind == "scalar":
        losses = {
            bound: problem.nominal(solve(ONE, gamma, iterations), ONE).item() for bound, solve in SOLVERS
        }
        gap = losses["global"] - losses["aligned"]
        return [{"bound": kind, "gamma": gamma, **losses, "gap": gap, "closed_form": _scalar(gamma)}]
    weight = dict(SOLVERS)[kind](TWO, gamma, iterations)
    row: Row = {
        "bound": kind,
        "gamma": gamma,
        "nominal": problem.nominal(weight, TWO).item(),
        "spectral_norm": torch.linalg.matrix_norm(weight, 2).item(),
        "excess": problem.excess(weight, TWO),
    }
    return [row | {"closed_form": problem.closed_form(kind, gamma)}]


def _scalar(gamma: float) -> float:
    """Nominal loss of either bound with one output, in closed form."""
    return 0.5 * max(0.0, 5 - gamma) ** 2


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
    worst = dict.fromkeys(
        ("nominal", "spectral_norm", "excess", "scalar", "gap", "one output", "two classes"), 0.0
    )

    def meet(name: str, error: float) -> None:
        worst[name] = max(worst[name], abs(error))

    for row in rows:
        if row["bound"] in ("aligned", "global"):
            for name, value in row["closed_form"].items():
                meet(name, row[name] - value)
        elif row["bound"] == "scalar":
            meet("scalar", row["aligned"] - row["closed_form"])
            meet("scalar", row["global"] - row["closed_form"])
            meet("gap", row["gap"])
        else:
            meet(row["bound"], row["gap"])
    return worst


def _picture(rows: list[Row], path: Path) -> None:
    drawn, (axis, control) = figure(2, width=4.4, height=3.4)
    fine = torch.linspace(0.2, 6.2, 300).tolist()
    scalar = [row for row in rows if row["bound"] == "scalar"]
    control.plot(fine, [_scalar(gamma) for gamma in fine], color="#888888", linewidth=1)
    styles = (("global", "‖J‖₂ ≤ γ", COLOURS[1], "s", 8), ("aligned", "‖Juₜ‖ ≤ γ (AAJR)", COLOURS[0], "o", 4))
    for bound, name, colour, marker, size in styles:
        own = [row for row in rows if row["bound"] == bound]
        closed_form = [problem.closed_form(bound, gamma)["nominal"] for gamma in fine]
        axis.plot(fine, closed_form, color=colour, linewidth=1)
        x, y = [row["gamma"] for row in own], [row["nominal"] for row in own]
        axis.plot(x, y, "o", color=colour, label=name, ms=5)
        x, y = [row["gamma"] for row in scalar], [row[bound] for row in scalar]
        control.plot(x, y, marker, color=colour, ms=size, label=bound)
    axis.set(xlabel="bound γ", ylabel="nominal loss", title="two outputs, the adversary sees one")
    control.set(xlabel="bound γ", title="control: one output, no gap")
    save(drawn, path)


def report(header: dict[str, Any], rows: list[Row], folder: Path) -> str:
    """The page; draws ``inclusion.png`` into the folder."""
    _picture(rows, folder / "inclusion.png")
    lines = []
    for gamma in header["config"]["gammas"]:
        by = {row["bound"]: row for row in rows if row.get("gamma") == gamma}
        cells = [f"{by[b][name]:.7f}" for b in ("global", "aligned") for name in ("nominal", "excess")]
        cells += [f"{by['aligned']['spectral_norm']:.6f}", f"{by['scalar']['gap']:+.1e}".replace("-", "−")]
        lines.append([f"{gamma:g}", *cells])
    heads = [
        "γ",
        "nominal, ‖J‖₂ ≤ γ",
        "excess",
        "nominal, ‖Juₜ‖ ≤ γ",
        "excess",
        "its ‖J‖₂",
        "gap, one output",
    ]
    return page(__file__, header, rows, worst=errors(rows), table=table(heads, lines))


EXPERIMENT = Experiment("inclusion", configured(__file__), tasks, work, report)
