"""Settings from environment variables: checked, with errors of one line."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Sequence

_SIZE = re.compile(r"[0-9]{1,19}[bkmgtpe]?(i?b)?", re.IGNORECASE)
_NUMBER = re.compile(r"[0-9]{1,10}(\.[0-9]{1,6})?")


class SettingError(Exception):
    """A setting, or something around the container, is wrong; the text is one line."""


def text(name: str, default: str | None = None, *, pattern: str = r"[ -~]*", hint: str = "") -> str:
    """The variable `name`; unset or empty means `default`. Raises SettingError.

    Without a default the variable must be set. `pattern` is what the whole value must match,
    `hint` says so in words.
    """
    value = os.environ.get(name, "") or default
    if value is None:
        raise SettingError(f"{name} is not set{': ' + hint if hint else ''}")
    if re.fullmatch(pattern, value) is None:
        raise SettingError(f"{name}={value[:100]!r} is not allowed: {hint or 'plain text only'}")
    return value


def choice(name: str, default: str, choices: Sequence[str]) -> str:
    """One of `choices`. Raises SettingError."""
    value = text(name, default)
    if value not in choices:
        raise SettingError(f"{name}={value[:100]!r} is not one of {', '.join(choices)}")
    return value


def switch(name: str, default: str) -> bool:
    """`on` or `off`. Raises SettingError."""
    return choice(name, default, ("on", "off")) == "on"


def size(name: str, default: str) -> str:
    """A size such as 10G. Raises SettingError."""
    return text(name, default, pattern=f"(?i:{_SIZE.pattern})", hint="a size such as 10G or 512M")


def number(name: str, default: str) -> str:
    """A number that is not negative. Raises SettingError."""
    return text(name, default, pattern=_NUMBER.pattern, hint="a number such as 60 or 0.5")


def run(program: str, start: Callable[[], None]) -> None:
    """Run `start`; a SettingError becomes one line on standard error and exit status 2."""
    try:
        start()
    except SettingError as error:
        print(f"{program}: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
