"""The body of a request: declared once, checked here, described in the OpenAPI document."""

from __future__ import annotations

import json
from dataclasses import dataclass
from http import HTTPStatus
from math import inf, isfinite
from typing import Any

from bridge.api.http import HttpError


@dataclass(frozen=True)
class Field:
    """One member of a JSON object."""

    type: type[int] | type[float] | type[bool] | type[str]
    help: str
    default: Any = None
    """None: it is left out."""
    minimum: float = 0
    maximum: float = inf
    choices: tuple[str, ...] = ()

    def check(self, name: str, value: Any) -> Any:
        """`value` as this type. Raises HttpError 400."""
        number = isinstance(value, int) and not isinstance(value, bool)
        if self.type is float and (number or isinstance(value, float)):
            value = float(value) if abs(value) < 1 << 64 else inf
        elif type(value) is not self.type:
            raise _bad(f"{name}: {json.dumps(value)[:80]} is no {_JSON_TYPES[self.type]}")
        if self.choices and value not in self.choices:
            raise _bad(f"{name}: {value[:80]!r} is none of {', '.join(self.choices)}")
        if self.type in (int, float) and not (
            # A whole number may be larger than any that `isfinite` takes.
            (self.type is int or isfinite(value)) and self.minimum <= value <= self.maximum
        ):
            most = "" if self.maximum == inf else f" to {self.maximum:g}"
            shown = f"{value:g}" if abs(value) < 1 << 64 else "the number"
            raise _bad(f"{name}: {shown} is out of range: {self.minimum:g}{most}")
        return value

    @property
    def schema(self) -> dict[str, Any]:
        """For OpenAPI."""
        schema: dict[str, Any] = {"type": _JSON_TYPES[self.type], "description": self.help}
        if self.default is not None:
            schema["default"] = self.default
        if self.choices:
            schema["enum"] = list(self.choices)
        if self.type in (int, float):
            schema["minimum"] = self.minimum
            if self.maximum != inf:
                schema["maximum"] = self.maximum
        return schema


_JSON_TYPES: dict[type, str] = {int: "integer", float: "number", bool: "boolean", str: "string"}

Fields = dict[str, Field]


def parse(fields: Fields, body: bytes) -> dict[str, Any]:
    """The members of `body`, with defaults for those that are left out. Raises HttpError 400."""
    value: Any = {}
    if body.strip():
        try:
            value = json.loads(body, parse_constant=_no_number)
        except (ValueError, RecursionError) as error:
            raise _bad(f"the body is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise _bad("the body is not a JSON object")
    if unknown := sorted(value.keys() - fields.keys()):
        known = ", ".join(fields) or "none"
        raise _bad(f"{', '.join(unknown)[:80]}: unknown; there is {known}")
    found = {name: each.default for name, each in fields.items()}
    for name, member in value.items():
        found[name] = fields[name].check(name, member)
    return found


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is not a number")


def _bad(text: str) -> HttpError:
    return HttpError(HTTPStatus.BAD_REQUEST, text)
