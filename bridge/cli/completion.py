"""`nbd-bridge completion`."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from bridge.app.command_settings import CompletionSettings
from bridge.cli import common


@common.command("completion", CompletionSettings, example='eval "$(nbd-bridge completion bash)"')
@click.argument("shell", type=click.Choice(("bash", "zsh", "fish")))
def command(settings: CompletionSettings, shell: str) -> None:
    """Print what makes SHELL complete nbd-bridge's commands and options.

    For bash, in ~/.bashrc: eval "$(nbd-bridge completion bash)"; zsh alike. For fish, into
    ~/.config/fish/completions/nbd-bridge.fish.
    """
    complete = get_completion_class(shell)
    assert complete is not None
    group = click.get_current_context().find_root().command
    common.print_result(complete(group, {}, "nbd-bridge", "_NBD_BRIDGE_COMPLETE").source())
