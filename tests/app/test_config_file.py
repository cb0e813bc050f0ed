"""Configuration files of `serve`: what they may say, what is said about a wrong one, and what goes
before them."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bridge.app.settings import ServeSettings
from bridge.app.settings_model import declared
from bridge.cli import config_file
from bridge.cli import main as cli

GOOD = """
# The disk of vm0.
uri = "nbd://storage/vm0"
socket-path = "/run/vm0.sock"
cache-size = "10GB"
num-queues = 4
flush-interval = 7.5
read-only = true
"""

Run = Callable[..., tuple[int, list[str], list[str]]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs `nbd-bridge ARGUMENTS`: exit status, lines of output, lines of errors."""
    monkeypatch.setattr("bridge.app.logs.configure", lambda **_: None)

    def call(*arguments: str) -> tuple[int, list[str], list[str]]:
        with pytest.raises(SystemExit) as ended:
            cli.main(list(arguments))
        said = capsys.readouterr()
        return int(ended.value.code or 0), said.out.splitlines(), said.err.splitlines()

    return call


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ServeSettings]]:
    """What `serve` would have served: (URI, settings)."""
    found: list[tuple[str, ServeSettings]] = []

    def note(function: object, uri: str, settings: ServeSettings, received: None) -> None:
        found.append((uri, settings))

    monkeypatch.setattr("bridge.cli.serve.trio.run", note)
    for name in ("API", "CACHE_MODE", "ENGINE"):
        monkeypatch.delenv(f"NBD_BRIDGE_SERVE_{name}", raising=False)
    return found


def written(directory: Path, text: str, name: str = "vm0.toml") -> str:
    path = directory / name
    path.write_text(text)
    return str(path)


def test_file_gives_uri_and_options_and_the_bridge_its_name(
    directory: Path, run: Run, served: list[tuple[str, ServeSettings]]
) -> None:
    run("serve", "--config", written(directory, GOOD))

    ((uri, settings),) = served
    assert uri == "nbd://storage/vm0"
    assert settings.disk.socket_path == "/run/vm0.sock"
    assert settings.disk.num_queues == 4
    assert settings.disk.read_only
    assert settings.cache.size_bytes == 10**10
    assert settings.cache.flush_interval_s == 7.5
    assert settings.control.name == "vm0"
    assert settings.limits == ServeSettings().limits


def test_name_stands_for_a_file_of_the_systems_directory(
    directory: Path,
    run: Run,
    served: list[tuple[str, ServeSettings]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(config_file, "DIRECTORY", directory)
    written(directory, GOOD, "web.1.toml")

    run("serve", "--config", "web.1")

    assert served[0][1].control.name == "web.1"
    assert run("config", "check")[:2] == (0, [f"{directory}/web.1.toml: good"])


def test_command_line_goes_before_environment_before_file(
    directory: Path,
    run: Run,
    served: list[tuple[str, ServeSettings]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("NBD_BRIDGE_SERVE_NUM_QUEUES", "3")
    monkeypatch.setenv("NBD_BRIDGE_SERVE_CACHE_SIZE", "8M")
    monkeypatch.setenv("NBD_BRIDGE_SERVE_CONFIG", written(directory, GOOD))

    run("serve", "nbd://other/", "--num-queues", "2", "--name", "mine")

    ((uri, settings),) = served
    assert uri == "nbd://other/"
    assert settings.disk.num_queues == 2
    assert settings.cache.size_bytes == 8 << 20
    assert settings.cache.flush_interval_s == 7.5
    assert settings.control.name == "mine"


def test_uri_can_be_an_environment_variable(
    run: Run, served: list[tuple[str, ServeSettings]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NBD_BRIDGE_SERVE_URI", "nbd://storage/vm1")

    run("serve", "--socket-path", "/run/vm1.sock")

    assert served[0][0] == "nbd://storage/vm1"


def test_every_option_can_be_a_key(directory: Path) -> None:
    examples = {
        **{"fd": "3", "block-size": "4096", "queue-size": "64", "features": "'-mq'"},
        **{
            "cache-mode": "'off'",
            "cache-size": "'1G'",
            "engine": "'pure'",
            "socket-mode": "'0660'",
        },
        **{"log-level": "'error'", "log-format": "'json'", "connections": "2", "num-queues": "2"},
        **{"read-only": "true", "wait-for-server": "true"},
    }
    lines = []
    for each in declared(ServeSettings):
        name = each.setting.option.removeprefix("--")
        usual = "1.5" if isinstance(each.default, float) else "'x'"
        lines.append(f"{name} = {examples.get(name, usual)}")

    found = config_file.read(Path(written(directory, "\n".join(lines))))

    assert set(found) == {each.setting.name for each in declared(ServeSettings)}


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("cache_size = 1", "there is no option 'cache_size'; did you mean 'cache-size'?"),
        ("cachesize = 1", "did you mean 'cache-size'?"),
        ("url = 'nbd://h/'", "did you mean 'uri'?"),
        ("colour = 1", "options are those of 'nbd-bridge serve --help'"),
        ("cache-size = '10 gigs'", "'10 gigs' is not a size: write 10G"),
        ("cache-size = '1M'", "'1M' is below the minimum of 4M"),
        ("cache-size = 1.5", "write a number of bytes, or a size in quotes"),
        ("num-queues = 65", "65 is not in the range 1<=x<=64"),
        ("num-queues = true", "num-queues: write a whole number"),
        ("num-queues = '2'", "num-queues: write a whole number"),
        ("read-only = 1", "read-only: write true or false"),
        ("stop-timeout = nan", "'nan' is not a finite number"),
        ("stop-timeout = -1", "is not in the range x>=0"),
        ("serial = 5", "serial: write text in quotes"),
        ("cache-mode = 'on'", "is not one of 'off', 'writethrough', 'writeback'"),
        ("features = 'mq'", "write -NAME with NAME of"),
        ("socket-mode = '0888'", "write it in octal"),
        ("socket-mode = '0060'", "not even for the owner"),
        ("socket-mode = 0o660", "write text in quotes"),
        ("[cache]", "'cache': write lines 'option = value' alone"),
        ("tls.ca = 'x'", "'tls': write lines"),
        ("serial = '''\na\n0123456789abcdefghij'''", "is longer than"),
        (f"serial = '''{'x' * 30}" + "\n" * 31 + "'''", "is longer than"),
        ("fd = 0x1" + "0" * 5000, "fd: the number is too large"),
        ('"a\\nb\\u001b" = 1', r"there is no option 'a\nb\x1b'"),
        ("'colour' = 1", "there is no option 'colour'"),
    ],
)
def test_wrong_line_is_named_with_what_is_allowed(
    line: str, says: str, directory: Path, run: Run
) -> None:
    key = line.partition(" ")[0]
    others = [each for each in GOOD.splitlines() if not each.startswith(f"{key} ")]
    path = written(directory, "\n".join([*others, line]))
    number = len(others) + 1 + line.count("\n")

    for command in (("serve", "--config"), ("config", "check"), ("config", "show")):
        status, out, (said,) = run(*command, path)

        assert status == 2
        assert said.startswith(f"nbd-bridge: {path}, line {number}: ")
        assert says in said
        assert not out


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"uri = ", "not TOML: "),
        (b"a = 1\nb\n", "(at line 2, column 2)"),
        (b"uri = 'x'\nuri = 'y'\n", "not TOML: Cannot overwrite a value (at line 2"),
        (b"uri = 1\n\xff", "line 2: not UTF-8"),
        (b"#" * (2 << 20), "at most 1 MiB"),
        (b"fd = " + b"9" * 5000, "not TOML: a number with too many digits"),
        (b"a = " + b"[" * 5000, "not TOML: nested too deeply"),
        (b"", "there is no uri"),
        (b"uri = 'nbd://h/'", "give --socket-path"),
        (b"uri = 'http://h/'\nsocket-path = '/x'", "http://h/"),
        (b"uri = 'nbd://h/'\nsocket-path = '/x'\nfd = 3", "either --socket-path or --fd"),
    ],
)
def test_file_that_cannot_be_used_gets_one_line(
    data: bytes, says: str, directory: Path, run: Run
) -> None:
    path = directory / "vm0.toml"
    path.write_bytes(data)

    status, _, (said,) = run("config", "check", str(path))

    assert status == 2
    assert said.startswith(f"nbd-bridge: {path}")
    assert says in said


def test_file_that_is_not_there_or_no_file_is_named(directory: Path, run: Run) -> None:
    status, _, (said,) = run("serve", "--config", f"{directory}/none.toml")
    assert (status, said) == (
        2,
        f"nbd-bridge: there is no configuration file {directory}/none.toml",
    )
    status, _, (said,) = run("serve", "--config", f"{directory}/")
    assert (status, said) == (2, f"nbd-bridge: configuration file {directory}: Is a directory")


def test_serve_says_how_many_faults_there_are_and_check_says_all(directory: Path, run: Run) -> None:
    path = written(directory, "uri = 5\nserial = 5\nnosuch = 1\n")

    _, _, (said,) = run("serve", "--config", path)
    _, _, lines = run("config", "check", path)

    assert said.endswith(f"(and 2 more: nbd-bridge config check {path})")
    assert [line.partition(", ")[2].partition(":")[0] for line in lines] == [
        "line 1",
        "line 2",
        "line 3",
    ]


def test_file_of_a_hundred_thousand_wrong_lines_is_refused_without_reading_it_for_each(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Each faulty line once meant to parse every beginning of the file.
    parsed_bytes = 0
    loads = tomllib.loads

    def count(text: str) -> dict[str, Any]:
        nonlocal parsed_bytes
        parsed_bytes += len(text)
        return loads(text)

    monkeypatch.setattr(tomllib, "loads", count)
    lines = [f"k{number} = 1" for number in range(70_000)]
    path = Path(written(directory, "\n".join(lines)))

    with pytest.raises(config_file.ConfigFileError) as refused:
        config_file.read(path)

    assert len(refused.value.faults) == 101
    assert ", line 100: there is no option 'k99'" in refused.value.faults[99]
    assert refused.value.faults[-1] == f"{path}: and more like these"
    assert parsed_bytes < 2 * path.stat().st_size


def test_value_of_very_many_lines_is_named_without_trying_each(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    loads = tomllib.loads
    monkeypatch.setattr(tomllib, "loads", lambda text: (calls.append(text), loads(text))[1])
    path = Path(written(directory, "colour = [\n" + "1,\n" * 10_000 + "]\n"))

    with pytest.raises(config_file.ConfigFileError, match=r"line 1000[0-9]: 'colour': write"):
        config_file.read(path)

    assert len(calls) < 60


def test_check_goes_on_after_a_wrong_file(directory: Path, run: Run) -> None:
    bad, good = written(directory, "x = 1", "bad.toml"), written(directory, GOOD, "good.toml")

    status, out, err = run("config", "check", bad, good)

    assert status == 2
    assert out == [f"{good}: good"]
    assert len(err) == 1


def test_show_says_where_each_value_comes_from(
    directory: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NBD_BRIDGE_SERVE_SOCKET_MODE", "660")
    path = written(directory, GOOD)

    _, out, _ = run("config", "show", "--json", path)
    found = json.loads("\n".join(out))

    assert found["uri"] == {"value": "nbd://storage/vm0", "from": "file"}
    assert found["cache-size"] == {"value": 10**10, "from": "file"}
    assert found["socket-mode"] == {"value": "0660", "from": "environment"}
    assert found["queue-size"] == {"value": 1024, "from": "default"}
    _, out, _ = run("config", "show", path)
    assert [line.split() for line in out if line.startswith("num-queues")] == [
        ["num-queues", "4", "(file)"]
    ]


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("NBD_BRIDGE_SERVE_CACHESIZE", "did you mean NBD_BRIDGE_SERVE_CACHE_SIZE?"),
        ("NBD_BRIDGE_CACHE_SIZE", "did you mean NBD_BRIDGE_SERVE_CACHE_SIZE?"),
        ("NBD_BRIDGE_COLOUR", "--help"),
        ("NBD_BRIDGE_INFO_JSON", None),
        ("NBD_BRIDGE_CACHE_FLUSH_TLS_CA", None),
        ("NBD_BRIDGE_CONFIG_SHOW_JSON", None),
        ("NBD_BRIDGE_SERVE_URI", None),
        ("NBD_BRIDGE_SERVE_CONFIG", None),
        ("NBD_BRIDGE_VENV", None),
    ],
)
def test_misspelt_variable_gets_a_warning(
    name: str,
    says: str | None,
    directory: Path,
    run: Run,
    served: list[tuple[str, ServeSettings]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lines: list[str] = []
    monkeypatch.setattr("bridge.cli.serve._log.warning", lines.append)
    monkeypatch.setenv(name, "" if name.endswith("CONFIG") else "1")

    run("serve", "--config", written(directory, GOOD))

    assert served
    if says is None:
        assert not lines
    else:
        assert len(lines) == 1
        assert name in lines[0]
        assert says in lines[0]


def test_misspelt_variable_of_another_command_is_a_line_on_standard_error(
    run: Run, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NBD_BRIDGE_CACHE_SHOW_JSN", "1")

    _, _, err = run("cache", "show", str(directory / "none"))

    assert err[0] == (
        "nbd-bridge: warning: the environment variable NBD_BRIDGE_CACHE_SHOW_JSN is no option's, "
        "and ignored; did you mean NBD_BRIDGE_CACHE_SHOW_JSON?"
    )
