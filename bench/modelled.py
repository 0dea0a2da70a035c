"""`python -m bench --model`: what the roofline model predicts for a device that is not there."""

from __future__ import annotations

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from .case import Case, Variant
from .roofline import ATTENTION_SHARE, COPY_SHARE, PRODUCT_SHARE, Device, seconds


def predicted(case: Case, device: Device) -> dict[str, float]:
    """Variant -> milliseconds, of those that are modelled."""
    return {v.name: 1e3 * seconds(v.work, device) for v in case.variants if v.work}


def show(cases: Sequence[Case], device: Device, console: Console) -> None:
    """A table of the predictions, beside the bounds they would have to meet, and what they assume."""
    table = Table(
        title=f"Modelled, not measured: {device.name}",
        box=SIMPLE_HEAD,
        header_style="dim",
        padding=(0, 1),
    )
    for name in ("suite:family", "dtype", "length", "variant"):
        table.add_column(name, no_wrap=True)
    for name in ("ms", "ratio", "TFLOP", "GB", "limited by", "bound"):
        table.add_column(name, justify="right")
    for case in cases:
        times = predicted(case, device)
        base = min((times[name] for name in case.base if name in times), default=None)
        for variant in case.variants:
            if variant.name in times:
                ms = times[variant.name]
                ratio = "" if base is None else f"{ms / base:.2f}"
                table.add_row(*_start(case, variant), f"{ms:.3g}", ratio, *_work(variant, device))
    console.print(table)
    for line in assumptions(device):
        console.print(line, highlight=False, soft_wrap=True)


def _start(case: Case, variant: Variant) -> tuple[str, str, str, str]:
    return f"{case.suite}:{case.family}", case.dtype, str(case.length), variant.name


def _work(variant: Variant, device: Device) -> tuple[str, str, str, str]:
    flops, traffic = (sum(getattr(one, name) for one in variant.work) for name in ("flops", "bytes"))
    longest = max(variant.work, key=lambda one: one.seconds(device))
    arithmetic = longest.flops and longest.seconds(device) == longest.flops / device.rate(longest.kind)
    bounds = ", ".join(f"{name} ≤ {limit:g}" for name, limit in variant.bounds.items())
    tera = f"{flops / 1e12:.3g}" if flops else ""
    return tera, f"{traffic / 1e9:.3g}", "arithmetic" if arithmetic else "memory", bounds


def assumptions(device: Device) -> list[str]:
    """What the predictions rest on, in sentences."""
    return [
        f"Assumed: attention at {device.rate('attention') / 1e12:.0f} TFLOP/s ({ATTENTION_SHARE:.1%} of "
        f"{device.tflops:g} dense bfloat16), other products at {device.rate('product') / 1e12:.0f} "
        f"({PRODUCT_SHARE:.0%}), memory at {COPY_SHARE * device.bandwidth / 1e12:.2f} TB/s ({COPY_SHARE:.0%} of "
        f"{device.bandwidth / 1e12:g}).",
        "Counted: what our kernels do (the backward of attention takes 24 products, 15 would be the least), every "
        "stream once; the plain step's row-wise layers as if they were fused too. Launches, tails and waiting are "
        "left out, so short kernels take longer than this.",
    ]
