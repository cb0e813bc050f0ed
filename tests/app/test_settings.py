"""The model of settings: what the command line, the environment and defaults make of it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import fields

import click
import pytest

from bridge.app.command_settings import (
    BenchSettings,
    CacheDropSettings,
    CacheFlushSettings,
    CacheListSettings,
    CachePruneSettings,
    CacheShowSettings,
    CacheWarmSettings,
    CheckSettings,
    CompletionSettings,
    ConfigCheckSettings,
    ConfigShowSettings,
    DemoSettings,
    InfoSettings,
    InstallUnitsSettings,
    ManPagesSettings,
    PluginPathSettings,
)
from bridge.app.settings import (
    ConnectSettings,
    ServerSettings,
    ServeSettings,
    TlsSettings,
    client_options,
)
from bridge.app.settings_model import CommandSettings, declared, settings_of
from bridge.cli.main import nbd_bridge
from bridge.server.client_options import ClientOptions

_TLS = {"tls-ca", "tls-cert", "tls-key"}
_OPTIONS: dict[str, tuple[type[CommandSettings], set[str]]] = {
    "serve": (
        ServeSettings,
        {
            *(
                "socket-path",
                "fd",
                "socket-group",
                "socket-mode",
                "read-only",
                "serial",
                "num-queues",
                "queue-size",
                "block-size",
            ),
            *("features", "cache-mode", "cache-size", "cache-dir", "flush-interval"),
            *("connect-timeout", "connections", "request-timeout", "reconnect-timeout"),
            *("stale-write-grace", "poll-us", "engine", "stop-timeout", "drain-timeout"),
            *("log-level", "log-format", "slow-ms", "name", "api", "pidfile", "wait-for-server"),
            *_TLS,
        },
    ),
    "info": (InfoSettings, {"json", "list", "connect-timeout", *_TLS}),
    "cache show": (CacheShowSettings, {"json"}),
    "cache list": (CacheListSettings, {"json", "check-servers", "connect-timeout", *_TLS}),
    "cache prune": (
        CachePruneSettings,
        {"gone", "older-than", "discard-dirty", "dry-run", "json", "connect-timeout", *_TLS},
    ),
    "cache drop": (CacheDropSettings, {"discard-dirty"}),
    "cache flush": (
        CacheFlushSettings,
        {"moved", "force", "skip-damaged", "timeout", "json", "connect-timeout", *_TLS},
    ),
    "cache warm": (
        CacheWarmSettings,
        {"cache-size", "cache-dir", "range", "timeout", "json", "connect-timeout", *_TLS},
    ),
    "install-units": (InstallUnitsSettings, {"root", "vendor", "program", "plugin"}),
    "completion": (CompletionSettings, set()),
    "man-pages": (ManPagesSettings, set()),
    "plugin-path": (PluginPathSettings, set()),
    "config check": (ConfigCheckSettings, set()),
    "config show": (ConfigShowSettings, {"json"}),
    "check": (CheckSettings, {"json", "destructive", "only", "timeout"}),
    "bench": (
        BenchSettings,
        {
            *("rw", "block-size", "depth", "queues", "runtime", "flush-every"),
            *("json", "destructive"),
        },
    ),
    "demo": (DemoSettings, {"no-guest"}),
}
_COMMANDS = list(_OPTIONS)


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [each for each in os.environ if each.startswith("NBD_BRIDGE_")]:
        monkeypatch.delenv(name)


def context_of(command: str, arguments: list[str], **extra: object) -> click.Context:
    """`nbd-bridge COMMAND ARGUMENTS`, parsed and not run."""
    context = click.Context(
        nbd_bridge,
        info_name="nbd-bridge",
        auto_envvar_prefix="NBD_BRIDGE",
        **nbd_bridge.context_settings,  # Each command keeps the first help option that it made.
    )
    found: click.Command = nbd_bridge
    for word in command.split():
        assert isinstance(found, click.Group)
        child = found.get_command(context, word)
        assert child is not None
        found = child
        if isinstance(found, click.Group):
            context = click.Context(found, info_name=word, parent=context)
    return found.make_context(command.split()[-1], arguments, parent=context, **extra)  # type: ignore[arg-type]


def parsed(command: str, arguments: list[str], **extra: object) -> CommandSettings:
    """What a command would get."""
    settings, _ = _OPTIONS[command]
    usage = command_usage(command)
    words = ["x"] * any(word in usage for word in ("URI", "FILE", "DIRECTORY", "SOCKET"))
    words += ["bash"] * (command == "completion")
    return settings_of(settings, context_of(command, words + arguments, **extra).params)


def command_usage(command: str) -> str:
    return context_of(command, [], resilient_parsing=True).get_usage()


@pytest.mark.parametrize("command", _COMMANDS)
def test_options_of_a_command_keep_their_names(command: str) -> None:
    settings, names = _OPTIONS[command]

    assert {each.setting.option for each in declared(settings)} == {f"--{name}" for name in names}


@pytest.mark.parametrize("command", _COMMANDS)
def test_defaults_as_the_command_line_parses_them_are_those_of_the_model(command: str) -> None:
    settings, _ = _OPTIONS[command]

    assert parsed(command, []) == settings()


@pytest.mark.parametrize("command", _COMMANDS)
def test_every_option_has_its_environment_variable(
    command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A value that no option takes is found by each, under the option's name."""
    settings, _ = _OPTIONS[command]
    for each in declared(settings):
        if each.default is False or each.setting.option in (
            "--cache-dir",
            "--socket-path",
            "--api",
            "--name",
            "--pidfile",
            "--socket-group",
            "--root",
            "--program",
            "--plugin",
        ):
            continue
        if each.setting.option.startswith("--tls"):
            continue
        value = "x" * 50  # too long for a text, no number, no choice
        with monkeypatch.context() as patch:
            patch.setenv(
                f"NBD_BRIDGE_{command} {each.setting.name}".replace(" ", "_").upper(), value
            )
            with pytest.raises(click.BadParameter) as refused:
                parsed(command, [])
        assert f"'{each.setting.option}'" in refused.value.format_message()


def test_flag_and_path_of_the_environment_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NBD_BRIDGE_SERVE_READ_ONLY", "yes")
    monkeypatch.setenv("NBD_BRIDGE_SERVE_TLS_CERT", "/c")
    monkeypatch.setenv("NBD_BRIDGE_SERVE_CACHE_DIR", "/d")

    found = parsed("serve", [])

    assert isinstance(found, ServeSettings)
    assert found.disk.read_only
    assert found.tls.tls_certificate_file == "/c"
    assert found.cache.directory == "/d"


def test_option_goes_before_the_environment_and_that_before_other_defaults(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("NBD_BRIDGE_SERVE_NUM_QUEUES", "3")
    monkeypatch.setenv("NBD_BRIDGE_SERVE_CACHE_SIZE", "8M")
    defaults = {"num_queues": 4, "cache_size": "16M", "stop_timeout": 7}

    found = parsed("serve", ["--num-queues", "2"], default_map=defaults)

    assert isinstance(found, ServeSettings)
    assert found.disk.num_queues == 2
    assert found.cache.size_bytes == 8 << 20
    assert found.limits.stop_timeout_s == 7


@pytest.mark.parametrize(("name", "value"), [("num_queues", 65), ("cache_size", "1M")])
def test_other_default_that_is_wrong_is_refused_like_an_option(name: str, value: object) -> None:
    with pytest.raises(click.BadParameter) as refused:
        parsed("serve", [], default_map={name: value})
    assert f"'--{name.replace('_', '-')}'" in refused.value.format_message()


def test_client_gets_what_the_operator_sets() -> None:
    server = ServerSettings(connect_timeout_s=1, connections=2, request_timeout_s=3)
    tls = TlsSettings(tls_ca_file="a", tls_key_file="k")

    options = client_options(server, tls)

    assert options == ClientOptions(
        connect_timeout_s=1, connections=2, request_timeout_s=3, tls_ca_file="a", tls_key_file="k"
    )


def test_client_without_any_setting_has_its_own_defaults() -> None:
    assert client_options(ServerSettings(), TlsSettings()) == ClientOptions()
    assert client_options(ConnectSettings(), TlsSettings()) == ClientOptions()


@pytest.mark.parametrize("command", _COMMANDS)
def test_help_has_every_option_under_its_group_and_an_example(command: str) -> None:
    settings, _ = _OPTIONS[command]
    text = context_of(command, [], resilient_parsing=True).get_help()

    at = 0
    for group in fields(settings):
        title = getattr(settings(), group.name).title
        at = text.index(f"\n{title}:\n", at)
        for each in declared(settings):
            if each.group == group.name:
                assert text.index(f"\n  {each.setting.option}", at) > at
    example = text.partition("\nExample:\n  ")[2]
    assert re.search(rf"\bnbd-bridge {command}\b", example)


def _all_commands(group: click.Group, path: str = "") -> Iterator[tuple[str, click.Command]]:
    context = click.Context(group)
    for name in group.list_commands(context):
        found = group.get_command(context, name)
        assert found is not None
        yield f"{path}{name}", found
        if isinstance(found, click.Group):
            yield from _all_commands(found, f"{path}{name} ")


@pytest.mark.parametrize("command", ["", "cache"])
def test_help_of_a_group_has_an_example(command: str) -> None:
    words = f"nbd-bridge {command}".rstrip()
    found = dict(_all_commands(nbd_bridge)).get(command, nbd_bridge)

    assert f"\nExample:\n  {words} " in click.Context(found, info_name=words).get_help()


@pytest.mark.parametrize(
    "command",
    [
        *("info", "list", "status", "flush", "resize", "set", "stop", "top", "bench", "check"),
        *("cache list", "cache prune", "cache show", "cache flush", "cache warm"),
    ],
)
def test_command_that_prints_a_result_can_print_json(command: str) -> None:
    found = dict(_all_commands(nbd_bridge))[command]

    assert "--json" in {option for each in found.params for option in each.opts}
