"""`aajr validate`: every op, dtype and backend against the float64 oracle, or a model of the user's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
import typer

from .info import why_no_accelerator

DEVICES = ("auto", "cpu", "cuda")


def validate(
    model: Annotated[
        str | None,
        typer.Option(
            help="Check this model instead of the ops: a folder or cached name of transformers, or MODULE:NAME of a "
            "model, of a function that returns one, or of a class of transformers (built small)."
        ),
    ] = None,
    length: Annotated[
        int | None, typer.Option(min=4, help="With --model: tokens in a row of the batch. Default: 16.")
    ] = None,
    layers: Annotated[
        int | None, typer.Option(min=1, help="With --model: only so many of its layers, to save memory.")
    ] = None,
    op: Annotated[list[str] | None, typer.Option(help="Op to check; repeatable. Default: all.")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="Dtype to check; repeatable. Default: all.")] = None,
    backend: Annotated[
        list[str] | None, typer.Option(help="Backend to check; repeatable. Default: all that can run here.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    seed: Annotated[int, typer.Option(min=0, help="Seed of the random inputs.")] = 0,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object instead of a table.")
    ] = False,
) -> None:
    """Check every op against a float64 oracle: all outputs and all gradients, per dtype and backend.

    The oracle is plain formulas under PyTorch's forward mode and autograd.
    float64 must agree to 1e-10; a lower dtype may be off by twice the error of
    the same formula in eager PyTorch plus a few units in the last place.

    With --model a small batch goes through the model, unmodified and after fuse(): penalty,
    output and all gradients against the same model in float64 with written-out layers,
    beside finite differences and PyTorch's own forward mode; and what is not fused, and why.

    Exit code 0: everything passed, 1: something failed, 2: bad arguments.
    """
    selected("--device", [device], DEVICES)
    if device == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter(f"there is no such device: {why_no_accelerator()}.", param_hint="--device")
    if model is not None:
        from . import validate_model

        if op or backend:
            raise typer.BadParameter("--model checks a whole model: leave --op and --backend out.")
        place = "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"
        usual = ["float64", "float32", *(["bfloat16"] if place == "cuda" else [])]
        dtypes = selected("--dtype", dtype or usual, list(validate_model.DTYPES))
        validate_model.run(model, tuple(dtypes), place, length or 16, layers, seed, as_json)
        return
    if length is not None or layers is not None:
        raise typer.BadParameter("they go with --model.", param_hint="--length and --layers")
    from . import validate_ops

    validate_ops.run(op, dtype, backend, device, seed, as_json)


def selected(option: str, names: Sequence[str] | None, choices: Sequence[str]) -> list[str]:
    """`names` without repetitions, in the order of `choices`; all of them if None."""
    unknown = [name for name in names or () if name not in choices]
    if unknown:
        raise typer.BadParameter(
            f"{unknown[0]!r} is unknown: choose from {', '.join(choices)}.", param_hint=option
        )
    return [name for name in choices if not names or name in names]
