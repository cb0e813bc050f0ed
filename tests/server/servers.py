"""Real NBD servers for the interop tests: how each is started, over what, with which names."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.ports import free_port
from tests.processes import program
from tests.tools import need, peer

SIZE = 8 << 20
EXTENDED = ("qemu-nbd-10", "qemu-storage-daemon-10")
"""The servers that speak extended headers."""


@dataclass(frozen=True)
class Served:
    """A running server."""

    uri: str
    image: Path


@contextlib.contextmanager
def serve(kind: str, folder: Path, *, tcp: bool, tls: Path | None) -> Iterator[Served]:
    """Start server `kind` on an image of `SIZE` in `folder`."""
    image = folder / "disk.img"
    with image.open("wb") as file:
        file.truncate(SIZE)
    port = free_port() if tcp else 0
    sock = folder / "s"
    argv, export = _COMMANDS[kind](image, sock, port, tls)  # type: ignore[operator]
    running = _daemon if kind == "nbd-server" else program
    where = f"localhost:{port}/{export}?" if tcp else f"/{export}?socket={sock}"
    scheme = "nbd" + ("s" if tls else "") + ("" if tcp else "+unix")
    more = f"&tls-certificates={tls.parent / 'clients'}&tls-hostname=localhost" if tls else ""
    with running(argv, ready=port if tcp else sock):
        yield Served(f"{scheme}://{where}{more}".replace("?&", "?").rstrip("?"), image)


def _nbdkit(command: list[str]) -> object:
    def make(image: Path, sock: Path, port: int, tls: Path | None) -> tuple[list[str], str]:
        argv = [*command, "-f", "--exit-with-parent"]
        argv += ["-i", "127.0.0.1", "-p", str(port)] if port else ["-U", str(sock)]
        if tls:
            argv += ["--tls=require", f"--tls-certificates={tls}"]
        return [*argv, "file", f"file={image}"], ""

    return make


def _qemu_nbd(command: list[str]) -> object:
    def make(image: Path, sock: Path, port: int, tls: Path | None) -> tuple[list[str], str]:
        argv = [*command, "-f", "raw", "-t", "-e", "8", "-x", "disk", "--discard=unmap"]
        argv += ["-b", "127.0.0.1", "-p", str(port)] if port else ["-k", str(sock)]
        if tls:
            argv += ["--object", _qemu_tls(tls), "--tls-creds", "t"]
        return [*argv, str(image)], "disk"

    return make


def _storage_daemon(command: list[str]) -> object:
    def make(image: Path, sock: Path, port: int, tls: Path | None) -> tuple[list[str], str]:
        address = (
            f"addr.type=inet,addr.host=127.0.0.1,addr.port={port}"
            if port
            else f"addr.type=unix,addr.path={sock}"
        )
        argv = [*command]
        if tls:
            argv += ["--object", _qemu_tls(tls)]
            address += ",tls-creds=t"
        return [
            *argv,
            "--blockdev",
            f"driver=file,node-name=f,filename={image},discard=unmap",
            "--nbd-server",
            address,
            "--export",
            "type=nbd,id=e,node-name=f,writable=on,name=disk",
        ], "disk"

    return make


def _qemu_tls(tls: Path) -> str:
    return f"tls-creds-x509,id=t,endpoint=server,dir={tls},verify-peer=off"


def _nbd_server(image: Path, sock: Path, port: int, tls: Path | None) -> tuple[list[str], str]:
    config = image.parent / "nbd.conf"
    lines = ["[generic]", "allowlist = true"]
    lines += [f"port = {port}", "listenaddr = 127.0.0.1"] if port else [f"unixsock = {sock}"]
    if tls:
        lines += [
            f"certfile = {tls}/server-cert.pem",
            f"keyfile = {tls}/server-key.pem",
            f"cacertfile = {tls}/ca-cert.pem",
            "force_tls = true",
        ]
    lines += ["[disk]", f"exportname = {image}", "flush = true", "fua = true", "trim = true"]
    lines.append(f"filesize = {SIZE}")
    config.write_text("\n".join(lines) + "\n")
    return [need("nbd-server"), "-C", str(config), "-p", str(image.parent / "pid")], "disk"


@contextlib.contextmanager
def _daemon(argv: list[str], *, ready: Path | int) -> Iterator[None]:
    """nbd-server 3.24 stays in the foreground only with -d, and then serves a single client."""
    subprocess.run(argv, check=True, stdin=subprocess.DEVNULL, capture_output=True)
    pid_file = Path(argv[-1])
    while not pid_file.exists() or not pid_file.read_text().strip():
        time.sleep(0.01)
    pid = int(pid_file.read_text())
    try:
        with program(["sleep", "60"], ready=ready):
            yield
    finally:
        os.kill(pid, signal.SIGTERM)


def _host(name: str, make: object) -> object:
    def command(*arguments: object) -> tuple[list[str], str]:
        return make([need(name)])(*arguments)  # type: ignore[operator,no-any-return]

    return command


def _peer(name: str, make: object) -> object:
    def command(*arguments: object) -> tuple[list[str], str]:
        return make(peer(name))(*arguments)  # type: ignore[operator,no-any-return]

    return command


_COMMANDS = {
    "nbdkit": _host("nbdkit", _nbdkit),
    "nbdkit-1.42": _peer("nbdkit", _nbdkit),
    "qemu-nbd": _host("qemu-nbd", _qemu_nbd),
    "qemu-nbd-10": _peer("qemu-nbd", _qemu_nbd),
    "qemu-storage-daemon-10": _peer("qemu-storage-daemon", _storage_daemon),
    "nbd-server": lambda *arguments: _nbd_server(*arguments),
}
_MARKERS = {"nbdkit": "nbdkit", "nbd-server": "nbdkit", "qemu-nbd": "qemu"}
KINDS = tuple(
    pytest.param(kind, marks=getattr(pytest.mark, _MARKERS.get(kind, "peers")))
    for kind in _COMMANDS
)
"""For parametrize: each server with the marker of what it needs."""


@contextlib.contextmanager
def nbdkit(folder: Path, *arguments: str) -> Iterator[str]:
    """nbdkit with any arguments on a unix socket; the URI."""
    sock = folder / f"s{os.urandom(3).hex()}"
    argv = [need("nbdkit"), "-f", "--exit-with-parent", "-U", str(sock), *arguments]
    with program(argv, ready=sock):
        yield f"nbd+unix:///?socket={sock}"
