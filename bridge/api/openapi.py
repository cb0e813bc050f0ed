"""The description of the API, made from the routes and from the types of what they answer."""

from __future__ import annotations

import types
from collections.abc import Iterable
from dataclasses import fields, is_dataclass
from http import HTTPStatus
from typing import Any, Protocol, get_args, get_origin, get_type_hints

from bridge import __version__
from bridge.api.fields import Fields

_ERROR = {"type": "object", "properties": {"error": {"type": "string"}}, "required": ["error"]}


class Described(Protocol):
    """What this needs of a route."""

    @property
    def method(self) -> str: ...
    @property
    def path(self) -> str: ...
    @property
    def summary(self) -> str: ...
    @property
    def fields(self) -> Fields: ...
    @property
    def answer(self) -> Any: ...
    @property
    def errors(self) -> tuple[HTTPStatus, ...]: ...


def document(routes: Iterable[Described]) -> dict[str, Any]:
    """OpenAPI 3.1."""
    schemas: dict[str, Any] = {"Error": _ERROR}
    paths: dict[str, Any] = {}
    for route in routes:
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(route, schemas)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "nbd-bridge",
            "version": __version__,
            "description": "One served disk. Spoken on a unix socket, to its user and to root.",
        },
        "paths": paths,
        "components": {"schemas": schemas},
    }


def _operation(route: Described, schemas: dict[str, Any]) -> dict[str, Any]:
    operation: dict[str, Any] = {
        "summary": route.summary,
        "operationId": f"{route.method.lower()}{route.path.replace('/', '_').replace('.', '_')}",
        "responses": {
            "200": {"description": "Done.", "content": _content(route.answer, schemas)},
            **{
                str(int(status)): {
                    "description": status.phrase,
                    "content": {
                        "application/json": {"schema": {"$ref": "#/components/schemas/Error"}}
                    },
                }
                for status in route.errors
            },
        },
    }
    if route.fields:
        properties = {name: each.schema for name, each in route.fields.items()}
        operation["requestBody"] = {
            "content": {
                "application/json": {
                    "schema": {
                        "type": "object",
                        "properties": properties,
                        "additionalProperties": False,
                    }
                }
            }
        }
    return operation


def _content(answer: Any, schemas: dict[str, Any]) -> dict[str, Any]:
    if answer is bytes:
        return {"text/html": {"schema": {"type": "string"}}}
    if answer is str:
        return {"text/plain": {"schema": {"type": "string"}}}
    return {"application/json": {"schema": _schema(answer, schemas)}}


def _schema(type_: Any, schemas: dict[str, Any]) -> dict[str, Any]:
    """The JSON schema of what `json.dumps(asdict(…))` makes of `type_`."""
    if is_dataclass(type_):
        name = getattr(type_, "__name__", "")
        if name not in schemas:
            schemas[name] = {}
            hints = get_type_hints(type_)
            schemas[name] = {
                "type": "object",
                "properties": {
                    each.name: _schema(hints[each.name], schemas) for each in fields(type_)
                },
                "required": [each.name for each in fields(type_)],
            }
        return {"$ref": f"#/components/schemas/{name}"}
    origin, arguments = get_origin(type_), get_args(type_)
    if origin is types.UnionType:
        return {"anyOf": [_schema(each, schemas) for each in arguments]}
    if origin is dict:
        return {"type": "object", "additionalProperties": _schema(arguments[1], schemas)}
    if origin is tuple:
        return {"type": "array", "items": _schema(arguments[0], schemas)}
    names = {int: "integer", float: "number", bool: "boolean", str: "string"}
    return {"type": names.get(type_, "null" if type_ is types.NoneType else "object")}
