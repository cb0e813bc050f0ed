"""TLS for NBD connections: contexts, and a non-blocking handshake under trio.

NBD "TLS support": at least TLS 1.2; a client verifies the server's certificate unless told not
to; the name to verify is the URI's host or `tls-hostname`.
"""

from __future__ import annotations

import socket
import ssl
from pathlib import Path

import trio

from bridge.errors import BridgeError, ConfigError, ConnectionLost
from bridge.nbd.options import ClientOptions
from bridge.nbd.uri import NbdUri

_PSK_KEY_MAX_BYTES = 64


def client_context(uri: NbdUri, options: ClientOptions) -> ssl.SSLContext:
    """The context that `uri` and `options` ask for.

    Raises ConfigError when a file is missing or does not hold what it should.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if uri.tls_psk_file is not None:
        _use_psk(context, uri)
        return context
    verify = uri.tls_verify_peer
    context.check_hostname = verify and _server_name(uri) is not None
    context.verify_mode = ssl.CERT_REQUIRED if verify else ssl.CERT_NONE
    if verify and _server_name(uri) is None:
        raise ConfigError(
            f"{uri.text}: a unix socket has no host name to verify: add tls-hostname=NAME, or "
            "tls-verify-peer=false"
        )
    authority, certificate, key = _files(uri, options)
    if authority is not None:
        _load(authority, lambda path: context.load_verify_locations(cafile=path))
    elif verify:
        context.load_default_certs(ssl.Purpose.SERVER_AUTH)
    if certificate is not None:
        _load(certificate, lambda path: context.load_cert_chain(path, key))
    return context


def server_context(certificate_file: str, key_file: str | None = None) -> ssl.SSLContext:
    """The context of a server with that certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.load_cert_chain(certificate_file, key_file)
    return context


async def start_tls(
    sock: socket.socket, context: ssl.SSLContext, *, server_name: str | None, server_side: bool
) -> ssl.SSLSocket:
    """Do the TLS handshake over a non-blocking socket, which the result takes over.

    Raises ConfigError (the certificate is not good: no retry helps) or ConnectionLost. The
    socket is closed on any exception, cancellation included.
    """
    tls = context.wrap_socket(
        sock,
        server_side=server_side,
        do_handshake_on_connect=False,
        server_hostname=server_name,
    )
    try:
        while True:
            try:
                tls.do_handshake()
                return tls
            except ssl.SSLWantReadError:
                await trio.lowlevel.wait_readable(tls)
            except ssl.SSLWantWriteError:
                await trio.lowlevel.wait_writable(tls)
    except (ssl.SSLError, OSError) as error:
        tls.close()
        raise explain(error, server_name) from None
    except BaseException:
        tls.close()
        raise


def explain(error: Exception, server_name: str | None) -> BridgeError:
    """One line for the operator: which of the many ways TLS fails this is."""
    if isinstance(error, ssl.SSLCertVerificationError):
        reason = error.verify_message
        return ConfigError(f"the server's certificate is not accepted for {server_name}: {reason}")
    if isinstance(error, ssl.SSLError) and not isinstance(error, ssl.SSLEOFError):
        return ConfigError(f"TLS handshake failed: {error.reason or error}")
    return ConnectionLost(f"the server hung up during the TLS handshake ({error})")


def server_name(uri: NbdUri) -> str | None:
    """The name to verify and to send."""
    return _server_name(uri)


def _server_name(uri: NbdUri) -> str | None:
    return uri.tls_hostname or uri.host


def _files(uri: NbdUri, options: ClientOptions) -> tuple[str | None, str | None, str | None]:
    """CA, certificate and key: the options win over the URI's directory."""
    authority = certificate = key = None
    if uri.tls_certificates is not None:
        folder = Path(uri.tls_certificates)
        if not folder.is_dir():
            raise ConfigError(f"{folder}: the directory of tls-certificates does not exist")
        authority = _if_there(folder / "ca-cert.pem")
        certificate = _if_there(folder / "client-cert.pem")
        key = _if_there(folder / "client-key.pem")
        if authority is None and uri.tls_verify_peer:
            raise ConfigError(f"{folder}: no ca-cert.pem in the directory of tls-certificates")
    return (
        options.tls_ca_file or authority,
        options.tls_certificate_file or certificate,
        options.tls_key_file or key,
    )


def _if_there(path: Path) -> str | None:
    return str(path) if path.exists() else None


def _load(path: str, load: object) -> None:
    assert callable(load)
    try:
        load(path)
    except ssl.SSLError as error:
        raise ConfigError(f"{path}: not a usable certificate or key: {error.reason}") from None
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None


def _use_psk(context: ssl.SSLContext, uri: NbdUri) -> None:
    """Pre-shared keys, file format of GnuTLS: one `user:hexkey` per line."""
    set_callback = getattr(context, "set_psk_client_callback", None)
    if set_callback is None:
        raise ConfigError(
            f"{uri.text}: tls-psk-file needs Python 3.13 or newer; use certificates instead"
        )
    path = Path(uri.tls_psk_file or "")
    try:
        line = path.read_text().splitlines()[0]
        user, key_text = line.strip().split(":", 1)
        key = bytes.fromhex(key_text)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except (ValueError, IndexError):
        raise ConfigError(f"{path}: no line USER:HEXKEY in it") from None
    if not 0 < len(key) <= _PSK_KEY_MAX_BYTES:
        raise ConfigError(f"{path}: a key of {len(key)} bytes")
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers("PSK")
    set_callback(lambda hint: (user, key))
