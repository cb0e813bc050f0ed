"""Environment variables that look like an option's and are none: a misspelt one must not be
ignored without a word."""

from __future__ import annotations

import os
from typing import Final

import click

_PREFIX: Final = "NBD_BRIDGE_"
_OTHERS: Final = frozenset(f"{_PREFIX}{name}" for name in ("VENV", "PEERS", "KILLS"))
"""Of `./run` and the tests."""


def misspelt(context: click.Context) -> list[str]:
    """A warning for each variable that no option has.

    Of other commands' variables only the command's name is looked at: their options are not
    imported for that.
    """
    own = f"{context.auto_envvar_prefix}_"
    known = {
        f"{own}{each.name.upper()}"
        for each in context.command.params
        if each.name and (isinstance(each, click.Option) or each.envvar)
    }
    others = tuple(f"{_PREFIX}{words}_" for words in _commands(context.find_root()))
    strange = [
        name
        for name in sorted(os.environ)
        if name.startswith(_PREFIX)
        and name not in known
        and name not in _OTHERS
        and (name.startswith(own) or not name.startswith(others))
    ]
    if not strange:
        return []
    from difflib import get_close_matches  # Only this needs it: it costs time and memory.

    found = []
    for name in strange:
        near = get_close_matches(name, known, n=1, cutoff=0.8)
        meant = f"; did you mean {near[0]}?" if near else f" (see '{context.command_path} --help')"
        found.append(f"the environment variable {name} is no option's, and ignored{meant}")
    return found


def _commands(root: click.Context) -> list[str]:
    """The words of every command, as they stand in variables."""
    group = root.command
    if not isinstance(group, click.Group):
        return []
    found = []
    for name in group.list_commands(root):
        inner = group.commands.get(name)  # None: one command in a module of its own
        if isinstance(inner, click.Group):
            found += [f"{name}_{each}" for each in inner.list_commands(root)]
        else:
            found.append(name)
    return [each.replace("-", "_").upper() for each in found]
