"""NBD URIs: what to connect to.

Source: NetworkBlockDevice/nbd, doc/uri.md.
"""

from __future__ import annotations

import ipaddress
import os
import re
import socket as sockets
from contextlib import suppress
from dataclasses import dataclass
from urllib.parse import quote, unquote, urlsplit

from bridge.errors import ConfigError, Remedy
from bridge.host import UNIX_PATH_MAX_BYTES
from bridge.spec.nbd import DEFAULT_PORT, NAME_MAX_BYTES

_SCHEMES = {
    "nbd": (False, False),
    "nbds": (True, False),
    "nbd+unix": (False, True),
    "nbds+unix": (True, True),
}
"""Scheme → (TLS, unix socket)."""

_PARAMETERS = {"socket", "tls-certificates", "tls-hostname", "tls-psk-file", "tls-verify-peer"}
_HOST_MAX_BYTES = 253
_LABEL = re.compile(r"[A-Za-z0-9_-]{1,63}")
_BAD_CHARACTER = re.compile(r"^ | $|[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_BAD_PERCENT = re.compile(r"%(?![0-9A-Fa-f]{2})")


@dataclass(frozen=True, slots=True)
class NbdUri:
    """Where an export is. Exactly one of `host` and `socket_path` is set."""

    text: str
    export_name: str = ""
    tls: bool = False
    host: str | None = None
    port: int = DEFAULT_PORT
    socket_path: str | None = None
    tls_certificates: str | None = None
    """Directory with ca-cert.pem, and client-cert.pem and client-key.pem where needed."""
    tls_hostname: str | None = None
    """The name that the server's certificate must have, if not `host`."""
    tls_psk_file: str | None = None
    tls_verify_peer: bool = True

    @property
    def server(self) -> str:
        """The server's address, for messages."""
        if self.socket_path is not None:
            return self.socket_path
        return (
            f"[{self.host}]:{self.port}" if ":" in (self.host or "") else f"{self.host}:{self.port}"
        )


def parse_uri(text: str) -> NbdUri:
    """Take an NBD URI apart.

    Raises ConfigError with one line that names what is wrong and what would be right.
    """
    _check_characters(text)
    try:
        parts = urlsplit(text)
        _refuse_user(parts.netloc, text)
        port = parts.port
    except ValueError as error:
        raise ConfigError(f"{text}: not a URI: {error}") from None
    _check_scheme(text, parts.scheme)
    tls, unix = _SCHEMES[parts.scheme]
    if parts.fragment:
        raise ConfigError(f"{text}: a '#' has no meaning in an NBD URI; write it as %23")
    query = _query(text, parts.query)
    export_name = _export_name(text, parts.path)
    host, socket_path = _address(text, parts.hostname, port, query.get("socket"), unix=unix)
    tls_parameters = sorted(name for name in query if name.startswith("tls-"))
    if tls_parameters and not tls:
        raise ConfigError(
            f"{text}: {tls_parameters[0]} needs TLS: use the scheme nbds:// or nbds+unix://"
        )
    return NbdUri(
        text=text,
        export_name=export_name,
        tls=tls,
        host=host,
        port=port if port is not None else DEFAULT_PORT,
        socket_path=socket_path,
        tls_certificates=query.get("tls-certificates"),
        tls_hostname=_tls_hostname(text, query.get("tls-hostname")),
        tls_psk_file=query.get("tls-psk-file"),
        tls_verify_peer=_boolean(text, "tls-verify-peer", query.get("tls-verify-peer", "true")),
    )


def _check_characters(text: str) -> None:
    try:
        text.encode()  # An argument of other bytes has surrogates in their place.
    except UnicodeEncodeError:
        raise ConfigError(f"{text!r}: not UTF-8; write other bytes as %XX") from None
    if bad := _BAD_CHARACTER.search(text):
        # Python would leave it out: another host, another name.
        raise ConfigError(
            f"not a URI: it has a {bad[0]!r} at character {bad.start() + 1}: leave that out, or "
            "write it as %XX"
        )


def _check_scheme(text: str, scheme: str) -> None:
    if scheme not in _SCHEMES:
        known = ", ".join(f"{scheme}://" for scheme in _SCHEMES)
        raise ConfigError(f"{text}: not an NBD URI: it must start with one of {known}")
    if not text[len(scheme) :].startswith("://"):
        raise ConfigError(f"{text}: not an NBD URI: write {_right_spelling(text, scheme)}")


def _address(
    text: str, hostname: str | None, port: int | None, socket: str | None, *, unix: bool
) -> tuple[str | None, str | None]:
    if not unix:
        if socket is not None:
            raise ConfigError(f"{text}: socket= needs the scheme nbd+unix:// or nbds+unix://")
        if port == 0:
            raise ConfigError(f"{text}: port 0 cannot be connected to")
        return _host(text, hostname) if hostname else "localhost", None
    if hostname or port is not None:
        raise ConfigError(
            f"{text}: a unix socket has no host: write nbd+unix:///EXPORT?socket=PATH"
        )
    if not socket:
        raise ConfigError(f"{text}: which socket? write nbd+unix:///EXPORT?socket=PATH")
    socket = _absolute(text, socket)
    if len(socket.encode()) > UNIX_PATH_MAX_BYTES:
        raise ConfigError(
            f"{text}: the socket's path is longer than the {UNIX_PATH_MAX_BYTES} bytes "
            "that the system takes"
        )
    return None, socket


def _refuse_user(netloc: str, text: str) -> None:
    """An operator who writes one expects it to be used. It goes into no message and no log."""
    user, at, _ = netloc.rpartition("@")
    if at:
        raise ConfigError(
            f"{text.replace(user + at, '', 1)}: a user or password stood before the host, and NBD "
            "has neither: leave it out",
            remedy=Remedy.CERTIFICATE_INSTEAD,
        )


def _right_spelling(text: str, scheme: str) -> str:
    """For what lacks the slashes, QEMU's older notation above all: `nbd:host:port:exportname=x`."""
    rest, _, export = text[len(scheme) + 1 :].partition(":exportname=")
    path = quote(export, safe="")
    if rest.startswith("unix:"):
        return f"nbd+unix:///{path}?socket={quote(rest.removeprefix('unix:'))}"
    if _SCHEMES[scheme][1]:
        return f"{scheme}:///{rest.lstrip('/')}"
    if rest.startswith("/"):
        name = quote(rest.lstrip("/"))
        return f"{scheme}://HOST/{name}, or nbd+unix:///EXPORT?socket=PATH"
    return f"{scheme}://{rest or 'HOST'}" + (f"/{path}" if path else "")


def _tls_hostname(text: str, name: str | None) -> str | None:
    return None if name is None else _checked_host(text, name)


def _host(text: str, hostname: str) -> str:
    return _checked_host(text, _unquoted(text, "the host", hostname))


def _checked_host(text: str, host: str) -> str:
    """A name or an address that the resolver and TLS take. Raises ConfigError."""
    if ":" in host:
        try:
            ipaddress.IPv6Address(host)
        except ValueError:
            raise ConfigError(f"{text}: {host!r} is not an IPv6 address") from None
        return host
    if not host.isascii():
        raise ConfigError(
            f"{text}: the host {host!r} is not ASCII: write the form of it that starts with xn--"
        )
    labels = host.removesuffix(".").split(".")
    if len(host) > _HOST_MAX_BYTES or not all(map(_LABEL.fullmatch, labels)):
        raise ConfigError(
            f"{text}: {host[:80]!r} cannot be the name of a host: it has parts of 1 to 63 letters, "
            f"digits and '-' between its dots, {_HOST_MAX_BYTES} characters in all"
        )
    return host


def _unquoted(text: str, what: str, quoted: str) -> str:
    """RFC 3986: %XX is a byte, and a plus sign is a plus sign."""
    if _BAD_PERCENT.search(quoted):
        raise ConfigError(f"{text}: a '%' in {what} without two digits: write it as %25")
    try:
        return unquote(quoted, errors="strict")
    except UnicodeDecodeError:
        raise ConfigError(f"{text}: {what} is not UTF-8") from None


def _absolute(text: str, socket: str) -> str:
    """The path of a socket, whatever the working directory will be: a cache belongs to it."""
    if os.path.isabs(socket):
        return socket
    try:
        # Not abspath: `..` after a symbolic link is not where the spelling says.
        directory, name = os.path.split(socket)
        return os.path.join(os.path.realpath(directory), name)
    except OSError as error:
        raise ConfigError(
            f"{text}: the socket's path is relative, and there is no working directory "
            f"({error.strerror}): write an absolute path"
        ) from None


def _export_name(text: str, path: str) -> str:
    name = _unquoted(text, "the export's name", path.removeprefix("/"))
    if "\0" in name:
        raise ConfigError(f"{text}: the export's name has a NUL in it")
    if len(name.encode()) > NAME_MAX_BYTES:
        raise ConfigError(f"{text}: the export's name is longer than {NAME_MAX_BYTES} bytes")
    return name


def _query(text: str, query: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for pair in query.split("&") if query else []:
        name, equals, value = pair.partition("=")
        if not equals:
            raise ConfigError(f"{text}: {pair!r} is not a parameter: write NAME=VALUE")
        if name not in _PARAMETERS:
            raise ConfigError(
                f"{text}: unknown parameter {name}; known are {', '.join(sorted(_PARAMETERS))}"
            )
        if name in found:
            raise ConfigError(f"{text}: {name} is given twice")
        value = _unquoted(text, name, value)
        if "\0" in value:
            raise ConfigError(f"{text}: {name} has a NUL in it")
        found[name] = value
    return found


def _boolean(text: str, name: str, value: str) -> bool:
    if value.lower() in ("1", "true", "yes", "on"):
        return True
    if value.lower() in ("0", "false", "no", "off"):
        return False
    raise ConfigError(f"{text}: {name} must be true or false, not {value!r}")


_LOOPBACK = {
    "localhost",
    "localhost.localdomain",
    "ip6-localhost",
    "127.0.0.1",
    "::1",
    "0.0.0.0",
    "::",
}
_OLD_IPV4 = re.compile(r"[0-9a-fx]+(\.[0-9a-fx]+){0,3}")
"""An IPv4 address as the resolver takes it as well: 127.1, 0x7f000001."""


def canonical_server(server: str) -> str:
    """One spelling for all that `NbdUri.server` may have for one server, as far as the text, or
    the file system for a socket, tells."""
    if server.startswith("/"):
        return os.path.realpath(server)
    host, _, port = server.rpartition(":")
    host = host.removeprefix("[").removesuffix("]").lower().rstrip(".")
    if _OLD_IPV4.fullmatch(host):
        with suppress(OSError):  # It may only look like an address.
            host = sockets.inet_ntoa(sockets.inet_aton(host))
    address, percent, zone = host.partition("%")
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        pass
    else:
        parsed = getattr(parsed, "ipv4_mapped", None) or parsed
        host = f"{parsed}{percent}{zone}"
    if host in _LOOPBACK:
        host = "localhost"
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
