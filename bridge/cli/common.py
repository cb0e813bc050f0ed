"""For all commands: makes one from its settings, prints its result, turns errors into one line."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

import click

from bridge import __version__
from bridge.app.settings_model import CommandSettings, declared, settings_of
from bridge.cli.options import Command, options_of
from bridge.cli.variables import misspelt
from bridge.cli.wording import explain
from bridge.errors import BridgeError

P = ParamSpec("P")
S = TypeVar("S", bound=CommandSettings)

_CAPABILITIES = {"type": "block", "features": ["read-only"]}
"""What `--print-capabilities` says (vhost-user "Backend program conventions")."""


def command(
    name: str, settings: type[S], *, example: str, warns: bool = True
) -> Callable[[Callable[Concatenate[S, P], None]], click.Command]:
    """Decorates a function of settings and arguments; makes it a command.

    The function's errors become one line each and an exit status: see `one_line_errors`. `warns`:
    misspelt environment variables are reported here; False: the function does that.
    """
    names = {each.setting.name for each in declared(settings)}

    def decorate(function: Callable[Concatenate[S, P], None]) -> click.Command:
        # `wraps` also copies the arguments that click's decorators have put on the function.
        @wraps(function)
        def run(**given: Any) -> None:
            for text in misspelt(click.get_current_context()) if warns else ():
                complain(f"warning: {text}")
            arguments = {name: given[name] for name in given.keys() - names}
            _call(function, settings_of(settings, given), arguments)

        make = click.command(name, cls=Command, example=example)
        return make(options_of(settings)(one_line_errors(run)))

    return decorate


def _call(function: Callable[..., None], settings: object, arguments: dict[str, Any]) -> None:
    """Call with arguments by name. click has checked their types, which mypy cannot see."""
    function(settings, **arguments)


def one_line_errors(command: Callable[P, None]) -> Callable[P, None]:
    """Turn our errors into one line and an exit status: 2 for configuration, 1 at run time."""

    @wraps(command)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> None:
        errors: list[BridgeError] = []
        try:
            command(*args, **kwargs)
        except* BridgeError as group:
            errors = _leaves(group)
        except* KeyboardInterrupt:
            errors = [BridgeError("interrupted")]
        # Outside the except*: it would wrap SystemExit into a group.
        for error in errors:
            complain(explain(error))
        if errors:
            sys.exit(min(error.exit_status for error in errors))

    return wrapper


def _leaves(group: BaseExceptionGroup[BridgeError]) -> list[BridgeError]:
    leaves: list[BridgeError] = []
    for error in group.exceptions:
        leaves += _leaves(error) if isinstance(error, BaseExceptionGroup) else [error]
    return leaves


def complain(text: str) -> None:
    """Print one line on standard error; ignore it if that cannot be written."""
    with suppress(OSError):
        click.echo(f"nbd-bridge: {text}", err=True)


def print_result(text: str) -> None:
    """Print a result on standard output. Raises BridgeError when it cannot be written."""
    try:
        click.echo(text)
    except OSError as error:
        # Otherwise Python would try to write the rest of its buffer at exit, and print an error.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        raise BridgeError(f"cannot write to standard output: {error.strerror}") from None


def table(lines: dict[str, str]) -> str:
    """Names and values, in two columns."""
    width = max(map(len, lines))
    return "\n".join(f"{key:{width}}  {value}" for key, value in lines.items())


def coloured(text: str, colour: str) -> str:
    """`text` in this colour on a terminal; NO_COLOR (https://no-color.org) forbids it."""
    if os.environ.get("NO_COLOR") or not sys.stdout.isatty():
        return text
    return click.style(text, fg=colour)


def columns(rows: list[tuple[str, ...]]) -> str:
    """Rows of equally many cells, one below the other."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def _print_capabilities(context: click.Context, _: click.Parameter, wanted: bool) -> None:
    if wanted and not context.resilient_parsing:
        click.echo(json.dumps(_CAPABILITIES))
        context.exit()


def _print_version(context: click.Context, _: click.Parameter, wanted: bool) -> None:
    if wanted and not context.resilient_parsing:
        from bridge.datapath.engine import description  # Only this needs it that early.

        click.echo(f"nbd-bridge, version {__version__}, engine {description()}")
        context.exit()


version_option = click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_print_version,
    help="Show the version and exit.",
)

capabilities_option = click.option(
    "--print-capabilities",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_print_capabilities,
    help="Print what this vhost-user program can do, as JSON, and exit.",
)
