"""What goes wrong at a start: each says so in one line, is unhealthy, and recovers."""

from __future__ import annotations

import os
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.docker.command import Failed
from tests.docker.compose import Compose

Say = Callable[[str], None]

_QUICK = {"NBD_HEALTH_INTERVAL": "1s"}
_LIMIT_S = 180.0
_BRIDGE_GID = 10810


def run_bad_input(compose: Compose, say: Say) -> None:
    """Every case, one after the other, on a fresh project. Raises Failed."""
    settings = compose.settings
    compose.settings = {**settings, **_QUICK}
    try:
        for case in (wrong_setting, port_in_use, storage_not_there, wrong_certificate,
                     volume_of_root, cache_of_another_version):  # fmt: skip
            compose.down(volumes=True)
            case(compose)
            say(f"bad      {case.__doc__}")
    finally:
        compose.down(volumes=True)
        compose.settings = settings


def wrong_setting(compose: Compose) -> None:
    """a wrong variable: said in one line, unhealthy; the right one repairs it"""
    compose.up("storage", NBD_VOLUME_SIZE="plenty")
    compose.wait_health("storage", "unhealthy", _LIMIT_S)
    _expect_one_line(compose, "storage", "NBD_VOLUME_SIZE='plenty' is not allowed")
    compose.up("storage")
    compose.wait_health("storage", "healthy", _LIMIT_S)
    compose.up("bridge", options=["--no-deps"], BRIDGE_CACHE_MODE="sometimes")
    compose.wait_health("bridge", "unhealthy", _LIMIT_S)
    _expect_one_line(compose, "bridge", "BRIDGE_CACHE_MODE='sometimes' is not one of")


def port_in_use(compose: Compose) -> None:
    """a port in use: Compose says so; the next `up` works when it is free"""
    address = compose.settings["NBD_LISTEN"]
    with _listening(address):
        said = compose.compose("up", "-d", "--no-build", "storage", check=False)
        if "address already in use" not in said and "port is already allocated" not in said:
            raise Failed(f"Compose does not say that {address} is in use:\n{said[-800:]}")
    compose.up("storage")
    compose.wait_health("storage", "healthy", _LIMIT_S)


def storage_not_there(compose: Compose) -> None:
    """no storage yet, then a storage that went away and came back: the bridge waits for both"""
    compose.up("bridge", options=["--no-deps"])
    compose.wait_health("bridge", "unhealthy", _LIMIT_S)
    _expect_one_line(compose, "bridge", "client-cert.pem cannot be read|ca-cert.pem cannot be read")
    compose.up("storage")
    compose.wait_health("bridge", "healthy", _LIMIT_S)
    compose.compose("stop", "-t", "2", "storage")
    compose.wait_health("bridge", "unhealthy", _LIMIT_S)
    said = compose.inspect("bridge")["State"]["Health"]["Log"][-1]["Output"]
    if "bridge is unhealthy: " not in said or "does not answer" in said:
        raise Failed(f"the bridge's health check does not tell of the missing server: {said!r}")
    compose.compose("start", "storage")
    compose.wait_health("bridge", "healthy", _LIMIT_S)


def wrong_certificate(compose: Compose) -> None:
    """a client certificate of another authority: refused, said in one line, unhealthy"""
    compose.up("storage")
    compose.wait_health("storage", "healthy", _LIMIT_S)
    with tempfile.TemporaryDirectory(prefix="nbd-bridge-tls-") as temporary:
        _foreign_certificates(compose, Path(temporary))
        compose.up("bridge", options=["--no-deps"], BRIDGE_CERTIFICATES=f"{temporary}/client")
        compose.wait_health("bridge", "unhealthy", _LIMIT_S)
        said = compose.wait_log("bridge", "ertificate", _LIMIT_S)
        if "Traceback" in compose.logs("bridge") or len(said) > 500:
            raise Failed(f"the bridge does not say it in one line:\n{compose.logs('bridge')}")
        compose.up("bridge", options=["--no-deps"])
        compose.wait_health("bridge", "healthy", _LIMIT_S)


def volume_of_root(compose: Compose) -> None:
    """another user's volume: said with the remedy; it goes on when that is mended"""
    compose.compose("up", "--no-start", "--no-build", "storage")
    image = compose.inspect("storage")["Config"]["Image"]
    own = ["run", "--rm", "--user", "0", "-v", f"{compose.name}_volumes:/volumes",
           "--entrypoint", "chown", image]  # fmt: skip
    compose.engine(*own, "0:0", "/volumes")
    compose.up("storage")
    compose.wait_health("storage", "unhealthy", _LIMIT_S)
    _expect_one_line(compose, "storage", "/volumes belongs to user 0")
    compose.engine(*own, "10809:10809", "/volumes")
    compose.wait_health("storage", "healthy", _LIMIT_S)


def cache_of_another_version(compose: Compose) -> None:
    """a cache file of a later version: refused and kept, used again by the program it is for"""
    compose.up("storage", "bridge")
    compose.wait_health("bridge", "healthy", _LIMIT_S)
    compose.compose("stop", "bridge")
    _set_cache_version(compose, 99)
    compose.compose("start", "bridge")
    compose.wait_health("bridge", "unhealthy", _LIMIT_S)
    compose.wait_log("bridge", "has layout version 99, this program reads version", 1)
    _set_cache_version(compose, 1)
    compose.wait_health("bridge", "healthy", _LIMIT_S)


_SET_VERSION = """
import glob, struct, sys, zlib
from bridge.cache.file.layout import HEADER_AREA_BYTES, HEADER_BYTES
for name in glob.glob("/var/cache/nbd-bridge/*.cache"):
    with open(name, "r+b") as file:
        for offset in range(0, HEADER_AREA_BYTES, HEADER_BYTES):
            file.seek(offset)
            page = bytearray(file.read(HEADER_BYTES))
            struct.pack_into("=I", page, 8, int(sys.argv[1]))
            page[-4:] = struct.pack("=I", zlib.crc32(page[:-4]))
            file.seek(offset)
            file.write(page)
"""
"""Gives each header page another version and a checksum that fits, as another program would."""


def _set_cache_version(compose: Compose, version: int) -> None:
    image = compose.inspect("bridge")["Config"]["Image"]
    volume = f"{compose.name}_cache:/var/cache/nbd-bridge"
    python = ["--entrypoint", "/opt/nbd-bridge/bin/python", image]
    run = ["run", "--rm", "--network", "none", "-v", volume, *python]
    compose.engine(*run, "-c", _SET_VERSION, str(version))


def _expect_one_line(compose: Compose, service: str, texts: str) -> None:
    """The service has said one line, and it has one of `texts` (between bars)."""
    lines = compose.logs(service).strip().splitlines()
    wrong = [line for line in lines if not line.startswith(f"{service}: made certificates")]
    if len(wrong) != 1 or not any(text in wrong[0] for text in texts.split("|")):
        raise Failed(f"{service} should say one line with {texts!r}, it says\n{lines}")


def _foreign_certificates(compose: Compose, folder: Path) -> None:
    """A client directory as the storage makes it, but of another authority."""
    sys.path.insert(0, str(compose.folder / "scripts"))
    from certificates import ensure_certificates

    server, client = folder / "server", folder / "client"
    for path in (server, client):
        path.mkdir()
    ensure_certificates(server, client, ["storage"])
    folder.chmod(0o755)
    for path in (client, *client.iterdir()):
        if os.geteuid() == 0:
            os.chown(path, -1, _BRIDGE_GID)
        path.chmod(0o750 if path.is_dir() else 0o640)


@contextmanager
def _listening(address: str) -> Iterator[None]:
    host, _, port = address.rpartition(":")
    with socket.create_server((host, int(port))):
        yield
