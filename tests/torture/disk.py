"""One tortured disk: a server, perhaps a proxy, a bridge, a guest, and what may befall them."""

from __future__ import annotations

import signal
from collections.abc import AsyncIterator, Sequence
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random

import trio

from bridge.peers.blk_driver import FEATURES, PACKED_FEATURES, BlkDriver
from bridge.units import SECTOR_BYTES
from tests.ceph.cluster import Cluster
from tests.processes import bridge_argv, unix_uri
from tests.torture.clients import Driver
from tests.torture.front_ends import (
    LIBBLKIO,
    LINUX,
    BlkioClient,
    LinuxGuest,
    build_machine,
)
from tests.torture.guest import LARGEST_SECTORS, Guest
from tests.torture.memory import Hierarchy
from tests.torture.oracle import DiskOracle
from tests.torture.places import Place, small_place
from tests.torture.pressure import JumpingClock
from tests.torture.processes import Program
from tests.torture.proxy import Proxy
from tests.torture.servers import KINDS, create_rbd_image, server_argv
from tests.torture.tally import OWN, Tally

MIB = 1 << 20
REQUEST_TIMEOUT_S = 10


@dataclass(frozen=True)
class Profile:
    """How one disk is made. `bug`: the planted bug of its bridge, to test the checker."""

    server: str
    cache: str
    engine: str = "auto"
    queues: int = 2
    packed: bool = False
    proxied: bool = False
    small_file_systems: bool = False
    connections: int = 1
    size_bytes: int = 32 * MIB
    cache_bytes: int = 8 * MIB
    bug: str = ""
    client: str = OWN
    """Who makes the requests; another one is in `front_ends.py`."""
    cluster: Cluster | None = None
    """Of `rbd`."""

    def __str__(self) -> str:
        words = [self.server, self.cache, self.engine, f"{self.queues} queues"]
        words += ["packed"] if self.packed else []
        words += ["proxy"] if self.proxied else []
        words += [self.client] if self.client != OWN else []
        return " ".join(words)


PROFILES = (
    Profile("plugin", "writeback", proxied=True, small_file_systems=True),
    Profile("file", "writeback", engine="pure", packed=True, connections=4),
    Profile("plugin", "off", small_file_systems=True, connections=4),
    Profile("qemu-nbd", "writeback", proxied=True, queues=4, connections=2),
    Profile("plugin-lossy", "writeback", small_file_systems=True, packed=True),
    Profile("plugin", "writethrough", engine="pure", proxied=True),
    Profile("file", "off", engine="pure", queues=1, small_file_systems=True),
    Profile("plugin-lossy", "off", packed=True),
)

OTHERS = (
    Profile("plugin", "writeback", client=LIBBLKIO),
    Profile("plugin-lossy", "writeback", client=LINUX),
)
"""Disks of other people's front-ends."""


class Disk:
    """Everything of one disk. Faults use its methods; nobody else changes its state."""

    def __init__(
        self,
        number: int,
        profile: Profile,
        folder: Path,
        seed: str,
        tally: Tally,
        *,
        library: Path | None = None,
        limits: Hierarchy | None = None,
    ) -> None:
        """`folder`: where everything is. `library`: for clocks that jump. `limits`: of memory."""
        self.number = number
        self.profile = profile
        self.kind = KINDS[profile.server]
        self.rng = Random(f"{seed}/{number}/faults")
        self.tally = tally
        self.folder = folder
        self.nbd = folder / "nbd"
        self.vhost = folder / "vhost"
        self.control = folder / "api"
        groups = [limits and limits.group(f"{number}-{name}") for name in ("server", "bridge")]
        self.server = Program("server", folder / "server.log", groups[0])
        self.bridge = Program("bridge", folder / "bridge.log", groups[1])
        self.clock = JumpingClock(library, folder / "clock") if library else None
        self._environment = self.clock.environment if self.clock else {}
        self._seed = f"{seed}/{number}"
        self._stack = ExitStack()
        self.proxy = Proxy(self.nbd, Random(f"{self._seed}/proxy")) if profile.proxied else None
        self._make_files()
        self._machine = build_machine(folder) if profile.client == LINUX else None
        self.oracle = DiskOracle(
            number,
            profile.size_bytes // SECTOR_BYTES,
            None if profile.cluster else self.image,
            has_cache=self.has_cache,
            keeps_completed=profile.cache != "writeback" and not self.kind.loses_unflushed,
        )
        self.guest = Guest(
            self._driver,
            self.oracle,
            Random(f"{self._seed}/guest"),
            tally,
            client=profile.client,
            reconnects=profile.client != LIBBLKIO,
            discards=not (self.kind.trims_past_its_cache and self.has_cache),
        )

    def _driver(self) -> Driver:
        """The front-end of one guest's."""
        profile = self.profile
        log = self.folder / "client.log"
        if self._machine is not None:
            return LinuxGuest(self.number, log, self.vhost, self._machine, profile.queues)
        if profile.client == LIBBLKIO:
            return BlkioClient(self.number, log, self.vhost, self.folder, profile.queues)
        return BlkDriver(
            self.vhost,
            num_queues=profile.queues,
            queue_size=64,
            request_bytes=LARGEST_SECTORS * SECTOR_BYTES,
            segment_bytes=16384,
            features=PACKED_FEATURES if profile.packed else FEATURES,
            inflight=True,
        )

    def _make_files(self) -> None:
        self.storage = self._place("storage", self.profile.size_bytes + 2 * MIB)
        self.cache = self._place("cache", self.profile.cache_bytes + 4 * MIB)
        self.image = self.storage.path / "disk.img"
        if self.profile.cluster is not None:
            create_rbd_image(self.profile.cluster, self.profile.size_bytes)
            return
        with self.image.open("wb") as file:
            file.truncate(self.profile.size_bytes)

    def _place(self, name: str, size_bytes: int) -> Place:
        if self.profile.small_file_systems:
            return self._stack.enter_context(small_place(self.folder / name, size_bytes))
        path = self.folder / name
        path.mkdir()
        return Place(path, can_be_filled=False)

    def close(self) -> None:
        """Give files back; everything has ended before."""
        for group in (self.server.group, self.bridge.group):
            if group is not None:
                group.remove()
        self.oracle.close()
        self._stack.close()

    @property
    def has_cache(self) -> bool:
        """The bridge has a cache file."""
        return self.profile.cache != "off"

    @property
    def has_to_recover(self) -> bool:
        """No bridge may be killed before the guest can use it."""
        return self._machine is not None and not self._machine.sure_to_reconnect

    @property
    def uri(self) -> str:
        """Where the bridge finds the server."""
        if self.proxy is not None:
            return f"nbd://127.0.0.1:{self.proxy.port}/"
        return unix_uri(self.nbd)

    # Its life.

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """All of it, watched."""
        try:
            async with trio.open_nursery() as nursery:
                if self.proxy is not None:
                    await nursery.start(self.proxy.run)
                self.start_server()
                self.start_bridge()
                nursery.start_soon(self.server.watch, self._server_ended)
                nursery.start_soon(self.bridge.watch, self._bridge_ended)
                nursery.start_soon(self.guest.run)
                yield
                nursery.cancel_scope.cancel()
        finally:
            with trio.CancelScope(shield=True):
                await self.bridge.kill()
                await self.server.kill()
            self.close()

    def _bridge_ended(self, status: int) -> None:
        """It never does: it waits for its server at the start, too. The kernel may kill it."""
        if self.bridge.was_out_of_memory(status):
            self.tally.kills["bridge, out of memory"] += 1
            self.begin_flush_excuse()
            self.start_bridge()
            return
        self.tally.problems.append(
            f"disk {self.number}: the bridge ended by itself ({status}): {self.bridge.said()}"
        )

    def _server_ended(self, status: int) -> None:
        """nbdkit 1.32 aborts when a client hangs up with parallel requests in flight."""
        out_of_memory = self.server.was_out_of_memory(status)
        if out_of_memory or (self.kind.has_filters and status == -signal.SIGABRT):
            why = "out of memory" if out_of_memory else "by itself"
            self.tally.kills[f"server, {why}"] += 1
            self._server_died()
            self.start_server()
        else:
            self.tally.problems.append(
                f"disk {self.number}: the server ended by itself ({status}): {self.server.said()}"
            )

    # The server.

    def start_server(self, filters: Sequence[Sequence[str]] = ()) -> None:
        """Start it, with filters of nbdkit's if wanted."""
        self.nbd.unlink(missing_ok=True)
        profile = self.profile
        argv = server_argv(profile.server, self.image, self.nbd, filters, cluster=profile.cluster)
        self.server.start(argv, {})

    async def kill_server(self) -> None:
        """SIGKILL."""
        self.begin_flush_excuse()
        if self.server.runs:
            self.tally.kills["server"] += 1
        await self.server.kill()
        self._server_died()

    def _server_died(self) -> None:
        self.begin_flush_excuse()
        if self.kind.loses_unflushed:
            self.oracle.server_lost_power()
            if not self.bridge.runs:
                self.oracle.loss_unnoticed()

    def begin_flush_excuse(self) -> None:
        """Without a cache, a server that does not tell who it is costs a flush with each new
        connection."""
        if not self.has_cache and not self.kind.proves_instance:
            self.guest.excuses.begin("flush")

    # The bridge.

    def bridge_options(self) -> list[str]:
        """Of `serve`."""
        profile = self.profile
        options = ["--cache-mode", profile.cache, "--engine", profile.engine]
        options += ["--num-queues", str(profile.queues), "--connections", str(profile.connections)]
        options += ["--request-timeout", str(REQUEST_TIMEOUT_S), "--wait-for-server"]
        options += ["--log-level", "warning", "--slow-ms", "0", "--api", str(self.control)]
        options += ["--stop-timeout", "300", "--drain-timeout", "300"]
        if self.has_cache:
            options += ["--cache-dir", str(self.cache.path)]
            options += ["--cache-size", str(profile.cache_bytes), "--flush-interval", "5"]
        return options

    def start_bridge(self) -> None:
        """Start it; the guest finds it once it listens."""
        argv = bridge_argv(
            "serve", self.uri, "--socket-path", str(self.vhost), *self.bridge_options()
        )
        if self.profile.bug:
            argv[argv.index("bridge")] = "tests.torture.planted"
            self._environment["TORTURE_PLANTED_BUG"] = self.profile.bug
        self.bridge.start(argv, self._environment)
        self.guest.bridge_begins()

    async def kill_bridge(self) -> None:
        """SIGKILL."""
        self.begin_flush_excuse()
        if self.bridge.runs:
            self.tally.kills["bridge"] += 1
        await self.bridge.kill()

    # The connection.

    def cut(self) -> None:
        """Reset all connections of the proxy's."""
        assert self.proxy is not None
        self.begin_flush_excuse()
        self.proxy.cut()

    # What faults do with it.

    async def sleep(self, least_s: float, most_s: float) -> None:
        """A random time."""
        await trio.sleep(self.rng.uniform(least_s, most_s))

    async def recovers(self) -> None:
        """Wait until the guest can flush again."""
        await self.guest.recovers()
