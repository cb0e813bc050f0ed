"""NBD URIs (NetworkBlockDevice/nbd, doc/uri.md): what to connect to."""

from __future__ import annotations

import ipaddress
import os
import re
import socket as sockets
from contextlib import suppress
from dataclasses import dataclass
from urllib.parse import parse_qsl, unquote, urlsplit

from bridge.errors import ConfigError
from bridge.nbd.protocol import DEFAULT_PORT, NAME_MAX_BYTES

_SCHEMES = {
    "nbd": (False, False),
    "nbds": (True, False),
    "nbd+unix": (False, True),
    "nbds+unix": (True, True),
}
"""Scheme → (TLS, unix socket)."""

_PARAMETERS = {"socket", "tls-certificates", "tls-hostname", "tls-psk-file", "tls-verify-peer"}
_UNIX_PATH_MAX_BYTES = 107


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
    try:
        text.encode()  # An argument of other bytes has surrogates in their place.
    except UnicodeEncodeError:
        raise ConfigError(f"{text!r}: not UTF-8; write other bytes as %XX") from None
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError as error:
        raise ConfigError(f"{text}: not a URI: {error}") from None
    if parts.scheme not in _SCHEMES:
        known = ", ".join(f"{scheme}://" for scheme in _SCHEMES)
        raise ConfigError(f"{text}: not an NBD URI: it must start with one of {known}")
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
        tls_hostname=query.get("tls-hostname"),
        tls_psk_file=query.get("tls-psk-file"),
        tls_verify_peer=_boolean(text, "tls-verify-peer", query.get("tls-verify-peer", "true")),
    )


def _address(
    text: str, hostname: str | None, port: int | None, socket: str | None, *, unix: bool
) -> tuple[str | None, str | None]:
    if not unix:
        if socket is not None:
            raise ConfigError(f"{text}: socket= needs the scheme nbd+unix:// or nbds+unix://")
        if port == 0:
            raise ConfigError(f"{text}: port 0 cannot be connected to")
        return unquote(hostname) if hostname else "localhost", None
    if hostname or port is not None:
        raise ConfigError(
            f"{text}: a unix socket has no host: write nbd+unix:///EXPORT?socket=PATH"
        )
    if not socket:
        raise ConfigError(f"{text}: which socket? write nbd+unix:///EXPORT?socket=PATH")
    socket = _absolute(text, socket)
    if len(socket.encode()) > _UNIX_PATH_MAX_BYTES:
        raise ConfigError(
            f"{text}: the socket's path is longer than the {_UNIX_PATH_MAX_BYTES} bytes "
            "that the system takes"
        )
    return None, socket


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
    try:
        name = unquote(path.removeprefix("/"), errors="strict")
    except UnicodeDecodeError:
        raise ConfigError(f"{text}: the export's name is not UTF-8") from None
    if "\0" in name:
        raise ConfigError(f"{text}: the export's name has a NUL in it")
    if len(name.encode()) > NAME_MAX_BYTES:
        raise ConfigError(f"{text}: the export's name is longer than {NAME_MAX_BYTES} bytes")
    return name


def _query(text: str, query: str) -> dict[str, str]:
    try:
        pairs = parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query))
    except ValueError as error:
        raise ConfigError(f"{text}: bad parameters: {error}") from None
    found: dict[str, str] = {}
    for name, value in pairs:
        if name not in _PARAMETERS:
            raise ConfigError(
                f"{text}: unknown parameter {name}; known are {', '.join(sorted(_PARAMETERS))}"
            )
        if name in found:
            raise ConfigError(f"{text}: {name} is there twice")
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
