"""Tables, which rich prints and writes as HTML, and the report that has them."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from aajr_kernels.cli.printing import table
from common.meter import judged, spread

from .policy import HeldOut, LoraRun, MethodRow, PolicyConfig
from .scratch import ScratchConfig, ScratchRun

PAGE = """<!doctype html><html lang=en><meta charset=utf-8><title>{title}</title>
<style>body{{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}}
img{{max-width:100%}}</style>
<h1>{title}</h1>{body}<p><small>{facts}</small></p></html>
"""


@dataclass(frozen=True)
class Section:
    """A chapter of the report: its heading, a paragraph, a picture and tables."""

    heading: str
    text: str
    picture: Path
    sheets: Sequence[Table]

    def to_html(self) -> str:
        heading, data = html.escape(self.heading), base64.b64encode(self.picture.read_bytes()).decode()
        console = Console(record=True, file=io.StringIO(), width=100)
        for sheet in self.sheets:
            console.print(sheet)
        tables = console.export_html(inline_styles=True, code_format="<pre>{code}</pre>")
        image = f'<img alt="{heading}" src="data:image/png;base64,{data}">'
        return f"<h2>{heading}</h2><p>{html.escape(self.text)}</p>{image}{tables}"


def page(title: str, sections: Sequence[Section], facts: str) -> str:
    """One self-contained HTML page."""
    return PAGE.format(
        title=html.escape(title), body="".join(s.to_html() for s in sections), facts=html.escape(facts)
    )


def _sheet(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], note: str) -> Table:
    """A table with a title, a first column of text, others of numbers, and one or two sentences below it."""
    sheet = table(
        columns[:1], columns[1:], title=title, title_justify="left", title_style="bold", caption=note
    )
    sheet.caption_justify, sheet.caption_style = "left", "dim"
    for row in rows:
        sheet.add_row(*row)
    return sheet


def _above(share: float | None) -> str:
    return "" if share is None else f" +{share:.0%}"


def comparison_sheet(rows: Sequence[MethodRow], tokens: int) -> Table:
    """Every way to the penalty and its gradients, on one dialogue."""

    def cells(row: MethodRow) -> list[str]:
        error = "-" if row.gradient_error is None else f"{row.gradient_error:.1e}"
        value = "-" if row.gradient_error is None else f"{row.value:.4f}"
        memory = "-" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:.0f}"
        time, ratio = f"{row.seconds:.2f}{_above(row.spread)}", f"{row.seconds / rows[0].seconds:.1f}"
        return [row.method, value, error, time, ratio, memory]

    return _sheet(
        f"Penalty and gradients of 135 M parameters, {tokens} tokens, float32",
        ("method", "penalty", "grad. error", "time s", "x plain", "MiB"),
        [cells(row) for row in rows],
        "Gradient error: relative to forward mode in float64, all parameters together. Time: minimum of interleaved "
        "rounds, and how far their median lies above it. MiB: peak memory beyond weights and gradients. "
        + judged([row.spread for row in rows]),
    )


def lora_sheet(before: HeldOut, runs: Sequence[LoraRun], config: PolicyConfig) -> Table:
    """Held-out figures before and after the LoRA steps."""

    def cells(name: str, figures: HeldOut) -> list[str]:
        losses = [f"{figures.loss:.3f}", f"{figures.attacked_loss:.3f}"]
        return [name, f"{figures.penalty:.1f}", *losses, f"{figures.attacked_loss - figures.loss:+.3f}"]

    return _sheet(
        f"{config.held_out} held-out injections, before and after {config.lora_steps} LoRA steps",
        ("trained on", "penalty", "reply loss", "after attack", "rise"),
        [cells("before", before)] + [cells(run.name, run.after) for run in runs],
        f"Losses in nats per token. Attack: one ascent step of {config.radius:g} in embedding space, spread over the "
        "injected text.",
    )


def scratch_sheet(runs: Sequence[ScratchRun], config: ScratchConfig) -> Table:
    """Clean and attacked loss of both models."""
    last = len(config.radii) - 1
    shown = sorted({0, (last + 1) // 2, last})

    def cells(run: ScratchRun) -> list[str]:
        losses = [f"{run.robust_loss[i]:.3f}" for i in shown]
        time = f"{1e3 * min(run.step_seconds):.0f}{_above(spread(run.step_seconds))}"
        return [run.name, *losses, f"{run.sensitivity[-1][1]:.3f}", time]

    heads = [f"radius {config.radii[i]:g}" if config.radii[i] else "clean" for i in shown]
    return _sheet(
        f"Loss on two plays never trained on, {config.steps} steps, same start and batches",
        ("training", *heads, "sensitivity", "ms/step"),
        [cells(run) for run in runs],
        "Losses in nats per byte; radius of the attack on every byte's embedding in units of the mean embedding "
        "norm; sensitivity: Fisher size along the ascent direction, per byte. Time: of the fastest step, and how far "
        "the median lies above it. " + judged([spread(run.step_seconds) for run in runs]),
    )
