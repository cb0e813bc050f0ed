"""What `serve` would make of a configuration file, without serving."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import click
from click.core import ParameterSource

from bridge.app.settings import ServeSettings
from bridge.app.settings_model import Mode, declared, settings_of
from bridge.cli import config_file
from bridge.cli import serve as serve_module
from bridge.cli.wording import explain
from bridge.errors import ConfigError
from bridge.server.uri import parse_uri

_SOURCES = {
    ParameterSource.COMMANDLINE: "command line",
    ParameterSource.ENVIRONMENT: "environment",
    ParameterSource.DEFAULT_MAP: "file",
}


@dataclass(frozen=True)
class Shown:
    """One option as `serve` would get it."""

    option: str
    value: object
    source: str
    """environment, file, or default."""


def faults_of(path: Path) -> list[str]:
    """What keeps `serve` from using this file, one line each."""
    try:
        context = _context(path)
        parse_uri(context.params[config_file.URI])
        serve_module.check_socket(settings_of(ServeSettings, context.params))
    except config_file.ConfigFileError as error:
        return error.faults
    except click.MissingParameter:
        return [f'{path}: there is no uri, such as: uri = "nbd://storage/vm0"']
    except click.UsageError as error:
        return [f"{path}: {' '.join(error.format_message().split())}"]
    except ConfigError as error:
        return [f"{path}: {explain(error)}"]
    return []


def shown(path: Path) -> list[Shown]:
    """All options that `serve --config PATH` would have here. Raises click's errors."""
    context = _context(path)
    rows = [Shown(config_file.URI, context.params[config_file.URI], _source(context, "uri"))]
    for each in declared(ServeSettings):
        name = each.setting.name
        option = each.setting.option.removeprefix("--")
        value = context.params[name]
        if isinstance(each.setting.kind, Mode) and value is not None:
            value = f"{value:04o}"
        rows.append(Shown(option, value, _source(context, name)))
    return rows


def _context(path: Path) -> click.Context:
    """`nbd-bridge serve --config PATH`, parsed and not run."""
    root = click.get_current_context().find_root()
    arguments = ["--config", str(path.absolute())]
    return serve_module.command.make_context("serve", arguments, parent=root)


def _source(context: click.Context, name: str) -> str:
    source = context.get_parameter_source(name)
    return _SOURCES.get(source, "default") if source is not None else "default"
