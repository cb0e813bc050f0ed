"""The manual pages and the shells' completion, which are made from the commands."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from bridge.app.settings import ServeSettings
from bridge.app.settings_model import declared
from bridge.cli.main import nbd_bridge
from bridge.cli.man import pages
from tests.processes import bridge_argv
from tests.tools import need

PAGES = dict(pages(nbd_bridge))


def test_every_command_has_a_page_and_the_first_names_them_all() -> None:
    for words in ("serve", "cache-flush", "config-check", "upgrade", "list", "install-units"):
        assert f"nbd-bridge-{words}.1" in PAGES
        assert f"nbd-bridge-{words}(1)" in PAGES["nbd-bridge.1"].replace("\\-", "-")


def test_page_has_every_option_with_its_variable_under_its_title() -> None:
    text = PAGES["nbd-bridge-serve.1"].replace("\\-", "-")
    for each in declared(ServeSettings):
        at = text.index(f"\n.B {each.setting.option}")
        title = text.rindex("\n.SH ", 0, at)
        assert text[title + 5 :].startswith(each.title.upper())
        assert f"Environment: NBD_BRIDGE_SERVE_{each.setting.name.upper()}\n" in text


@pytest.mark.parametrize("name", PAGES)
def test_page_is_good_for_man(name: str) -> None:
    """What a formatter would take for a request, or print as another character."""
    text = PAGES[name]
    lines = text.splitlines()
    assert lines[0].startswith(".TH NBD\\-BRIDGE")
    known = r"\.(TH|SH|B|I|TP|PP|br|nf|fi)( |$)"
    assert all(re.match(known, line) for line in lines if line.startswith((".", "'")))
    assert not re.search(r"(?<!\\)-", text)
    assert text.isascii()
    sections = [line for line in lines if line.startswith(".SH ")]
    assert sections[:3] == [".SH NAME", ".SH SYNOPSIS", ".SH DESCRIPTION"]


def test_pages_are_written_to_a_directory(directory: Path) -> None:
    done = subprocess.run(
        bridge_argv("man-pages", str(directory / "man1")), capture_output=True, check=True
    )
    assert sorted(done.stdout.decode().split()) == sorted(
        str(directory / "man1" / name) for name in PAGES
    )
    (directory / "file").write_text("")
    done = subprocess.run(
        bridge_argv("man-pages", str(directory / "file" / "x")), capture_output=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr.count(b"\n") == 1


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_is_a_script_for_the_shell(shell: str) -> None:
    done = subprocess.run(bridge_argv("completion", shell), capture_output=True, check=True)
    assert b"_NBD_BRIDGE_COMPLETE" in done.stdout
    assert not done.stderr


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("nbd-bridge up", {"upgrade"}),
        ("nbd-bridge config ", {"check", "show"}),
        ("nbd-bridge serve --socket-g", {"--socket-group"}),
        ("nbd-bridge serve --cache-mode w", {"writethrough", "writeback"}),
        ("nbd-bridge completion f", {"fish"}),
    ],
)
def test_bash_completes_commands_options_and_values(
    line: str, expected: set[str], directory: Path
) -> None:
    """As bash calls what `completion bash` prints."""
    program = directory / "nbd-bridge"
    program.write_text("#!/bin/sh\nexec " + shlex.join(bridge_argv()) + ' "$@"\n')
    program.chmod(0o755)
    script = f"""
eval "$(nbd-bridge completion bash)"
COMP_WORDS=({line} {'""' if line.endswith(" ") else ""})
COMP_CWORD=$(( ${{#COMP_WORDS[@]}} - 1 ))
_nbd_bridge_completion nbd-bridge
printf '%s\\n' "${{COMPREPLY[@]}}"
"""
    done = subprocess.run(
        [need("bash"), "-c", script],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PATH": f"{directory}:{os.environ['PATH']}"},
    )
    assert done.stderr == ""
    assert set(done.stdout.split()) == expected
