"""The model of a setting: its name for operators, its kind of value, its place in a command.

A command's settings are a dataclass of groups, and a group is a dataclass whose fields are made by
`setting`: `bridge.app.settings` has those of `serve`, `bridge.app.command_settings` all others.
This module does not know click.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeVar

T = TypeVar("T")


# The kinds of values.


@dataclass(frozen=True)
class Flag:
    """False, or True if the option is given."""


@dataclass(frozen=True)
class Number:
    """A finite float, for seconds and the like."""

    minimum: float
    maximum: float | None = None


@dataclass(frozen=True)
class Whole:
    """An int."""

    minimum: int
    maximum: int
    power_of_two: bool = False


@dataclass(frozen=True)
class Size:
    """A number of bytes, written as `units.parse_size` reads it (512M); so is `minimum`."""

    minimum: str


@dataclass(frozen=True)
class Choice:
    """One of some words."""

    words: tuple[str, ...]


@dataclass(frozen=True)
class Text:
    """UTF-8."""

    max_bytes: int


@dataclass(frozen=True)
class Path:
    """A path, not empty."""


@dataclass(frozen=True)
class Mode:
    """An int with the permission bits of a file, written in octal (0660)."""


@dataclass(frozen=True)
class Ranges:
    """(offset, length) pairs in bytes, each written as OFFSET:LENGTH."""


@dataclass(frozen=True)
class FeatureBits:
    """An int with the bits of virtio-blk features to withhold, written as -NAME,-NAME."""


Kind = Flag | Number | Whole | Size | Choice | Text | Path | Mode | Ranges | FeatureBits


@dataclass(frozen=True)
class Setting:
    """One field of a group, as an operator writes it."""

    option: str
    """Its name on the command line, such as `--cache-size`."""
    kind: Kind
    help: str
    written_default: str | None = None
    """The default as an operator would write it, for `--help`; None: the value itself."""

    @property
    def name(self) -> str:
        """Its name as a parameter or a key, such as `cache_size`."""
        return self.option.removeprefix("--").replace("-", "_")


def setting(
    option: str, kind: Kind, default: T, help_text: str = "", *, written_default: str | None = None
) -> T:
    """A field of a group. Typed as its default, as `dataclasses.field` is."""
    found: T = field(
        default=default, metadata={Setting: Setting(option, kind, help_text, written_default)}
    )
    return found


@dataclass(frozen=True, kw_only=True)
class CommandSettings:
    """The settings of a command: every field is a group, and has a default."""


S = TypeVar("S", bound=CommandSettings)


@dataclass(frozen=True)
class Declared:
    """One setting of a command: its group, its field, and its default."""

    group: str
    title: str
    field: str
    setting: Setting
    default: object


def declared(command: type[S]) -> Iterator[Declared]:
    """All settings of a command, group by group."""
    for group in fields(command):
        values = getattr(command(), group.name)
        for each in fields(values):
            yield Declared(
                group.name,
                values.title,
                each.name,
                each.metadata[Setting],
                getattr(values, each.name),
            )


def settings_of(command: type[S], given: Mapping[str, Any]) -> S:
    """The settings of a command: the values in `given`, and defaults for all others.

    The keys of `given` are names of settings (`Setting.name`); its values are converted and checked
    already.
    """
    changes: dict[str, dict[str, Any]] = {}
    for each in declared(command):
        if each.setting.name in given:
            changes.setdefault(each.group, {})[each.field] = given[each.setting.name]
    blank = command()
    return replace(
        blank,
        **{name: replace(getattr(blank, name), **values) for name, values in changes.items()},
    )
