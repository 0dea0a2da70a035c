"""The `aajr` command: `info` and `validate`, functions with typer-annotated parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import typer
from rich.console import Console
from rich.markup import escape

from ..backends.errors import BackendUnavailable, UnsupportedOperation
from .info import info
from .validate import validate

#: of every command
OPTIONS: dict[str, Any] = dict(
    add_completion=False,
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def application(function: Callable[..., Any]) -> typer.Typer:
    """A function with typer-annotated parameters as a command of its own."""
    single = typer.Typer(**OPTIONS)
    single.command()(function)
    return single


app = typer.Typer(
    name="aajr",
    help="Exact gradients of a transformer's sensitivity along adversarial directions.",
    no_args_is_help=True,
    **OPTIONS,
)
app.command()(info)
app.command()(validate)


def fail(message: str) -> NoReturn:
    """Print a one-sentence error and exit with code 2."""
    Console(stderr=True).print(f"[bold red]error:[/] {escape(message)}", highlight=False, soft_wrap=True)
    raise SystemExit(2)


def run(application: typer.Typer, name: str, extra: str) -> None:
    """Run a command; a missing package, or a file that cannot be read or written, becomes a one-sentence error.

    Args:
        application: the command.
        name: its name on the command line.
        extra: the extra of pyproject.toml with the packages that the command needs.
    """
    try:
        application(prog_name=name)
    except ModuleNotFoundError as error:
        package = (error.name or "").split(".")[0]
        if package in ("", "aajr_kernels"):
            raise
        fail(f"this command needs the package {package!r}: pip install 'aajr_kernels[{extra}]' brings it.")
    except (BackendUnavailable, UnsupportedOperation, OSError) as error:
        fail(str(error))


def main() -> None:
    """Entry point of `aajr` and of `python -m aajr_kernels`."""
    run(app, "aajr", "hf")
