"""The command line itself: what its options accept, and the one line it says otherwise."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bridge.app.settings import MIN_CACHE_SIZE
from bridge.cache.file.layout import geometry_for
from bridge.cli import main as cli
from bridge.units import parse_size, size_text
from nbd_plugin.errors import PluginError
from nbd_plugin.sizes import parse_size as parse_plugin_size

Said = Callable[..., str]

_SIGNALS = [
    *(signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGHUP),
    *(signal.SIGUSR1, signal.SIGUSR2),
]
"""A command that connects keeps them to the end of its process, which is ours here."""


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Said]:
    """Runs `nbd-bridge ARGUMENTS` in this process; the one line of its refusal."""
    # It would be set up for the whole process, with what stands for its standard error here.
    monkeypatch.setattr("bridge.app.logs.configure", lambda **_: None)
    handlers = {each: signal.getsignal(each) for each in _SIGNALS}

    def run(*arguments: str, status: int = 2) -> str:
        with pytest.raises(SystemExit) as ended:
            cli.main(list(arguments))
        said = capsys.readouterr()
        assert ended.value.code == status, said.err
        (line,) = said.err.splitlines()
        assert line.startswith("nbd-bridge: ")
        assert not said.out
        return line

    yield run
    for each, handler in handlers.items():
        signal.signal(each, handler)


_SECONDS = [
    ("serve", "--flush-interval"),
    ("serve", "--poll-us"),
    ("serve", "--connect-timeout"),
    ("serve", "--request-timeout"),
    ("serve", "--reconnect-timeout"),
    ("serve", "--stale-write-grace"),
    ("serve", "--stop-timeout"),
    ("info", "--connect-timeout"),
    ("cache flush", "--timeout"),
    ("cache flush", "--connect-timeout"),
    ("cache warm", "--timeout"),
    ("cache warm", "--connect-timeout"),
]


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "1e999", "-1"])
@pytest.mark.parametrize(("command", "option"), _SECONDS)
def test_seconds_that_are_no_finite_number_are_refused(
    command: str, option: str, value: str, refused: Said
) -> None:
    line = refused(*command.split(), "nbd://none", option, value)

    assert f"'{option}'" in line


@pytest.mark.parametrize(("command", "option"), [*_SECONDS, ("cache warm", "--cache-size")])
def test_environment_variable_has_the_name_of_its_option(
    command: str, option: str, refused: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"NBD_BRIDGE_{command} {option.removeprefix('--')}"
    monkeypatch.setenv(name.replace(" ", "_").replace("-", "_").upper(), "nan")

    assert f"'{option}'" in refused(*command.split(), "nbd://none")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["nosuch"], "'nosuch'"),
        (["serve"], "missing argument 'URI'"),
        (["serve", "nbd://h", "--nosuch"], "'--nosuch'"),
        (["serve", "nbd://h", "--num-queues", "x"], "'--num-queues'"),
        (["serve", "nbd://h", "--cache-mode", "on"], "'writethrough'"),
        (["serve", "nbd://h", "--fd", "99999999999999999999"], "'--fd'"),
        (["serve", "nbd://h", "--serial", "\udcff"], "'--serial': '\\udcff' is not UTF-8"),
        (["info", "nbd://h/\udcff"], "'nbd://h/\\udcff': not UTF-8"),
        (["cache", "show"], "'nbd-bridge cache show --help'"),
        (["cache", "show", "a", "b"], "extra argument"),
    ],
)
def test_command_line_that_is_wrong_is_told_in_one_line(
    arguments: list[str], says: str, refused: Said
) -> None:
    assert says in refused(*arguments)


@pytest.mark.parametrize(
    ("arguments", "status"), [(["--help"], 0), (["cache", "-h"], 0), ([], 2), (["cache"], 2)]
)
def test_help_is_printed_when_asked_for_and_when_nothing_is(
    arguments: list[str], status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)

    assert ended.value.code == status
    said = capsys.readouterr()
    assert (said.err if status else said.out).startswith("Usage: nbd-bridge")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0", 0),
        ("00", 0),
        ("0K", 0),
        ("512", 512),
        ("4k", 4096),
        ("1MiB", 1 << 20),
        ("2TB", 2 * 10**12),
        ("10GB", 10**10),
        ("10GiB", 10 << 30),
        ("10 GiB", 10 << 30),
        ("64 MiB", 64 << 20),
        ("1kB", 1000),
        ("7B", 7),
        ("1.5GB", 15 * 10**8),
        ("1.5G", 3 << 29),
        ("0.1k", 102),
        ("0.0001K", 0),
    ],
)
def test_size_good_one_is_its_bytes(text: str, expected: int) -> None:
    assert parse_size(text) == expected


@pytest.mark.parametrize(
    "text", ["", "K", "1P", "-1", "1.5", "1.G", ".5G", "1.5.5G", "٣", "9" * 5000]
)
def test_size_bad_one_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not a size"):
        parse_size(text)


@pytest.mark.parametrize("text", ["10 gigs", "10 Gigabytes", "10GiBs", "10GBit"])
def test_size_in_other_words_gets_a_hint(text: str) -> None:
    with pytest.raises(ValueError, match=r"write 10G \(powers of 1024\) or 10GB"):
        parse_size(text)


_SIZES = ["0.5K", "1", "512", "1.5G", "10GB", "10GiB", "2 TiB", "4kb", "8b", "3T", "1.25MB"]
_NO_SIZES = ["", "G", "1.5", "10 gigs", "1  G", "-1", "1e3", "1.G", "0x10", "10\N{KELVIN SIGN}"]


@pytest.mark.parametrize("text", _SIZES)
def test_size_means_the_same_to_the_bridge_and_to_the_plugin(text: str) -> None:
    assert parse_size(text) == parse_plugin_size(text)


@pytest.mark.parametrize("text", _NO_SIZES)
def test_size_that_is_none_is_none_to_bridge_and_plugin(text: str) -> None:
    with pytest.raises(ValueError, match="is not a size"):
        parse_size(text)
    with pytest.raises(PluginError):
        parse_plugin_size(text)


@pytest.mark.parametrize(
    ("count", "expected"),
    [(0, "0 bytes"), (1023, "1023 bytes"), (64 << 20, "64 MiB"), (3 << 29, "1.5 GiB")],
)
def test_size_text_is_short(count: int, expected: str) -> None:
    assert size_text(count) == expected


@pytest.mark.parametrize("value", ["0", "1", "4095K"])
@pytest.mark.parametrize("command", ["serve", "cache warm"])
def test_cache_size_below_the_minimum_is_refused_before_connecting(
    command: str, value: str, refused: Said
) -> None:
    line = refused(*command.split(), "nbd://none", "--cache-size", value)

    assert "'--cache-size'" in line
    assert "below the minimum of 4M" in line


def test_least_cache_size_is_what_a_cache_needs() -> None:
    least = parse_size(MIN_CACHE_SIZE)

    assert geometry_for(disk_bytes=1 << 30, cache_bytes=least).slots == least >> 16


@pytest.mark.parametrize("option", ["--cache-dir", "--socket-path", "--tls-ca"])
def test_path_that_is_empty_is_refused(option: str, refused: Said) -> None:
    assert f"'{option}': the path is empty" in refused("serve", "nbd://none", option, "")


@pytest.mark.parametrize("value", ["0:1M", "0K:1M", "00:1M", "1G:4K"])
def test_range_good_one_is_accepted(value: str, refused: Said) -> None:
    # What is refused is the URI, which is looked at later.
    assert "not an NBD URI" in refused("cache", "warm", "http://none", "--range", value)


@pytest.mark.parametrize(
    ("value", "says"),
    [("0:0", "the length is 0"), ("1M", "OFFSET:LENGTH"), ("x:1M", "'x' is not a size")],
)
def test_range_names_the_fault_of_a_bad_one(value: str, says: str, refused: Said) -> None:
    assert says in refused("cache", "warm", "nbd://none", "--range", value)


_CONNECTING = ["serve", "info", "cache warm"]


@pytest.mark.parametrize("command", _CONNECTING)
@pytest.mark.parametrize(
    ("uri", "says"),
    [
        ("nbd:localhost:10809:exportname=x", "write nbd://localhost:10809/x"),
        ("nbd:unix:/run/s", "write nbd+unix:///?socket=/run/s"),
        ("nbd:/x", "write nbd://HOST/x"),
        ("nbd://user:secret@localhost/x", "a user or password"),
        ("nbd://a..b/", "the name of a host"),
        ("nbd://münchen/", "xn--"),
        ("nbd+unix:///?socket=/etc/passwd", "not a socket"),
    ],
)
def test_uri_that_cannot_be_meant_is_refused(
    command: str, uri: str, says: str, refused: Said, tmp_path: Path
) -> None:
    socket = ["--socket-path", str(tmp_path / "v")] if command == "serve" else []

    line = refused(*command.split(), uri, *socket)

    assert says in line
    assert "secret" not in line


@pytest.mark.parametrize("command", _CONNECTING)
@pytest.mark.parametrize("option", ["--tls-ca", "--tls-cert", "--tls-key"])
def test_tls_option_without_tls_is_refused(
    command: str, option: str, refused: Said, tmp_path: Path
) -> None:
    socket = ["--socket-path", str(tmp_path / "v")] if command == "serve" else []
    uri = f"nbd+unix:///?socket={tmp_path}/s"

    line = refused(*command.split(), uri, option, "/etc/passwd", *socket)

    assert f"{option} needs TLS: use the scheme nbds+unix://" in line


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--tls-ca", "/nonexistent"], "/nonexistent (--tls-ca): No such file or directory"),
        (["--tls-ca", "/etc/passwd"], "/etc/passwd: not a usable certificate of a CA (--tls-ca)"),
        (["--tls-ca", "/dev/zero"], "/dev/zero (--tls-ca): not a file"),
        (["--tls-key", "/etc/passwd"], "a key needs its certificate: give --tls-cert too"),
        (["--tls-cert", "/etc/passwd"], "not a usable certificate (--tls-cert): no certificate"),
        (["--tls-cert", "/nonexistent"], "/nonexistent (--tls-cert): No such file"),
    ],
)
def test_tls_file_that_is_none_is_refused_with_its_option(
    options: list[str], says: str, refused: Said
) -> None:
    assert says in refused("info", "nbds://localhost:1/", *options)


def test_connection_refused_is_told_without_python(refused: Said) -> None:
    line = refused("info", "nbd://127.0.0.1:1/", status=1)

    assert line == "nbd-bridge: 127.0.0.1:1: cannot connect: Connection refused"


def test_user_without_a_home_directory_is_told_to_name_one(
    refused: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(os, "geteuid", lambda: 4711)
    monkeypatch.setattr(Path, "home", no_home)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)

    line = refused("cache", "warm", "nbd://127.0.0.1:1/")

    assert "user 4711 has no home directory" in line
    assert "--cache-dir" in line


@pytest.mark.parametrize("words", ["", "cache ", "c", "serve --tls", "info --", "cache flush --"])
def test_completion_says_nothing_but_completions(words: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "bridge"],
        env={
            **os.environ,
            "_NBD_BRIDGE_COMPLETE": "bash_complete",
            "COMP_WORDS": f"nbd-bridge {words}",
            "COMP_CWORD": str(len(words.split(" "))),
        },
        capture_output=True,
        check=False,
    )

    assert done.stderr == b""
    assert done.stdout.startswith(b"plain,")
    assert all(line.startswith(b"plain,") for line in done.stdout.splitlines())


def test_output_that_cannot_be_written_ends_the_demo_in_order(tmp_path: Path) -> None:
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [sys.executable, "-m", "bridge", "demo", "--no-guest"],
            stdout=full,
            stderr=subprocess.PIPE,
            env={**os.environ, "TMPDIR": str(tmp_path)},
            check=False,
        )

    assert b"Traceback" not in done.stderr
    assert done.returncode == 1
    assert list(tmp_path.iterdir()) == []
