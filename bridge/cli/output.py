"""What every command says, and how it ends."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import wraps
from typing import Any, ParamSpec

import click

from bridge.errors import BridgeError

P = ParamSpec("P")


def complain(text: str) -> None:
    """One line on standard error, if anybody hears it."""
    with suppress(OSError):
        click.echo(f"nbd-bridge: {text}", err=True)


def print_line(text: str) -> None:
    """A result, on standard output. Raises BridgeError when it cannot be written."""
    try:
        click.echo(text)
    except OSError as error:
        # What is left in the buffer would be tried again, and complained about, at the exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        raise BridgeError(f"cannot write to standard output: {error.strerror}") from None


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
            complain(str(error))
        if errors:
            sys.exit(min(error.exit_status for error in errors))

    return wrapper


def _leaves(group: BaseExceptionGroup[Any]) -> list[BridgeError]:
    leaves: list[BridgeError] = []
    for error in group.exceptions:
        leaves += _leaves(error) if isinstance(error, BaseExceptionGroup) else [error]
    return leaves
