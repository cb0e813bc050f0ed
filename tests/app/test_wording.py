"""What an operator is told: every remedy has its words, and they name commands that there are."""

from __future__ import annotations

import json
import re
from pathlib import Path

import click
import pytest

import bridge
from bridge.app import logs
from bridge.cli.main import nbd_bridge
from bridge.cli.wording import explain
from bridge.errors import (
    BridgeError,
    ChangedMeanwhile,
    ConfigError,
    LeftBehind,
    RangeBeyondDisk,
    Remedy,
    SettingFault,
    SettingName,
)


def options_of(command: click.Command, context: click.Context) -> set[str]:
    found = {option for each in command.params for option in each.opts}
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            child = command.get_command(context, name)
            assert child is not None
            found |= options_of(child, context)
    return found


@pytest.mark.parametrize("remedy", Remedy)
def test_remedy_is_told_with_options_and_commands_that_there_are(remedy: Remedy) -> None:
    context = click.Context(nbd_bridge)

    text = explain(ConfigError("it is so", remedy=remedy, path="/a/{path}"))

    assert text.startswith("it is so")
    assert len(text) > len("it is so")
    assert set(re.findall(r"--[a-z-]+", text)) <= options_of(nbd_bridge, context)
    for words in re.findall(r"nbd-bridge ([a-z]+ [a-z]+)", text):
        group = nbd_bridge.get_command(context, words.split()[0])
        assert isinstance(group, click.Group)
        assert group.get_command(context, words.split()[1]) is not None
        assert "/a/{path}" in text


def test_setting_within_a_text_is_told_as_its_option() -> None:
    fault = SettingFault("/k: the key (", SettingName("tls_key_file"), "): no PEM in it")

    assert explain(fault) == "/k: the key (--tls-key): no PEM in it"
    assert str(fault) == "/k: the key (tls_key_file): no PEM in it"


def test_errors_with_a_sentence_of_their_own_are_told_with_the_option() -> None:
    change = ChangedMeanwhile("nbd://h/x: another host wrote", "the rest is still in /f")

    assert explain(RangeBeyondDisk(8, 4, 6)) == "--range 8:4: the disk has only 6 bytes"
    assert explain(change) == (
        "nbd://h/x: another host wrote (--force writes over that); the rest is still in /f"
    )


def test_error_of_another_kind_keeps_its_remedy() -> None:
    error = ConfigError("it is so", remedy=Remedy.FLUSH_FIRST, path="/f").within(LeftBehind, "vm: ")

    assert type(error) is LeftBehind
    assert explain(error) == "vm: it is so: run 'nbd-bridge cache flush /f' first"


@pytest.mark.parametrize(
    ("event", "said"),
    [
        ({"event": BridgeError("a", remedy=Remedy.LIST_EXPORTS)}, "a (nbd-bridge info --list)"),
        ({"event": "b", "problem": ConfigError("a", remedy=Remedy.NO_CACHE)}, None),
        (
            {"event": "b", "remedy": Remedy.EXPECT_READ_ONLY},
            "b; give --read-only if that is what you want",
        ),
    ],
)
def test_log_has_the_remedy(event: dict[str, object], said: str | None) -> None:
    done = logs.explained(explain)(None, "error", event)

    assert isinstance(done, dict)
    assert done == {"event": said or "b: a: use --cache-mode off"}
    json.dumps(done)


def test_only_the_command_line_speaks_command_line() -> None:
    """What raises an error, or logs, has no option of ours in a sentence."""
    root = Path(bridge.__file__).parent
    speaks = re.compile(r"""(?<!`)--(?:cache|tls|force|moved|skip|discard|list|read-only|range)""")
    rooms = [each for each in root.iterdir() if each.is_dir() and each.name not in ("cli", "demo")]
    for path in (each for room in rooms for each in room.rglob("*.py")):
        if path.name in ("settings.py", "command_settings.py"):
            continue
        for number, line in enumerate(path.read_text().splitlines(), 1):
            assert not (speaks.search(line) and '"""' not in line), f"{path}:{number}: {line}"
