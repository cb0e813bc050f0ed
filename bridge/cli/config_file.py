"""A configuration file of `serve`: TOML, one `key = value` per option, and `uri`.

Its keys are the names of the options without the dashes in front, from the same declaration
(`bridge.app.settings`). What is wrong in a file is said with its line, and what is allowed there.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Final

import click

from bridge.app import settings_model as model
from bridge.app.settings import ServeSettings
from bridge.cli.options import type_of

DIRECTORY: Final = Path("/etc/nbd-bridge")
SUFFIX: Final = ".toml"
URI: Final = "uri"
"""The one key that is not an option's: it is the argument of `serve`."""

_MAX_BYTES: Final = 1 << 20
_MAX_FAULTS: Final = 100
"""That are named: a file that has more is no configuration file."""
_MAX_NUMBER_BITS: Final = 64
"""Python writes no number of more than some thousand digits."""
_NEAR_LINES: Final = 32
"""Lines of one value that are tried one by one as its last one."""

_KEY = re.compile(
    r"""[ \t]*(?:\[\[?[ \t]*)?("(?:[^"\\]|\\.)*"|'[^']*'|[A-Za-z0-9_-]+)[ \t]*[=.\]]"""
)
"""The beginning of a line that may be of a key, or a section."""

_TYPES: dict[type, tuple[tuple[type, ...], str]] = {
    model.Flag: ((bool,), "true or false"),
    model.Number: ((int, float), "a number"),
    model.Whole: ((int,), "a whole number"),
    model.Size: ((int, str), 'a number of bytes, or a size in quotes such as "20G"'),
}
"""Kind of a setting → the types that TOML gives for it, and what to write. Others: text."""
_TEXT: tuple[tuple[type, ...], str] = ((str,), 'text in quotes, such as "…"')


class ConfigFileError(click.ClickException):
    """A file that cannot be used; `faults` has one line for each fault, with its place."""

    exit_code = 2

    def __init__(self, path: Path, faults: list[str]) -> None:
        self.faults = faults
        more = len(faults) - 1
        hint = f" (and {more} more: nbd-bridge config check {path})" if more else ""
        super().__init__(faults[0] + hint)


def find(text: str) -> Path:
    """The file that `--config TEXT` means: a path, or NAME in the system's directory."""
    if "/" in text or text.endswith(SUFFIX):
        return Path(text)
    return DIRECTORY / f"{text}{SUFFIX}"


def all_files() -> list[Path]:
    """The configuration files of the system's directory, by name."""
    return sorted(DIRECTORY.glob(f"*{SUFFIX}"))


def read(path: Path) -> dict[str, Any]:
    """What the file sets, by the names of the settings (`Setting.name`), and `uri`; as click's
    `default_map`. Raises ConfigFileError."""
    import tomllib  # With a file only: it costs time and memory.

    text = _text_of(path)
    try:
        found = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigFileError(path, [f"{path}: not TOML: {_printable(str(error))}"]) from None
    except RecursionError:
        raise ConfigFileError(path, [f"{path}: not TOML: nested too deeply"]) from None
    except ValueError:
        # Not of the parser: of Python, which it leaves numbers to.
        raise ConfigFileError(path, [f"{path}: not TOML: a number with too many digits"]) from None
    settings = {
        each.setting.option.removeprefix("--"): each.setting
        for each in model.declared(ServeSettings)
    }
    faults = _all_faults(path, text, found, settings)
    if faults:
        raise ConfigFileError(path, faults)
    return {
        key if key == URI else settings[key].name: value if isinstance(value, bool) else str(value)
        for key, value in found.items()
    }


def _text_of(path: Path) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_BYTES + 1)
    except FileNotFoundError:
        raise ConfigFileError(path, [f"there is no configuration file {path}"]) from None
    except OSError as error:
        raise ConfigFileError(
            path, [f"configuration file {path}: {os.strerror(error.errno or 0)}"]
        ) from None
    if len(data) > _MAX_BYTES:
        raise ConfigFileError(path, [f"{path}: a configuration file has at most 1 MiB"])
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigFileError(path, [f"{path}, line {line}: not UTF-8"]) from None


def _all_faults(
    path: Path, text: str, found: dict[str, Any], settings: dict[str, model.Setting]
) -> list[str]:
    """What is wrong, with the place."""
    each = ((key, fault) for key, value in found.items() for fault in _faults(key, value, settings))
    first = list(islice(each, _MAX_FAULTS))
    lines = _Lines(text) if first else None
    faults = [f"{path}, line {lines.of(key)}: {fault}" for key, fault in first if lines]
    if next(each, None):
        faults.append(f"{path}: and more like these")
    return faults


def _faults(key: str, value: Any, settings: dict[str, model.Setting]) -> Iterator[str]:
    """What is wrong with one line, if anything is."""
    shown = _printable(key)
    if isinstance(value, dict | list):
        yield f"'{shown}': write lines 'option = value' alone, no sections and no lists"
        return
    if key != URI and key not in settings:
        yield f"there is no option '{shown}'{_meant(key, [URI, *settings])}"
        return
    kind = model.Text(max_bytes=1 << 16) if key == URI else settings[key].kind
    allowed, wanted = _TYPES.get(type(kind), _TEXT)
    if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed):
        yield f"{key}: write {wanted}"
        return
    if isinstance(value, int) and value.bit_length() > _MAX_NUMBER_BITS:
        yield f"{key}: the number is too large"
        return
    convert = type_of(kind)
    try:
        if convert is not None:
            convert.convert(str(value), None, None)
    except click.BadParameter as error:
        yield f"{key}: {_printable(' '.join(error.message.split()).rstrip('.'))}"


def _printable(text: str) -> str:
    return "".join(each if each.isprintable() else repr(each)[1:-1] for each in text)


def _meant(key: str, names: list[str]) -> str:
    """`; did you mean …?`, or where all names are."""
    from difflib import get_close_matches

    near = get_close_matches(key.replace("_", "-").lower(), names, n=1)
    if near:
        return f"; did you mean '{near[0]}'?"
    return "; options are those of 'nbd-bridge serve --help', without the dashes in front"


class _Lines:
    """On which line a key stands: the parser does not tell."""

    def __init__(self, text: str) -> None:
        self._lines = text.split("\n")
        self._first: dict[str, int] = {}
        """Key → where its line begins to count, from 0. A key of a section comes after all those
        that stand alone, and text that looks like one within a value may come before."""
        for number, line in enumerate(self._lines):
            if (match := _KEY.match(line)) and (key := _unquoted(match[1])) is not None:
                self._first.setdefault(key, number)

    def of(self, key: str) -> int:
        """The number of the line, from 1; of a value of several lines that of the last, roughly if
        it has very many."""
        import tomllib

        first = self._first.get(key, 0)
        for end in _ends(first, len(self._lines)):
            try:
                if key in tomllib.loads("\n".join(self._lines[first:end])):
                    return end
            except (ValueError, RecursionError):
                continue  # amid a value of several lines
        return first + 1


def _ends(first: int, last: int) -> Iterable[int]:
    """Where a value that begins at `first` may end: few enough to try them all."""
    step = 1
    end = first + 1
    while end < last:
        yield end
        if end - first >= _NEAR_LINES:
            step *= 2
        end += step
    yield last


def _unquoted(key: str) -> str | None:
    """The key that is written so, None if that is none."""
    import tomllib

    try:
        return next(iter(tomllib.loads(f"{key}=0")))
    except tomllib.TOMLDecodeError:
        return None
