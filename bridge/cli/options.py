"""The options of a command, made from its settings: how each is parsed, and its place in `--help`.

A value comes from the command line, else from the environment, else from the context's
`default_map` (which a configuration file fills: see `config_file`), else it is the default.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from math import isfinite
from typing import Any, TypeVar

import click

from bridge.app.settings_model import (
    Choice,
    CommandSettings,
    Declared,
    FeatureBits,
    Flag,
    Kind,
    Mode,
    Number,
    Path,
    Ranges,
    Size,
    Text,
    Whole,
    declared,
)
from bridge.spec.virtio_blk import FEATURE_BITS
from bridge.units import parse_size

S = TypeVar("S", bound=CommandSettings)


class Command(click.Command):
    """A command whose `--help` has its options in groups, and an example at its end."""

    def __init__(self, *args: Any, example: str = "", **extra: Any) -> None:
        super().__init__(*args, **extra)
        self.example = example

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options of each group under its title, the others last."""
        groups: dict[str, list[tuple[str, str]]] = {}
        others: list[tuple[str, str]] = []
        for each in self.get_params(ctx):
            record = each.get_help_record(ctx)
            if isinstance(each, click.Option) and record is not None:
                if isinstance(each, GroupedOption):
                    groups.setdefault(each.title, []).append(record)
                else:
                    others.append(record)
        for title, records in (*groups.items(), ("Other", others)):
            with formatter.section(title):
                formatter.write_dl(records, col_max=26)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the example."""
        write_example(self.example, formatter)


def write_example(example: str, formatter: click.HelpFormatter) -> None:
    """The end of a `--help`; nothing for "". Not wrapped: it is to be copied."""
    if example:
        with formatter.section("Example"):
            formatter.write(f"{'':{formatter.current_indent}}{example}\n")


class GroupedOption(click.Option):
    """An option that `--help` lists under `title`."""

    def __init__(self, *args: Any, title: str, **extra: Any) -> None:
        super().__init__(*args, **extra)
        self.title = title


def options_of(settings: type[S]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorates a command's function; click passes it the values by the names of the settings."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        for each in reversed(list(declared(settings))):
            command = _option(each)(command)
        return command

    return decorate


def _option(each: Declared) -> Callable[[Callable[..., None]], Callable[..., None]]:
    setting = each.setting
    is_many = isinstance(setting.kind, Ranges)
    default = each.default if setting.written_default is None else setting.written_default
    return click.option(
        setting.option,
        cls=GroupedOption,
        title=each.title,
        type=type_of(setting.kind),
        is_flag=isinstance(setting.kind, Flag),
        multiple=is_many,
        default=None if is_many else default,
        show_default=bool(default) or isinstance(setting.kind, Number),
        help=setting.help,
    )


def type_of(kind: Kind) -> click.ParamType[Any] | None:
    """The click type that parses a setting of this kind."""
    match kind:
        case Flag():
            return None
        case Number(minimum, maximum):
            return FiniteNumber(minimum, maximum)
        case Whole(minimum, maximum, power_of_two):
            whole = PowerOfTwo if power_of_two else click.IntRange
            return whole(minimum, maximum)
        case Size(minimum_text):
            return SizeText(minimum_text)
        case Choice(words):
            return click.Choice(words)
        case Text(max_bytes):
            return Utf8(max_bytes)
        case Path():
            return FilePath()
        case Mode():
            return PermissionBits()
        case Ranges():
            return RangeText()
        case FeatureBits():
            return WithheldFeatures()


class FiniteNumber(click.FloatRange):
    """A number of seconds or the like. Not `nan`: it passes every comparison of a range, and is
    neither before nor after any deadline."""

    name = "number"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        number: float = super().convert(value, param, ctx)
        if not isfinite(number):
            self.fail(f"{value!r} is not a finite number", param, ctx)
        return number


class PowerOfTwo(click.IntRange):
    """A whole number in a range, and a power of two."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        number: int = super().convert(value, param, ctx)
        if number & (number - 1):
            self.fail("must be a power of two", param, ctx)
        return number


class SizeText(click.ParamType):  # type: ignore[type-arg]
    """The number of bytes of a size such as 512M; at least `minimum`, which is such a text, too."""

    name = "size"

    def __init__(self, minimum: str = "0") -> None:
        self._minimum = minimum

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        try:
            size = parse_size(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)
        if size < parse_size(self._minimum):
            self.fail(f"{value!r} is below the minimum of {self._minimum}", param, ctx)
        return size


class RangeText(click.ParamType):  # type: ignore[type-arg]
    """(offset, length) in bytes of `OFFSET:LENGTH`; either may be a size such as 10M."""

    name = "offset:length"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, int]:
        offset, separator, length = value.partition(":")
        if not separator:
            self.fail(f"{value!r}: write OFFSET:LENGTH", param, ctx)
        try:
            found = parse_size(offset), parse_size(length)
        except ValueError as error:
            self.fail(f"{value!r}: {error}", param, ctx)
        if not found[1]:
            self.fail(f"{value!r}: the length is 0, write at least 1", param, ctx)
        return found


class Utf8(click.ParamType):  # type: ignore[type-arg]
    """UTF-8 text. (Python puts surrogates in place of an argument's other bytes.)"""

    name = "text"

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        try:
            encoded = value.encode()
        except UnicodeEncodeError:
            self.fail(f"{value!r} is not UTF-8", param, ctx)
        if len(encoded) > self._max_bytes:
            self.fail(f"{value!r} is longer than {self._max_bytes} bytes", param, ctx)
        return str(value)


class FilePath(click.Path):
    """A path. Not the empty one, which would be the working directory by mistake."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not value:
            self.fail("the path is empty", param, ctx)
        return super().convert(value, param, ctx)


class PermissionBits(click.ParamType):  # type: ignore[type-arg]
    """The permission bits of a file, in octal. The owner has to keep its own."""

    name = "mode"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        text = str(value).lower().removeprefix("0o")
        if not re.fullmatch("[0-7]{3,4}", text) or int(text, 8) > 0o777:
            self.fail(f"{value!r}: write it in octal, such as 0660", param, ctx)
        if int(text, 8) & 0o600 != 0o600:
            self.fail(f"{value!r} is not even for the owner: write 0600 at least", param, ctx)
        return int(text, 8)


class WithheldFeatures(click.ParamType):  # type: ignore[type-arg]
    """The bits of `-NAME,-NAME`, where each NAME is a feature of virtio-blk."""

    name = "-name,…"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        bits = 0
        for word in filter(None, value.split(",")):
            name = word.strip().removeprefix("-").lower()
            if not word.strip().startswith("-") or name not in FEATURE_BITS:
                known = ", ".join(sorted(FEATURE_BITS))
                self.fail(f"{word!r}: write -NAME with NAME of {known}", param, ctx)
            bits |= FEATURE_BITS[name]
        return bits
