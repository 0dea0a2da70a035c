"""The `aajr` command: its sub-commands, each imported only when it is used.

A sub-command is a function with typer-annotated parameters in a module of its own, called like the sub-command;
`COMMANDS` is the one place that lists them. So `aajr info` starts quickly and works where the packages that another
sub-command needs are missing.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, NoReturn

import typer
from rich.console import Console
from rich.markup import escape
from typer.core import TyperGroup

from ..backends.errors import BackendUnavailable, UnsupportedOperation

#: sub-command -> (module, its line in the overview)
COMMANDS: dict[str, tuple[str, str]] = {
    "info": ("aajr_kernels.cli.info", "Versions, devices, backends and why one is missing."),
    "validate": ("aajr_kernels.cli.validate", "Check every op against a float64 oracle."),
}


#: of every command
OPTIONS: dict[str, Any] = dict(
    add_completion=False,
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


class LazyGroup(TyperGroup):
    """A command group whose overview needs no sub-command's module; the one that is called gets imported."""

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        name, placeholder, rest = super().resolve_command(ctx, args)
        return name, load(name) if name in COMMANDS else placeholder, rest


def application(function: Callable[..., Any], name: str | None = None) -> typer.Typer:
    """A function with typer-annotated parameters as a command of its own."""
    single = typer.Typer(**OPTIONS)
    single.command(name)(function)
    return single


def load(name: str) -> Any:
    """The sub-command `name`, imported, as the command object that typer makes of it."""
    module, _ = COMMANDS[name]
    return typer.main.get_command(application(getattr(importlib.import_module(module), name), name))


app = typer.Typer(
    name="aajr",
    cls=LazyGroup,
    help="Exact gradients of a transformer's sensitivity along adversarial directions.",
    no_args_is_help=True,
    **OPTIONS,
)
for _name, (_module, _summary) in COMMANDS.items():
    app.command(_name, help=_summary)(lambda: None)


def fail(message: str) -> NoReturn:
    """Print a one-sentence error and exit with code 2."""
    Console(stderr=True).print(f"[bold red]error:[/] {escape(message)}", highlight=False, soft_wrap=True)
    raise SystemExit(2)


def run(application: typer.Typer, name: str, extra: str) -> None:
    """Run a command; a missing package becomes a one-sentence error.

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
    except (BackendUnavailable, UnsupportedOperation) as error:
        fail(str(error))


def main() -> None:
    """Entry point of `aajr` and of `python -m aajr_kernels`."""
    run(app, "aajr", "hf")
