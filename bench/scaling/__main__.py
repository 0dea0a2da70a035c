"""`python -m bench.scaling`: what a step sends, computes and holds in many processes; counted, and seconds modelled."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import typer
from rich.console import Console

from common.command import fail, run

from ..roofline import DEVICES, PRODUCT_SHARE, Device
from .model import MODELS, Layout, Shape, collectives, memory, operations, sent

#: bytes a second that a process sends: to the other seven of its node (NVLink 4, one direction) and to other nodes
#: (a network card of 400 Gbit/s for every device)
NODE, NETWORK, DEVICES_OF_A_NODE = 450e9, 50e9, 8
#: of the peak of a link: what ring collectives of large tensors reach
LINK_SHARE = 0.8

#: model and processes that share a layer, by numbers of devices
ROWS = (
    ("8B", 1, (8, 64, 512, 4096)),
    ("32B", 4, (8, 64, 512, 4096)),
    ("70B", 8, (8, 64, 512, 4096)),
    ("405B", 8, (64, 512, 4096)),
)


def scaling(
    model: Annotated[str | None, typer.Option(help="8B, 32B, 70B or 405B; all of them without.")] = None,
    devices: Annotated[int | None, typer.Option(min=1, help="One number of devices.")] = None,
    tensor: Annotated[int | None, typer.Option(min=1, help="Processes that share every layer.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Rows of a data-parallel process.")] = 1,
    length: Annotated[int, typer.Option(min=1, help="Tokens of a row.")] = 4096,
    tangents: Annotated[int, typer.Option(min=1, help="Directions of the penalty.")] = 1,
    attack: Annotated[int, typer.Option(min=1, help="Steps of the attack.")] = 3,
    device: Annotated[str, typer.Option(help="Whose arithmetic and links: h100.")] = "h100",
) -> None:
    """Communication, operations and memory per device: a plain step, an adversarial one, and one with the penalty.

    All numbers are modelled: bytes and operations are counted from what the code does (tests compare the bytes with
    those of real steps in two and four processes), seconds rest on assumed rates. Exit code 2: bad arguments.
    """
    if model is not None and model not in MODELS:
        fail(f"--model must be one of {', '.join(MODELS)}, got {model!r}.")
    if device not in DEVICES:
        fail(f"--device must be one of {', '.join(DEVICES)}, got {device!r}.")
    chosen = [row for row in ROWS if model in (None, row[0])]
    layouts = []
    for name, shared, counts in chosen:
        share = tensor or shared
        for count in (devices,) if devices else counts:
            if count % share or MODELS[name].kv_heads % share:
                fail(f"--tensor must divide the devices ({count}) and the heads of {name}, got {share}.")
            layout = Layout(count // share, share, batch, length, tangents, attack, sequence=share > 1)
            layouts.append((MODELS[name], layout))
    for line in table(layouts, DEVICES[device]):
        Console().print(line, markup=False, highlight=False, soft_wrap=True)


def table(layouts: list[tuple[Shape, Layout]], device: Device) -> list[str]:
    """Lines of a Markdown table."""
    head = (
        "model", "devices", "data × tensor", "parameters, GB", "tensor, GB", "ratio", "PFLOP", "ratio", "memory, GB",
        "seconds",
    )  # fmt: skip
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    for shape, layout in layouts:
        plain = replace(layout, attack=0, tangents=0)
        steps = (plain, replace(layout, tangents=0), layout)
        data, over = (
            [sent(collectives(shape, one), one, group) / 1e9 for one in steps] for group in ("data", "tensor")
        )
        work = [operations(shape, one) / 1e15 for one in steps]
        held = [sum(memory(shape, one).values()) / 1e9 for one in steps]
        time = [seconds(shape, one, device) for one in steps]
        cells = (
            shape.name,
            str(layout.processes),
            f"{layout.data} × {layout.tensor}",
            _three(data, ".0f"),
            _three(over, ".0f"),
            "–" if not over[1] else f"{over[2] / over[1]:.2f}",
            _three(work, ".2f"),
            f"{work[2] / work[1]:.2f}",
            _three(held, ".0f"),
            _three(time, ".2f"),
        )
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _three(values: list[float], form: str) -> str:
    return " / ".join(format(value, form) for value in values)


def seconds(shape: Shape, layout: Layout, device: Device) -> float:
    """Modelled: arithmetic and the sums within a layer follow each other, parameters travel meanwhile."""
    tensor_link = NODE if layout.tensor <= DEVICES_OF_A_NODE else NETWORK
    data_link = NODE if layout.processes <= DEVICES_OF_A_NODE else NETWORK
    found = collectives(shape, layout)
    within = operations(shape, layout) / (1e12 * device.tflops * PRODUCT_SHARE)
    within += sent(found, layout, "tensor") / (LINK_SHARE * tensor_link)
    return max(within, sent(found, layout, "data") / (LINK_SHARE * data_link))


if __name__ == "__main__":
    run(scaling, "bench.scaling", "bench")
