"""The commands in the documents are those of the program, and do what the documents say.

Each is parsed by the real command line; those of blocks with the mark `run` are run as they are
printed, at the paths that they name, in a namespace of their own.
"""

from __future__ import annotations

import ast
import contextlib
import os
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import click
import pytest

from bridge.cli.config_file import ConfigFileError
from bridge.cli.main import nbd_bridge
from nbd_plugin.settings import Settings as PluginSettings
from tests.document_blocks import ROOT, Block, blocks_of, commands_of, inline_commands
from tests.tools import need

DEVELOPERS = {"architecture.md", "cache-format.md", "durability.md", "testing.md"}
"""Their blocks are for those who have a checkout and run its tests."""
DOCUMENTS = [
    Path("README.md"),
    Path("docker/README.md"),
    *sorted(
        each.relative_to(ROOT)
        for each in (ROOT / "docs").glob("*.md")
        if each.name not in DEVELOPERS
    ),
]
RUN = re.compile(r"tried: run (\d+)")
TEST = re.compile(r"tried: (tests/[\w/]+\.py)(?:::(\w+))?")
_WORDS_MIN = 8
"""So long is the shortest piece of a message that is looked for."""
_START_S = 120


def all_blocks() -> list[Block]:
    return [block for document in DOCUMENTS for block in blocks_of(document)]


def is_typed(block: Block) -> bool:
    """It is something to type, or to put into a file; no picture, no output."""
    typed = r"^(\$ |nbd-bridge |curl |ssh |chardev-add )"
    return bool(block.language) or re.search(typed, block.text, re.M) is not None


@pytest.mark.parametrize("document", DOCUMENTS, ids=str)
def test_block_says_who_has_tried_it(document: Path) -> None:
    wrong = []
    for block in filter(is_typed, blocks_of(document)):
        if block.mark == "not tried":
            if "not tried" not in " ".join(block.section.lower().split()):
                wrong.append(f"not said to the reader: {block.text[:60]!r}")
        elif match := TEST.fullmatch(block.mark):
            path, name = match.groups()
            if not (ROOT / path).exists() or (name and f"def {name}(" not in _text(path)):
                wrong.append(f"no such test: {block.mark}")
        elif not RUN.fullmatch(block.mark) and not block.mark.startswith("tried: by hand, "):
            wrong.append(f"no mark: {block.text[:60]!r}")

    assert not wrong


def _text(path: str) -> str:
    return (ROOT / path).read_text()


def words_to_parse(document: Path) -> list[list[str]]:
    """Every `nbd-bridge …` of the document, without the parts that stand for something else."""
    lines = [line for block in blocks_of(document) for line in block.lines if is_typed(block)]
    found = [words for line in lines for words in commands_of(line)]
    found += [shlex.split(text) for text in inline_commands(document)]
    ours = (words[1:] for words in found if words[0].rpartition("/")[2] == "nbd-bridge")
    return [words for words in ours if words and not any("…" in word for word in words)]


@pytest.mark.parametrize("document", DOCUMENTS, ids=str)
def test_command_of_a_document_is_taken_by_the_command_line(
    document: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in list(os.environ):
        if name.startswith("NBD_BRIDGE_"):
            monkeypatch.delenv(name)
    wrong = {}
    for words in words_to_parse(document):
        try:
            parse(words)
        except click.UsageError as error:
            wrong[" ".join(words)] = error.format_message()

    assert not wrong


def parse(words: list[str]) -> None:
    """Raises click.UsageError."""
    command: click.Command = nbd_bridge
    context = click.Context(command)
    while isinstance(command, click.Group) and words and not words[0].startswith("-"):
        found = command.get_command(context, words[0])
        if found is None:
            raise click.UsageError(f"there is no {words[0]}")
        command, words = found, words[1:]
    if isinstance(command, click.Group):
        known = {option for each in command.get_params(context) for option in each.opts}
        if set(words) - known:
            raise click.UsageError(f"there is no {words}")
    # A command that is only named, such as `nbd-bridge resize`, has no arguments to check.
    elif words:
        # --help ends it; a configuration file is on the reader's host.
        with contextlib.suppress(click.exceptions.Exit, ConfigFileError):
            command.make_context(command.name, list(words))


def test_option_that_is_none_and_command_that_is_none_are_found() -> None:
    for words in (["serve", "nbd://h", "--no-such"], ["nothing"], ["set", "vm0", "--slow-ms", "x"]):
        with pytest.raises(click.UsageError):
            parse(words)


@pytest.mark.parametrize("document", [*DOCUMENTS, Path("nbd_plugin/README.md")], ids=str)
def test_parameters_of_the_plugin_are_taken_by_it(document: Path) -> None:
    text = (ROOT / document).read_text().replace("\\\n", " ")
    text = text.replace("$(nbd-bridge plugin-path)", "nbd_plugin/plugin.py")
    for line in re.findall(r"^ *(?:\$ )?nbdkit .*nbd_plugin/plugin\.py.*$", text, re.M):
        given = next(words for words in commands_of(line) if words[0] == "nbdkit")
        settings = PluginSettings()
        own = given[given.index("nbd_plugin/plugin.py") + 1 :]
        for word in own:
            if not word.startswith(("allow=", "deny=", "limit=")):  # of filters
                settings.set(*word.split("=", 1))


@cache
def program_texts() -> str:
    """All strings of the program, parts that are filled in as `…`."""
    found = []
    for package in ("bridge", "nbd_plugin"):
        for path in (ROOT / package).rglob("*.py"):
            for each in ast.walk(ast.parse(path.read_text())):
                if isinstance(each, ast.JoinedStr):
                    parts = (getattr(part, "value", None) for part in each.values)
                    found.append("".join(p if isinstance(p, str) else "…" for p in parts))
                elif isinstance(each, ast.Constant) and isinstance(each.value, str):
                    found.append(each.value)
    return "\n".join(found)


def test_messages_in_troubleshooting_are_those_of_the_program() -> None:
    rows = re.findall(r"^\| ([^|]+) \|", (ROOT / "docs/troubleshooting.md").read_text(), re.M)
    messages = [
        text for row in rows if "QEMU:" not in row for text in re.findall(r"`([^`]+)`", row)
    ]
    pieces = [piece.strip("( )") for text in messages for piece in text.split("…")]

    missing = [each for each in pieces if len(each) >= _WORDS_MIN and each not in program_texts()]

    assert len(messages) > 30
    assert not missing


def run_in_namespace(script: str, folder: Path) -> str:
    """Run a shell script as root of its own, with /run, /srv and the caches in `folder`.

    Returns its output. All of its processes end with it.
    """
    need("unshare")
    for name in ("srv", "cache"):
        (folder / name).mkdir()
    mounts = f"""
        mount -t tmpfs none /run
        mount --bind {folder}/srv /srv
        mkdir -p /var/cache/nbd-bridge && mount --bind {folder}/cache /var/cache/nbd-bridge
    """
    root = [] if os.geteuid() == 0 else ["--map-root-user"]
    command = ["unshare", *root, "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin"
    done = subprocess.run(
        [*command, "bash", "-euo", "pipefail", "-c", mounts + script],
        cwd=ROOT, env={"PATH": path, "HOME": str(folder)}, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout


def shell(line: str) -> str:
    """`line` as it is run: a bridge is in the background, and waited for."""
    words = next(commands_of(line), [""])
    shown = f"echo {shlex.quote('# ' + line)}"
    if words[:2] != ["nbd-bridge", "serve"]:
        return f"{shown}\n{line}"
    return f"{shown}\n{line} &\n{waiting(words[words.index('--socket-path') + 1])}"


def waiting(path: str) -> str:
    return (
        f"for _ in $(seq {_START_S}0); do [ -S {path} ] && break; sleep 0.1; done; test -S {path}"
    )


@pytest.mark.nbdkit
@pytest.mark.slow
def test_blocks_of_the_documents_do_what_they_say(tmp_path: Path) -> None:
    """One disk's life: installed, looked at, made larger, backed up, stopped, its cache removed."""
    for name in ("nbdkit", "nbdcopy", "curl"):
        need(name)
    found = {}
    for block in all_blocks():
        if match := RUN.fullmatch(block.mark):
            assert int(match[1]) not in found, block.mark
            found[int(match[1])] = block

    said = run_in_namespace(
        "\n".join(shell(line) for _, block in sorted(found.items()) for line in block.lines),
        tmp_path,
    )

    assert said.count("\n# ") > 10
    assert "safe to reboot this host: yes" in said
    assert "the disk has 11 GiB now" in said
    assert (tmp_path / "srv/backup.img").stat().st_size == 11 << 30
    assert not list((tmp_path / "cache").glob("*.cache"))


_SERVE = """
    nbdkit -U /run/{number}.nbd memory 64M
    mkdir -p $(dirname {path})
    nbd-bridge serve 'nbd+unix:///?socket=/run/{number}.nbd' --cache-mode off --socket-path {path} &
"""


def for_this_qemu(line: str, is_old: bool) -> str:
    """`line` in the words of the QEMU that is here."""
    if is_old:
        return line.replace("reconnect-ms=1000", "reconnect=1")
    return re.sub(r"reconnect=1\b", "reconnect-ms=1000", line)


def stopped(line: str) -> str:
    """The same machine, emulated and not started, with a monitor on standard input."""
    line = re.sub(r"accel=kvm(:tcg)?", "accel=tcg", line)
    return f"{line} -S -nodefaults -display none -monitor stdio"


def is_old_qemu() -> bool:
    said = subprocess.run(
        [need("qemu-system-x86_64"), "--version"], check=True, capture_output=True, text=True
    )
    version = re.search(r"version (\d+)\.(\d+)", said.stdout)
    assert version is not None
    return (int(version[1]), int(version[2])) < (9, 2)


@pytest.mark.nbdkit
@pytest.mark.qemu
@pytest.mark.slow
def test_qemu_takes_the_command_lines_of_the_documents(tmp_path: Path) -> None:
    lines = {
        line for block in all_blocks() for line in block.lines if line.startswith("qemu-system")
    }
    is_old = is_old_qemu()
    script = ""
    for number, line in enumerate(sorted(lines)):
        path = re.search(r"path=([^,]+)", line)
        assert path is not None
        script += _SERVE.format(number=number, path=path[1]) + waiting(path[1])
        script += f"\nprintf 'info qtree\\nquit\\n' | {stopped(for_this_qemu(line, is_old))}\n"
        script += f"nbd-bridge stop $(basename {path[1]} | cut -d. -f1) --even-with-guest; wait\n"

    said = run_in_namespace(script, tmp_path)

    assert len(lines) >= 2
    assert said.count("dev: vhost-user-blk-pci") == len(lines)


@pytest.mark.nbdkit
@pytest.mark.qemu
@pytest.mark.slow
def test_qemu_takes_a_disk_at_its_monitor(tmp_path: Path) -> None:
    (block,) = (each for each in all_blocks() if each.text.startswith("chardev-add "))
    is_old = is_old_qemu()
    plug, device = (for_this_qemu(line, is_old) for line in block.lines)
    machine = (
        "qemu-system-x86_64 -m 64M -machine q35,accel=kvm,memory-backend=mem -object "
        "memory-backend-memfd,id=mem,size=64M,share=on -device pcie-root-port,id=port0"
    )
    script = _SERVE.format(number=1, path="/run/vm0.vhost") + waiting("/run/vm0.vhost")
    keys = "".join(f"{line}\\n" for line in (plug, f"{device},bus=port0", "info qtree", "quit"))

    said = run_in_namespace(f"{script}\nprintf '{keys}' | {stopped(machine)}", tmp_path)

    assert 'dev: vhost-user-blk-pci, id "disk1"' in said
