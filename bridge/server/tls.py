"""TLS for NBD connections: contexts, and a non-blocking handshake under trio.

NBD "TLS support": at least TLS 1.2; a client verifies the server's certificate unless told not
to; the name to verify is the URI's host or `tls-hostname`.
"""

from __future__ import annotations

import os
import socket
import ssl
import stat
from pathlib import Path

import trio

from bridge.errors import (
    BridgeError,
    ConfigError,
    ConnectionLost,
    Remedy,
    SettingFault,
    SettingName,
)
from bridge.server.client_options import ClientOptions
from bridge.server.uri import NbdUri

_CA = SettingName("tls_ca_file")
_CERTIFICATE = SettingName("tls_certificate_file")
_KEY = SettingName("tls_key_file")
"""Fields of ClientOptions."""

_PSK_KEY_MAX_BYTES = 64
_UNKNOWN_CA_CODES = (18, 19, 20, 21)
"""X509_V_ERR_DEPTH_ZERO_SELF_SIGNED_CERT and its neighbours: nothing leads to a known CA."""
_OTHER_NAME_CODES = (62, 64)
"""X509_V_ERR_HOSTNAME_MISMATCH, X509_V_ERR_IP_ADDRESS_MISMATCH."""


def client_context(uri: NbdUri, options: ClientOptions) -> ssl.SSLContext:
    """The context that `uri` and `options` ask for.

    Raises ConfigError when a file is missing or does not hold what it should.
    """
    check_options(uri, options)
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
        _load_authority(context, authority)
    elif verify:
        context.load_default_certs(ssl.Purpose.SERVER_AUTH)
    if certificate is not None:
        _load_certificate(context, certificate, key)
    return context


def check_options(uri: NbdUri, options: ClientOptions) -> None:
    """What is asked of TLS must come true: an option that would have no effect is refused."""
    given = {
        _CA: options.tls_ca_file,
        _CERTIFICATE: options.tls_certificate_file,
        _KEY: options.tls_key_file,
    }
    names = [name for name, path in given.items() if path is not None]
    if not names:
        return
    if not uri.tls:
        scheme = "nbds+unix://" if uri.socket_path is not None else "nbds://"
        raise SettingFault(f"{uri.text}: ", names[0], f" needs TLS: use the scheme {scheme}")
    if uri.tls_psk_file is not None:
        raise SettingFault(
            f"{uri.text}: ", names[0], " and tls-psk-file exclude each other: give one of them"
        )
    if names[-1] == _KEY and _CERTIFICATE not in names:
        needs = f" {options.tls_key_file}: a key needs its certificate: give "
        raise SettingFault(_KEY, needs, _CERTIFICATE, " too")


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
        remedy = Remedy.NAME_CA if error.verify_code in _UNKNOWN_CA_CODES else None
        if error.verify_code in _OTHER_NAME_CODES:
            reason = f"{reason.rstrip('.')} (give the name that it is for with ?tls-hostname=NAME)"
        return ConfigError(
            f"the server's certificate is not accepted for {server_name}: {reason}", remedy=remedy
        )
    if isinstance(error, ssl.SSLError) and "CERTIFICATE_REQUIRED" in (error.reason or ""):
        return ConfigError(
            "the server wants a TLS certificate of its client", remedy=Remedy.GIVE_CERTIFICATE
        )
    if isinstance(error, ssl.SSLError) and not isinstance(error, ssl.SSLEOFError):
        return ConfigError(f"TLS handshake failed: {error.reason or error}")
    return ConnectionLost(f"the server hung up during the TLS handshake ({error})")


def server_name(uri: NbdUri) -> str | None:
    """The name to verify and to send."""
    return _server_name(uri)


def _server_name(uri: NbdUri) -> str | None:
    return uri.tls_hostname or uri.host


def has_certificate(uri: NbdUri, options: ClientOptions) -> bool:
    """Whether a server that asks for a client certificate or a key gets one."""
    return uri.tls_psk_file is not None or _files(uri, options)[1] is not None


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


def _load_authority(context: ssl.SSLContext, path: str) -> None:
    _check_file(path, _CA)
    try:
        context.load_verify_locations(cafile=path)
    except (ssl.SSLError, OSError) as error:
        raise SettingFault(
            f"{path}: not a usable certificate of a CA (", _CA, f"): {_why(error)}"
        ) from None


def _load_certificate(context: ssl.SSLContext, certificate: str, key: str | None) -> None:
    """OpenSSL does not say which of the two files it does not like; we do."""
    _check_file(certificate, _CERTIFICATE)
    if key is not None:
        _check_file(key, _KEY)
    try:
        context.load_cert_chain(certificate, key, password=_no_passphrase)
        return
    except _NeedsPassphrase:
        raise SettingFault(
            f"{key or certificate}: the key (",
            _KEY,
            ") is encrypted, and its passphrase cannot be asked for here: give it without one "
            "(openssl pkey -in KEY -out NEW)",
        ) from None
    except (ssl.SSLError, OSError) as caught:
        error = caught
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cafile=certificate)
    except (ssl.SSLError, OSError) as why:
        raise SettingFault(
            f"{certificate}: not a usable certificate (", _CERTIFICATE, f"): {_why(why)}"
        ) from None
    if getattr(error, "reason", None) == "KEY_VALUES_MISMATCH":
        raise SettingFault(
            f"{key or certificate}: the key (",
            _KEY,
            f") is not that of the certificate {certificate} (",
            _CERTIFICATE,
            ")",
        )
    if key is None:
        raise SettingFault(f"{certificate}: no key to the certificate in it: give ", _KEY, " too")
    raise SettingFault(f"{key}: not a usable key (", _KEY, f"): {_why(error)}")


class _NeedsPassphrase(Exception):
    """OpenSSL would ask at the terminal, and everything would wait for an answer."""


def _no_passphrase() -> str:
    raise _NeedsPassphrase


def _check_file(path: str, setting: str | SettingName) -> None:
    """Reading it must not wait: a regular file only, no pipe. Raises ConfigError."""
    try:
        mode = os.stat(path).st_mode
        if stat.S_ISREG(mode):
            os.close(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
    except OSError as error:
        raise SettingFault(f"{path} (", setting, f"): {error.strerror}") from None
    if not stat.S_ISREG(mode):
        raise SettingFault(f"{path} (", setting, "): not a file")


def _why(error: ssl.SSLError | OSError) -> str:
    reason = getattr(error, "reason", None)
    if isinstance(reason, str):
        return reason.replace("_", " ").lower()
    return "no PEM in it" if isinstance(error, ssl.SSLError) else error.strerror or str(error)


def _use_psk(context: ssl.SSLContext, uri: NbdUri) -> None:
    """Pre-shared keys, file format of GnuTLS: one `user:hexkey` per line."""
    set_callback = getattr(context, "set_psk_client_callback", None)
    if set_callback is None:
        raise ConfigError(
            f"{uri.text}: tls-psk-file needs Python 3.13 or newer; use certificates instead"
        )
    path = Path(uri.tls_psk_file or "")
    _check_file(str(path), "tls-psk-file")
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
