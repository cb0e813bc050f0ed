"""`nbd-bridge`: finds the command; prints one line if it was called wrongly.

A command's module is imported here, when that command is called: it imports everything that the
command runs, and one command should not wait for the imports of another.
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from importlib import import_module
from types import ModuleType
from typing import Any, NoReturn

import click

from bridge.cli.common import capabilities_option, complain, version_option
from bridge.cli.options import write_example

_COMMANDS = {
    "serve": "serve",
    "info": "info",
    "demo": "demo",
    "bench": "bench",
    "check": "check",
    "list": "bridges",
    "exporter": "exporter",
    "top": "top",
    "status": "status",
    "flush": "flush",
    "resize": "resize",
    "set": "set_settings",
    "stop": "stop",
    "upgrade": "upgrade",
    "plugin-path": "plugin_path",
    "install-units": "install_units",
    "man-pages": "man_pages",
    "completion": "completion",
}
_CACHE_COMMANDS = {
    "list": "cache_list",
    "prune": "cache_prune",
    "show": "cache_show",
    "drop": "cache_drop",
    "flush": "cache_flush",
    "warm": "cache_warm",
}
_CONFIG_COMMANDS = {"check": "config_check", "show": "config_show"}
"""Name of a command → its module in `bridge.cli`, which has it as `command`."""


class CommandGroup(click.Group):
    """Commands, each in a module. Called without one, it prints its help and exits with 2."""

    def __init__(
        self, *args: Any, modules: dict[str, str], example: str = "", **extra: Any
    ) -> None:
        super().__init__(*args, **extra)
        self._modules = modules
        self.example = example

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The names of all commands, sorted, as the help lists them."""
        return sorted([*self.commands, *self._modules])

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of that name; None if there is none."""
        if cmd_name in self._modules:
            _import_structlog()
            found: click.Command = import_module(f"bridge.cli.{self._modules[cmd_name]}").command
            return found
        return super().get_command(ctx, cmd_name)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Of an unknown command: which one was probably meant."""
        if self.get_command(ctx, args[0]) is None:
            from difflib import get_close_matches  # Only this needs it: it costs time and memory.

            if near := get_close_matches(args[0], self.list_commands(ctx), 1):
                ctx.fail(f"no such command {args[0]!r}; did you mean {near[0]!r}?")
        return super().resolve_command(ctx, args)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the example."""
        write_example(self.example, formatter)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if not args and not ctx.resilient_parsing:  # A shell's completion also parses.
            click.echo(self.get_help(ctx), err=True)
            ctx.exit(2)
        return super().parse_args(ctx, args)


def main(arguments: list[str] | None = None) -> NoReturn:
    """The `nbd-bridge` command; `arguments` None: those of the process."""
    _open_standard_descriptors()
    try:
        status = nbd_bridge.main(
            arguments,
            prog_name="nbd-bridge",
            auto_envvar_prefix="NBD_BRIDGE",
            standalone_mode=False,  # Otherwise click prints an error as four lines.
        )
    except click.ClickException as error:
        complain(_one_line(error))
        status = error.exit_code
    except click.Abort:
        complain("interrupted")
        status = 1
    sys.exit(status)


def _import_structlog() -> None:
    """structlog imports asyncio, for methods that are not used here: 1.6 MB of each bridge, 6 ms of
    each command. It gets an empty module in its place."""
    if "structlog" in sys.modules or "asyncio" in sys.modules:
        return
    sys.modules["asyncio"] = ModuleType("asyncio")
    try:
        # A version that needs something of asyncio's earlier is imported anew by the next module.
        with suppress(AttributeError):
            import_module("structlog")
    finally:
        del sys.modules["asyncio"]


def _open_standard_descriptors() -> None:
    """Open /dev/null in place of closed ones: else a socket could get descriptor 2, and errors."""
    for fd in (0, 1, 2):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is `fd`


def _one_line(error: click.ClickException) -> str:
    """click's message without line breaks, and the command that prints more."""
    text = " ".join(error.format_message().split("\n")).rstrip(".")
    context = getattr(error, "ctx", None)
    more = f" (see '{context.command_path} --help')" if context is not None else ""
    return text[:1].lower() + text[1:] + more


@click.group(
    cls=CommandGroup,
    modules=_COMMANDS,
    example="nbd-bridge serve nbd://storage/vm0 --socket-path /run/vm0.sock",
    context_settings={"help_option_names": ["-h", "--help"]},
)
@version_option
@capabilities_option
def nbd_bridge() -> None:
    """Give a virtual machine a disk that lives on a network block device.

    Every option can also be set by an environment variable: NBD_BRIDGE_SERVE_CACHE_SIZE for
    `serve --cache-size`, and so on.
    """


@nbd_bridge.group(
    cls=CommandGroup, modules=_CACHE_COMMANDS, example="nbd-bridge cache list --check-servers"
)
def cache() -> None:
    """Work on caches that no bridge is using.

    `list` and `prune` look at all of them. `show`, `flush` and `drop` take a FILE, `warm` the URI
    of the export.
    """


@nbd_bridge.group(cls=CommandGroup, modules=_CONFIG_COMMANDS)
def config() -> None:
    """Look at configuration files, which `serve --config` uses.

    NAME stands for /etc/nbd-bridge/NAME.toml.
    """
