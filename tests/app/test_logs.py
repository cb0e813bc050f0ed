"""The log: what it cannot write costs a line, and nothing else."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog

from bridge.app import logs
from bridge.app.logs import DroppingStream

_LIMIT_S = 20.0


def note(count: int) -> str:
    return f"dropped {count}\n"


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    """(read end, write end) of one page."""
    reader, writer = os.pipe()
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
    yield reader, writer
    for fd in (reader, writer):
        try:
            os.close(fd)
        except OSError:
            continue


def read_to_the_end(reader: int) -> list[str]:
    """The lines that come out of the pipe before "the end"."""
    data = b""
    while not data.endswith(b"the end\n"):
        data += os.read(reader, 65536)
    return data.decode().splitlines()[:-1]


def test_unread_log_lines_are_dropped_and_counted_in_their_place(
    pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs, "_QUEUE_MAX_BYTES", 10_000)
    reader, writer = pipe
    stream = DroppingStream(writer, note)
    total = 500

    for number in range(total):
        assert stream.write(f"{number:0100}\n") == 101

    data, told, expected = b"", 0, 0
    while expected < total:
        data += os.read(reader, 4096)
        *lines, data = data.split(b"\n")
        for line in lines:
            if line.startswith(b"dropped "):
                told += int(line.split()[1])
                expected += int(line.split()[1])
            else:
                assert int(line) == expected
                expected += 1
    assert expected == total
    assert total / 2 < told < total


def test_log_on_a_full_file_system_goes_on_when_there_is_room(tmp_path: Path) -> None:
    fd = os.open("/dev/full", os.O_WRONLY)
    stream = DroppingStream(fd, note)
    for _ in range(3):
        stream.write("lost\n")
    stream.drain(_LIMIT_S)
    file = os.open(tmp_path / "log", os.O_WRONLY | os.O_CREAT)
    os.dup2(file, fd)

    stream.write("kept\n")
    stream.drain(_LIMIT_S)

    assert (tmp_path / "log").read_text() == "dropped 3\nkept\n"
    os.close(file)
    os.close(fd)


def test_log_whose_reader_is_gone_does_no_harm(pipe: tuple[int, int]) -> None:
    reader, writer = pipe
    stream = DroppingStream(writer, note)
    os.close(reader)

    stream.write("to nobody\n")
    stream.write("to nobody\n")
    stream.drain(_LIMIT_S)


def test_log_that_others_made_non_blocking_loses_nothing(pipe: tuple[int, int]) -> None:
    reader, writer = pipe
    os.set_blocking(writer, False)
    stream = DroppingStream(writer, note)

    for number in range(1000):
        stream.write(f"{number:0100}\n")
    stream.write("the end\n")

    assert [int(line) for line in read_to_the_end(reader)] == list(range(1000))


def test_log_end_waits_only_its_time_for_a_reader(pipe: tuple[int, int]) -> None:
    reader, writer = pipe
    stream = DroppingStream(writer, note)
    stream.write("x" * 10_000 + "the end\n")

    stream.drain(0.001)  # It returns.

    assert read_to_the_end(reader) == []


def test_log_takes_text_that_is_not_utf8() -> None:
    reader, writer = os.pipe()
    stream = DroppingStream(writer, note)

    stream.write("name \udcff\n")
    stream.drain(_LIMIT_S)

    assert os.read(reader, 100) == b"name \\udcff\n"
    os.close(reader)
    os.close(writer)


def test_log_value_that_cannot_be_shown_costs_the_value_only() -> None:
    class Bad:
        def __repr__(self) -> str:
            raise ValueError

    render = logs._or_plain(structlog.processors.JSONRenderer())

    assert render(None, "info", {"event": "connected", "what": Bad()}) == (
        "connected (cannot be logged in full: ValueError)"
    )


def _said(script: str, tmp_path: Path, *, journal: bool, format_: str = "text") -> list[str]:
    """What a process that runs `script` after the set-up of the log has written."""
    path = tmp_path / "stderr"
    with path.open("wb") as file:
        status = os.fstat(file.fileno())
        journal_stream = f"{status.st_dev}:{status.st_ino}"
        code = (
            "import structlog\nfrom bridge.app import logs\n"
            f"logs.configure(level='info', format_={format_!r})\nlog = structlog.get_logger()\n"
        )
        subprocess.run(
            [sys.executable, "-c", code + script],
            stderr=file,
            check=True,
            env={**os.environ, "JOURNAL_STREAM": journal_stream if journal else "8:1"},
        )
    return path.read_text().splitlines()


def test_journald_gets_priorities_and_no_time(tmp_path: Path) -> None:
    script = (
        "log.info('one')\nlog.warning('two')\n"
        "try:\n    1 / 0\nexcept ZeroDivisionError:\n    log.exception('three')\n"
    )
    lines = _said(script, tmp_path, journal=True)
    assert lines[0].startswith("<6>[info")
    assert lines[1].startswith("<4>[warning")
    # Journald takes each line of a traceback for a message.
    assert len(lines) > 3
    assert all(line.startswith("<3>") for line in lines[2:])
    # Somebody else's pipe: time stamps, no priorities.
    assert _said(script, tmp_path, journal=False)[0].startswith("20")


def test_json_is_the_same_under_journald(tmp_path: Path) -> None:
    (line,) = _said("log.info('one')\n", tmp_path, journal=True, format_="json")
    assert json.loads(line).keys() == {"event", "level", "timestamp"}


def test_level_can_be_changed_and_lines_name_their_disk(tmp_path: Path) -> None:
    script = (
        "log.debug('one')\nlogs.set_level('debug')\nlogs.set_disk('vm0')\nlog.debug('two')\n"
        "logs.set_level('error')\nlog.warning('three')\nassert logs.level() == 'error'\n"
    )
    (line,) = _said(script, tmp_path, journal=False)
    assert "two" in line
    assert "disk=vm0" in line
