"""Settings from environment variables: checked, with errors of one line."""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Callable, Sequence

_SIZE = re.compile(r"[0-9]{1,19}[bkmgtpe]?(i?b)?", re.IGNORECASE)
_AGAIN_S = 1.0
_NUMBER = re.compile(r"[0-9]{1,10}(\.[0-9]{1,6})?")


class SettingError(Exception):
    """A setting, or something around the container, is wrong; the text is one line."""


def text(name: str, default: str | None = None, *, pattern: str = r"[ -~]*", hint: str = "") -> str:
    """The variable `name`; unset or empty means `default`. Raises SettingError.

    Without a default the variable must be set. The whole value must match `pattern`; `hint` says
    the same in words.
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


def integer(name: str, default: int) -> int:
    """A whole number that is not 0. Raises SettingError."""
    return int(text(name, str(default), pattern="[1-9][0-9]{0,8}", hint="a whole number above 0"))


def run(program: str, start: Callable[[], None]) -> None:
    """Call `start` until it raises no SettingError; what it complains of is said once.

    The container stays, and its health says that something is wrong. What waiting can mend (a
    volume's owner, a certificate that is not there yet) mends itself; a variable is mended by
    `up`, which makes a new container.
    """
    said = ""
    while True:
        try:
            start()
        except SettingError as error:
            if str(error) != said:
                said = str(error)
                print(f"{program}: {said}", file=sys.stderr, flush=True)
            time.sleep(_AGAIN_S)
        else:
            return
