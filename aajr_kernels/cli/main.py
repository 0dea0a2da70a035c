"""The `aajr` command: its sub-commands, each imported only when it is used.

A sub-command is a function with typer-annotated parameters in a module of its own, called like the sub-command;
`COMMANDS` is the one place that lists them. So `aajr info` starts quickly and works where the packages that another
sub-command needs are missing.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any, NoReturn

import typer
from rich.console import Console
from rich.markup import escape
from typer.core import TyperGroup

from ..runtime import BackendUnavailable, UnsupportedOperation

#: sub-command -> (module, its line in the overview)
COMMANDS: dict[str, tuple[str, str]] = {
    "info": ("aajr_kernels.cli.info", "Versions, devices, backends and why one is missing."),
    "validate": ("aajr_kernels.cli.validate", "Check every op against a float64 oracle."),
    "bench": ("bench.__main__", "Speed and memory, as ratios to PyTorch's own."),
    "scaling": (
        "bench.scaling.__main__",
        "Bytes, operations and memory of a step on many devices, modelled.",
    ),
    "report": ("bench.report.__main__", "One page of the rows, the pictures and README's table."),
    "demo": ("demo.__main__", "The penalty on a real language model and on real text."),
    "experiment": ("experiments.__main__", "The evidence for the method: rows, figures and pages."),
}


class LazyGroup(TyperGroup):
    """A command group whose overview needs no sub-command's module; the one that is called gets imported."""

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        name, placeholder, rest = super().resolve_command(ctx, args)
        return name, load(name) if name in COMMANDS else placeholder, rest


def load(name: str) -> Any:
    """The sub-command `name`, imported, as the command object that typer makes of it."""
    module, _ = COMMANDS[name]
    single = typer.Typer(add_completion=False)
    single.command(name)(getattr(importlib.import_module(module), name))
    return typer.main.get_command(single)


app = typer.Typer(
    name="aajr",
    cls=LazyGroup,
    help="Exact gradients of a transformer's sensitivity along adversarial directions.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for _name, (_module, _summary) in COMMANDS.items():
    app.command(_name, help=_summary)(lambda: None)


def fail(message: str) -> NoReturn:
    """Print a one-sentence error and exit with code 2."""
    Console(stderr=True).print(f"[bold red]error:[/] {escape(message)}", highlight=False, soft_wrap=True)
    raise SystemExit(2)


def main() -> None:
    """Entry point of `aajr` and of `python -m aajr_kernels`."""
    try:
        app(prog_name="aajr")
    except ModuleNotFoundError as error:
        package = (error.name or "").split(".")[0]
        if package in ("", "aajr_kernels"):
            raise
        extra = {"bench": "bench", "experiment": "experiments", "report": "report"}.get(
            sys.argv[1] if sys.argv[1:] else "", "demo"
        )
        fail(
            f"this sub-command needs the package {package!r}: pip install 'aajr_kernels[{extra}]' brings it."
        )
    except (BackendUnavailable, UnsupportedOperation) as error:
        fail(str(error))
