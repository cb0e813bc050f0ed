"""The certificates between storage and bridge: made at the first start, renewed in time.

    SERVER/ca-key.pem, ca-cert.pem, server-key.pem, server-cert.pem     only for the storage's user
    CLIENT/ca-cert.pem, client-key.pem, client-cert.pem                 also for the bridge's group

The names are those that nbdkit, libnbd and QEMU look for in a directory of certificates. Each
side accepts only certificates of this authority, so that a client needs the client key.

An operator's own certificates stay untouched: a SERVER with server-cert.pem but without ca-key.pem.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from environment import SettingError

CA_DAYS = 3650
LEAF_DAYS = 825
RENEW_DAYS = 90
"""Checked at each start: a storage that runs longer than this must be restarted once."""

_OPENSSL_LIMIT_S = 30.0
_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-noenc")


def ensure_certificates(server: Path, client: Path, names: Sequence[str]) -> bool:
    """Make the certificates that are missing, about to expire, or not for all `names`.

    `names`: the DNS names and IP addresses by which clients reach the server. Returns whether it
    made any. Raises SettingError when a directory cannot be written or openssl fails.
    """
    for folder in (server, client):
        check_writable(folder)
    authority, authority_key = server / "ca-cert.pem", server / "ca-key.pem"
    if (server / "server-cert.pem").exists() and not authority_key.exists():
        return False
    made = False
    if not authority_key.exists() or not _is_fresh(authority):
        _make_authority(server)
        made = True
    if not _is_good(server, "server", authority, names):
        _issue(server, "server", server, names)
        made = True
    if not _is_good(client, "client", authority, ()):
        _issue(client, "client", server, ())
        made = True
    if not _same(authority, client / "ca-cert.pem"):
        shutil.copyfile(authority, client / "ca-cert.pem")
        made = True
    _set_modes(server, client)
    return made


def check_writable(folder: Path) -> None:
    """Raise SettingError, with the remedy, unless `folder` is a directory that we may write."""
    if not folder.is_dir():
        raise SettingError(f"{folder} is not there: mount a volume at it")
    if not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
        status = folder.stat()
        raise SettingError(
            f"{folder} belongs to user {status.st_uid} with mode {status.st_mode & 0o7777:o}, "
            f"user {os.getuid()} cannot write it: chown {os.getuid()} the volume"
        )


def _make_authority(folder: Path) -> None:
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        key, certificate = Path(temporary, "key"), Path(temporary, "cert")
        _openssl(
            "req", "-x509", *_KEY, "-keyout", str(key), "-out", str(certificate),
            "-days", str(CA_DAYS), "-subj", "/CN=nbd-bridge certificate authority",
            "-addext", "basicConstraints=critical,CA:TRUE,pathlen:0",
            "-addext", "keyUsage=critical,keyCertSign,cRLSign",
        )  # fmt: skip
        # The certificate first: after an interruption the next start makes both again.
        certificate.rename(folder / "ca-cert.pem")
        key.rename(folder / "ca-key.pem")


def _issue(folder: Path, role: str, authority: Path, names: Sequence[str]) -> None:
    extensions = ["-addext", "basicConstraints=critical,CA:FALSE",
                  "-addext", "keyUsage=critical,digitalSignature",
                  "-addext", f"extendedKeyUsage={role}Auth"]  # fmt: skip
    if names:
        extensions += ["-addext", "subjectAltName=" + ",".join(map(_alternative_name, names))]
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        key, certificate = Path(temporary, "key"), Path(temporary, "cert")
        _openssl(
            "req", "-x509", *_KEY, "-keyout", str(key), "-out", str(certificate),
            "-days", str(LEAF_DAYS), "-subj", f"/CN=nbd-bridge {role}",
            "-CA", str(authority / "ca-cert.pem"), "-CAkey", str(authority / "ca-key.pem"),
            *extensions,
        )  # fmt: skip
        key.rename(folder / f"{role}-key.pem")
        certificate.rename(folder / f"{role}-cert.pem")


def _alternative_name(name: str) -> str:
    return f"IP:{name}" if is_address(name) else f"DNS:{name}"


def is_address(name: str) -> bool:
    """Whether `name` is an IP address and not a DNS name."""
    return ":" in name or re.fullmatch(r"[0-9.]+", name) is not None


def _is_good(folder: Path, role: str, authority: Path, names: Sequence[str]) -> bool:
    """The role's key and certificate exist, are fresh, of this authority and for these names."""
    certificate, key = folder / f"{role}-cert.pem", folder / f"{role}-key.pem"
    if not key.exists() or not _is_fresh(certificate):
        return False
    if not _succeeds("verify", "-CAfile", str(authority), str(certificate)):
        return False
    if _public_key("x509", "-in", certificate, "-noout", "-pubkey") != _public_key(
        "pkey", "-in", key, "-pubout"
    ):
        return False
    checks = (("-checkip" if is_address(name) else "-checkhost", name) for name in names)
    return all(_matches(certificate, *check) for check in checks)


def _is_fresh(certificate: Path) -> bool:
    seconds = RENEW_DAYS * 86400
    return certificate.exists() and _succeeds(
        "x509", "-in", str(certificate), "-noout", "-checkend", str(seconds)
    )


def _matches(certificate: Path, check: str, name: str) -> bool:
    done = _run("x509", "-in", str(certificate), "-noout", check, name)
    return "does match" in done.stdout


def _public_key(*command: str | Path) -> str:
    return _run(*map(str, command)).stdout


def _same(one: Path, other: Path) -> bool:
    return other.exists() and one.read_bytes() == other.read_bytes()


def _set_modes(server: Path, client: Path) -> None:
    """Keys of the server for its user only; the client's also for the directory's group."""
    for path in server.glob("*.pem"):
        path.chmod(0o600 if path.name.endswith("-key.pem") else 0o644)
    group = client.stat().st_gid
    for path in client.glob("*.pem"):
        if path.stat().st_gid != group:
            os.chown(path, -1, group)
        path.chmod(0o640 if path.name.endswith("-key.pem") else 0o644)


def _openssl(*arguments: str) -> None:
    done = _run(*arguments)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise SettingError(f"openssl {arguments[0]} failed: {last}")


def _succeeds(*arguments: str) -> bool:
    return _run(*arguments).returncode == 0


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    # Without the system's openssl.cnf, which may change any default.
    environment = {**os.environ, "OPENSSL_CONF": "/dev/null"}
    previous = os.umask(0o077)
    try:
        return subprocess.run(
            ["openssl", *arguments], env=environment, stdin=subprocess.DEVNULL,
            capture_output=True, text=True, check=False, timeout=_OPENSSL_LIMIT_S,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        raise SettingError(f"cannot run openssl: {error}") from None
    finally:
        os.umask(previous)
