"""Why a server does not give what was asked for: the error that a refusal is, in words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from bridge.errors import (
    BridgeError,
    ConfigError,
    ConnectionLost,
    ExportUnknown,
    ProtocolError,
    Remedy,
    TlsWanted,
)
from bridge.server.handshake_options import ExportListEntry, Goal, HandshakeOptions
from bridge.server.untrusted import printable
from bridge.server.volume_words import VolumeDescription
from bridge.spec import nbd as p

_SHOWN_MAX: Final = 10
"""Exports that a message names."""


def not_nbd(greeting: bytes) -> ProtocolError:
    """The peer speaks another protocol; `greeting`: what it said first."""
    return ProtocolError(f"this is not an NBD server: it said {printable(greeting[:16])!r}")


def reason_of(final: int, text: str) -> str:
    """An error reply in words: its type (NBD "Option reply types"), and the server's `text`."""
    name = p.REPLY_ERROR_NAMES.get(final, f"error {final & ~p.REP_ERROR_BIT}")
    return f"{name}: {text}" if text else name


def refusal_of(wishes: HandshakeOptions, final: int, text: str) -> BridgeError:
    """The error that an error reply to the option of this goal is."""
    reason = reason_of(final, text)
    if final == p.REP_ERR_TLS_REQD:
        return TlsWanted("the server requires TLS: use the scheme nbds:// or nbds+unix://")
    if final == p.REP_ERR_SHUTDOWN:
        return ConnectionLost(f"the server is shutting down ({reason})")
    if wishes.goal is Goal.LIST:
        return ConfigError(f"the server does not list its exports: {reason}")
    kind = ExportUnknown if final == p.REP_ERR_UNKNOWN else ConfigError
    return kind(f"the server refused {shown_name(wishes)}: {reason}")


def explained(
    plain: ConfigError, wishes: HandshakeOptions, exports: Sequence[ExportListEntry]
) -> ConfigError:
    """The refusal `plain` of an export, with what the server's list adds to it."""
    names = list(dict.fromkeys(each.name for each in exports))
    if not names:
        return plain
    volume = _typed_name(wishes).partition("@")[0]
    if not volume and len(names) == 1:
        volume = names[0]
    for each in exports:
        if each.name == volume and (reason := VolumeDescription(each.description).why_refused):
            return ConfigError(f"the server refused {shown_name(wishes)}: {reason}")
    if volume in names:
        return ConfigError(f"{plain} (it is in the server's list: is it in use?)")
    shown = ", ".join(repr(name) if name else "the default one" for name in names[:_SHOWN_MAX])
    more = f" and {len(names) - _SHOWN_MAX} more" if len(names) > _SHOWN_MAX else ""
    return type(plain)(f"{plain}; there is {shown}{more}", remedy=Remedy.LIST_EXPORTS)


def shown_name(wishes: HandshakeOptions) -> str:
    """The export, as a message names it."""
    name = _typed_name(wishes)
    return f"the export {name!r}" if name else "its default export"


def _typed_name(wishes: HandshakeOptions) -> str:
    return wishes.export_name if wishes.typed_name is None else wishes.typed_name
