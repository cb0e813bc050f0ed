"""The types of the command line's options: what each accepts, and what it says otherwise."""

from __future__ import annotations

import os
from functools import partial
from math import isfinite
from typing import Any

import click

from bridge.units import parse_size


class Option(click.Option):
    """An option whose environment variable is named as the operator writes the option.

    click names it after the parameter of ours, which has a unit at its end.
    """

    def resolve_envvar_value(self, ctx: click.Context) -> str | None:
        found = super().resolve_envvar_value(ctx)
        if found is None and ctx.auto_envvar_prefix is not None:
            name = self.opts[0].lstrip("-").replace("-", "_").upper()
            found = os.environ.get(f"{ctx.auto_envvar_prefix}_{name}") or None
        return found


option = partial(click.option, cls=Option)


class Finite(click.FloatRange):
    """A number of seconds or the like. `nan` passes every comparison of a range, and is neither
    before nor after any deadline."""

    name = "number"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        number: float = super().convert(value, param, ctx)
        if not isfinite(number):
            self.fail(f"{value!r} is not a finite number", param, ctx)
        return number


class Size(click.ParamType):  # type: ignore[type-arg]
    """Bytes of a size such as 512M, at least `minimum`, which is such a text as well."""

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


class Range(click.ParamType):  # type: ignore[type-arg]
    """(offset, length) in bytes of `OFFSET:LENGTH`; either may be a size such as 10M."""

    name = "range"

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
    """Text; an argument of other bytes has surrogates in their place."""

    name = "text"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        try:
            value.encode()
        except UnicodeEncodeError:
            self.fail(f"{value!r} is not UTF-8", param, ctx)
        return str(value)


class FilePath(click.Path):
    """A path; the empty one would be the working directory, which nobody means."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not value:
            self.fail("the path is empty", param, ctx)
        return super().convert(value, param, ctx)
