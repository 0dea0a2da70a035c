"""`python -m demo`: the penalty on a real language model and on real text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from common import command
from common.texts import MissingPackage


def demo(
    out: Annotated[Path, typer.Option(help="Folder for the report, the pictures and the numbers.")] = Path(
        "runs/demo"
    ),
    part: Annotated[
        Literal["policy", "scratch", "all"],
        typer.Option(help="policy: SmolLM2 on prompt injections; scratch: a small model on Shakespeare."),
    ] = "all",
    quick: Annotated[
        bool, typer.Option("--quick", help="Small and fast: shows that everything runs.")
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="Seed of prompts, weights and batches.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, or a device such as cuda:0.")] = "auto",
) -> None:
    """The main job on real input: penalties of a real language model, and a small one trained with and without.

    (a) SmolLM2-135M-Instruct on prompt-injection text: the Fisher penalty along adversarial embedding directions and
    its gradients, against PyTorch's forward mode and finite differences, then LoRA steps that lower it. (b) A small
    language model trained on Shakespeare with and without the penalty, and attacked. Prints tables; saves pictures,
    an HTML report and JSON.
    """
    from .run import choose_device, run

    try:
        selected = choose_device(device)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--device") from error
    parts = ("policy", "scratch") if part == "all" else (part,)
    try:
        run(out, parts=parts, quick=quick, seed=seed, device=selected)
    except MissingPackage as error:
        command.fail(str(error))


if __name__ == "__main__":
    command.run(demo, "demo", "demo")
