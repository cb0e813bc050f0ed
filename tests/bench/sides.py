"""The two sides of a row of `./run bench full`: bridge and peer, each on an equal server."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.bench.peer import control, running
from tests.bench.rows import NO_CACHE, Row, Server
from tests.peers import peer_command
from tests.ports import free_port

DISK_BYTES: Final = 256 << 20
_FAR_PLUGIN = Path(__file__).with_name("far_plugin.py")


@dataclass(frozen=True)
class Disk:
    """One vhost-user-blk device that is being served."""

    pid: int
    server_pid: int
    socket: Path
    log: Path
    """What the process wrote: a bridge that complains was not measured in order."""


@dataclass(frozen=True)
class _Address:
    server: Server
    path: Path
    port: int
    certificates: dict[str, Path]

    @property
    def of_nbdkit(self) -> list[str]:
        if self.server.transport == "unix":
            return ["-U", str(self.path)]
        tls = []
        if self.server.transport == "tls":
            tls = ["--tls=require", f"--tls-certificates={self.certificates['good']}"]
        return ["-i", "127.0.0.1", "-p", str(self.port), *tls]

    @property
    def uri(self) -> str:
        if self.server.transport == "unix":
            return f"nbd+unix:///?socket={self.path}"
        if self.server.transport == "tcp":
            return f"nbd://127.0.0.1:{self.port}/"
        clients = self.certificates["clients"]
        return f"nbds://localhost:{self.port}/?tls-certificates={clients}"

    @property
    def of_qemu(self) -> tuple[list[str], str]:
        """Objects, and options of the block driver."""
        if self.server.transport == "unix":
            return [], f"server.type=unix,server.path={self.path}"
        inet = f"server.type=inet,server.host=127.0.0.1,server.port={self.port}"
        if self.server.transport == "tcp":
            return [], inet
        creds = f"tls-creds-x509,id=tls,endpoint=client,dir={self.certificates['clients']}"
        return ["--object", creds], f"{inet},tls-creds=tls,tls-hostname=localhost"


@contextlib.contextmanager
def server(
    what: Server, directory: Path, name: str, certificates: dict[str, Path]
) -> Iterator[tuple[subprocess.Popen[bytes], _Address]]:
    """An nbdkit, and where it is."""
    port = 0 if what.transport == "unix" else free_port()
    address = _Address(what, directory / f"{name}.nbd", port, certificates)
    argv = ["nbdkit", "-f", *address.of_nbdkit]
    if what.delay_ms:
        argv += ["python", str(_FAR_PLUGIN), f"size={DISK_BYTES}", f"delay={what.delay_ms / 1e3}"]
    else:
        argv += ["memory", str(DISK_BYTES)]
    with running(*argv, ready=None if port else address.path) as process:
        while port and not _listens(port):
            if process.poll() is not None:
                raise SystemExit("nbdkit did not come up")
            time.sleep(0.02)
        yield process, address


def _listens(port: int) -> bool:
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", port)) == 0


@contextlib.contextmanager
def bridge(
    row: Row, directory: Path, name: str, certificates: dict[str, Path], engine: str
) -> Iterator[Disk]:
    """A bridge on a server of its own; its cache is new."""
    vhost, log, cache = (directory / f"{name}.{end}" for end in ("vhost", "log", "cache"))
    options = ["--cache-mode", "off"]
    if row.cache != NO_CACHE:
        cache.mkdir()
        options = ["--cache-mode", "writeback", "--cache-dir", str(cache)]
        options += ["--cache-size", str(DISK_BYTES)]
    with contextlib.ExitStack() as up:
        nbdkit, address = up.enter_context(server(row.server, directory, name, certificates))
        argv = [sys.executable, "-m", "bridge", "serve", address.uri, *options]
        argv += ["--socket-path", str(vhost), "--log-level", "warning", "--engine", engine]
        argv += ["--num-queues", str(row.queues), "--api", str(control(vhost))]
        process = up.enter_context(_logged(argv, log, vhost))
        yield Disk(process.pid, nbdkit.pid, vhost, log)


@contextlib.contextmanager
def storage_daemon(
    row: Row, directory: Path, name: str, certificates: dict[str, Path]
) -> Iterator[Disk]:
    """qemu-storage-daemon with an iothread, on a server of its own or on no storage."""
    vhost, log = directory / f"{name}.vhost", directory / f"{name}.log"
    with contextlib.ExitStack() as up:
        nbdkit, address = up.enter_context(server(row.server, directory, name, certificates))
        objects, place = address.of_qemu
        node = f"driver=nbd,node-name=disk,{place},discard=unmap"
        if row.beside_null:
            objects, node = [], f"driver=null-co,node-name=disk,size={DISK_BYTES}"
        argv = peer_command(
            *("qemu-storage-daemon", "--object", "iothread,id=io", *objects, "--blockdev", node),
            "--export",
            "type=vhost-user-blk,id=export,node-name=disk,addr.type=unix,"
            f"addr.path={vhost},writable=on,num-queues={row.queues},iothread=io",
        )
        process = up.enter_context(_logged(argv, log, vhost))
        yield Disk(process.pid, nbdkit.pid, vhost, log)


@contextlib.contextmanager
def _logged(argv: list[str], log: Path, ready: Path) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("wb") as output, running(*argv, ready=ready, output=output) as process:
        yield process
