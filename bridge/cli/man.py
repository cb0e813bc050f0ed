"""Manual pages made from the commands: one for `nbd-bridge`, one for each command. man(7)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final

import click

from bridge import __version__
from bridge.cli.options import Command, GroupedOption

_SEE_ALSO: Final = "nbdkit(1), qemu\\-nbd(8), qemu\\-storage\\-daemon(1)"


def pages(group: click.Group) -> Iterator[tuple[str, str]]:
    """(file name, text) of every page."""
    root = click.Context(
        group,
        info_name="nbd-bridge",
        auto_envvar_prefix="NBD_BRIDGE",
        **group.context_settings,  # Each command keeps the first help option that it made.
    )
    yield "nbd-bridge.1", _group_page(root)
    for context in _commands(root):
        name = context.command_path.replace(" ", "-")
        yield f"{name}.1", _command_page(context, name)


def _commands(of: click.Context) -> Iterator[click.Context]:
    """The contexts of all commands, those of inner groups included."""
    assert isinstance(of.command, click.Group)
    for name in of.command.list_commands(of):
        command = of.command.get_command(of, name)
        assert command is not None
        inner = click.Context(command, info_name=name, parent=of)
        if isinstance(command, click.Group):
            yield from _commands(inner)
        else:
            yield inner


def _group_page(root: click.Context) -> str:
    lines = [*_head("nbd-bridge", root), ".SH COMMANDS"]
    for context in _commands(root):
        words = context.command_path.partition(" ")[2]
        lines += [".TP", f".B {_escaped(words)}", _escaped(context.command.get_short_help_str(200))]
    lines += [
        ".SH FILES",
        *_file("/etc/nbd-bridge/NAME.toml", "A disk, for nbd-bridge serve --config NAME."),
        *_file("/run/nbd-bridge/NAME.api", "The control socket of bridge NAME."),
        *_file("/var/cache/nbd-bridge", "Cache files, one for each export."),
        *(".SH EXIT STATUS", "0: done. 1: it went wrong. 2: it was asked for wrongly."),
    ]
    pages = [each.command_path.replace(" ", "-") for each in _commands(root)]
    lines += [".SH SEE ALSO", _escaped(", ".join(f"{each}(1)" for each in pages)) + ",", _SEE_ALSO]
    return "\n".join(lines) + "\n"


def _file(path: str, text: str) -> list[str]:
    return [".TP", f".I {_escaped(path)}", _escaped(text)]


def _command_page(context: click.Context, name: str) -> str:
    lines = _head(name, context)
    for title, options in _groups(context).items():
        lines.append(f".SH {_escaped(title.upper())}")
        for option in options:
            record = option.get_help_record(context)
            assert record is not None
            lines += [".TP", f".B {_escaped(record[0])}", _escaped(record[1])]
            if isinstance(option, GroupedOption) and option.name:
                variable = f"{context.auto_envvar_prefix}_{option.name.upper()}"
                lines += [".br", f"Environment: {_escaped(variable)}"]
    if isinstance(context.command, Command) and context.command.example:
        lines += [".SH EXAMPLE", ".nf", _escaped(context.command.example), ".fi"]
    return "\n".join([*lines, ".SH SEE ALSO", "nbd\\-bridge(1)"]) + "\n"


def _groups(context: click.Context) -> dict[str, list[click.Option]]:
    found: dict[str, list[click.Option]] = {}
    others = []
    for each in context.command.get_params(context):
        if isinstance(each, GroupedOption):
            found.setdefault(f"{each.title} options", []).append(each)
        elif isinstance(each, click.Option) and not each.hidden:
            others.append(each)
    return {**found, "Other options": others}


def _head(name: str, context: click.Context) -> list[str]:
    short = context.command.get_short_help_str(200).rstrip(".")
    usage = " ".join(context.command.collect_usage_pieces(context))
    lines = [
        f'.TH {_escaped(name.upper())} 1 "" "nbd\\-bridge {_escaped(__version__)}"',
        *(".SH NAME", f"{_escaped(name)} \\- {_escaped(short)}"),
        *(".SH SYNOPSIS", f".B {_escaped(context.command_path)}", _escaped(usage)),
        ".SH DESCRIPTION",
    ]
    for number, paragraph in enumerate((context.command.help or "").split("\n\n")):
        lines += [".PP"] * bool(number) + [_escaped(" ".join(paragraph.split()))]
    return lines


def _escaped(text: str) -> str:
    """`text` as it is, whatever it begins with."""
    text = text.replace("\\", "\\e").replace("-", "\\-").replace("…", "...")
    return re.sub(r"^([.'])", r"\\&\1", text.replace("\n", " "))
