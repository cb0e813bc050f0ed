"""A guest with little memory and requests as long and as many as it can name, on a real bridge.

1024-entry indirect tables whose descriptors all name the same buffer: up to 4 GiB per request,
1024 of them in each of four rings.
"""

from __future__ import annotations

import os
import signal
import struct
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from bridge.guest.vhost_user.messages import F_PROTOCOL_FEATURES, MessageType
from bridge.peers.blk_driver import FEATURES, PROTOCOL_FEATURES
from bridge.peers.frontend import FrontEnd
from bridge.peers.shared_memory import SharedMemory
from bridge.peers.split_driver import SplitDriver, write_chain
from bridge.spec.virtio_blk import T_DISCARD, T_IN, T_OUT
from bridge.spec.virtqueue import DESC_INDIRECT, DESC_WRITE
from tests.processes import bridge_argv, pause, process, unix_uri, wait_for
from tests.tools import HUNG_S, need

QUEUES = 4
QUEUE_SIZE = 1024
MEMORY_BYTES = 64 << 20
DATA = 4 << 20
"""Where the one buffer is that everything names; rings, headers and tables come before."""

ALLOWED_BYTES = (192 + 3 * 8) << 20
"""What the README promises: 192 MiB, and 8 MiB for each queue after the first."""


class Flood:
    """The front-end and the guest behind it."""

    def __init__(self, front_end: FrontEnd) -> None:
        self.front_end = front_end
        self.memory = SharedMemory()
        self.base = 1 << 32
        self.region = self.memory.add(MEMORY_BYTES, guest_address=self.base)
        self.drivers: list[SplitDriver] = []
        self.fds: list[int] = []

    async def start(self) -> None:
        front_end = self.front_end
        await front_end.negotiate(FEATURES | F_PROTOCOL_FEATURES, PROTOCOL_FEATURES)
        await front_end.set_features()
        await front_end.set_memory([(self.region.region, self.region.fd)])
        for index in range(QUEUES):
            at = self.memory.allocate(SplitDriver.area_bytes(QUEUE_SIZE), align=4096)
            area = self.memory.view(at, SplitDriver.area_bytes(QUEUE_SIZE))
            driver = SplitDriver(area, size=QUEUE_SIZE, event_idx=False)
            self.drivers.append(driver)
            kick, call = os.eventfd(0, os.EFD_NONBLOCK), os.eventfd(0, os.EFD_NONBLOCK)
            self.fds += [kick, call]
            user = self.memory.user_address(at)
            await front_end.set_ring(
                index,
                size=QUEUE_SIZE,
                base=0,
                desc=user,
                avail=user + driver.avail_offset,
                used=user + driver.used_offset,
                kick_fd=kick,
                call_fd=call,
            )
            await front_end.enable_ring(index)

    def table(self, type_: int, lengths: list[int]) -> tuple[int, int, int]:
        """An indirect table; the descriptor that names it."""
        header = self.put(struct.pack("<IIQ", type_, 0, 0))
        status = self.memory.allocate(1)
        flags = DESC_WRITE if type_ == T_IN else 0
        data = [(self.base + DATA, length, flags) for length in lengths]
        chain = [(header, 16, 0), *data, (status, 1, DESC_WRITE)]
        at = self.memory.allocate(16 * len(chain))
        write_chain(self.memory.view(at, 16 * len(chain)), chain)
        return at, 16 * len(chain), DESC_INDIRECT

    def put(self, content: bytes) -> int:
        at = self.memory.allocate(len(content))
        self.memory.view(at, len(content))[:] = content
        return at

    def fill_rings(self, *tables: tuple[int, int, int]) -> None:
        for driver in self.drivers:
            for token in range(QUEUE_SIZE):
                driver.add(token, [tables[token % len(tables)]])
            driver.publish()
        for kick in self.fds[::2]:
            os.eventfd_write(kick, 1)

    async def most_bytes(self, bridge: subprocess.Popen[bytes]) -> int:
        """The most memory that `bridge` had while it answered 60 messages."""
        found = 0
        for _ in range(60):
            await self.front_end.get_u64(MessageType.GET_FEATURES)
            found = max(found, anonymous_bytes(bridge.pid))
            await trio.sleep(0.02)
        return found

    def close(self) -> None:
        self.front_end.close()
        for fd in self.fds:
            os.close(fd)
        self.drivers.clear()
        self.memory.close()


def anonymous_bytes(pid: int) -> int:
    """Memory of the process's own: neither the guest's nor the cache file's."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no RssAnon")


@asynccontextmanager
async def flooded(
    directory: Path, cache: str
) -> AsyncIterator[tuple[subprocess.Popen[bytes], subprocess.Popen[bytes], Flood]]:
    """The bridge, its server, and a front-end with rings that wait to be filled."""
    nbd, vhost = directory / "nbd", directory / "vhost"
    server = [need("nbdkit"), "-f", "-U", str(nbd), "memory", "8G"]
    argv = bridge_argv(
        *("serve", unix_uri(nbd), "--socket-path", str(vhost), "--cache-mode", cache),
        *("--cache-dir", str(directory), "--cache-size", "64M", "--num-queues", str(QUEUES)),
        *("--stop-timeout", "4"),
    )
    async with process(server, ready=nbd) as peer, process(argv, ready=vhost) as bridge:
        flood = Flood(await FrontEnd.connect(vhost))
        try:
            await flood.start()
            yield bridge, peer, flood
        finally:
            flood.close()


LONG = 1022 * [1 << 20]
LONGER = 1022 * [(4 << 20) - 4096]


@pytest.mark.parametrize(
    ("cache", "type_", "lengths"),
    [
        pytest.param("off", T_IN, [LONG], id="reads of 1 GiB"),
        pytest.param("writeback", T_IN, [LONG], id="reads of 1 GiB, cached"),
        pytest.param("writeback", T_OUT, [LONG], id="writes of 1 GiB, cached"),
        pytest.param("off", T_IN, [LONGER], id="reads of 4 GiB"),
        pytest.param("writeback", T_OUT, [[2048] * 1022], id="writes in pieces of 2 KiB, cached"),
    ],
)
async def test_process_stays_small_answers_and_stops(
    directory: Path, cache: str, type_: int, lengths: list[list[int]]
) -> None:
    async with flooded(directory, cache) as (bridge, _, flood):
        flood.fill_rings(*[flood.table(type_, each) for each in lengths])
        assert await flood.most_bytes(bridge) < ALLOWED_BYTES
        bridge.send_signal(signal.SIGTERM)
        await wait_for(bridge, limit_s=HUNG_S)


@pytest.mark.parametrize(
    ("cache", "type_", "lengths"),
    [
        pytest.param("off", T_OUT, [LONG], id="writes of 1 GiB"),
        pytest.param("off", T_IN, [[512] * 31], id="small reads in many pieces"),
        pytest.param("writeback", T_IN, [[65536] * 30], id="reads of 2 MiB, cached"),
        pytest.param("writeback", T_OUT, [[512] * 31], id="small writes in many pieces, cached"),
        pytest.param("writeback", T_DISCARD, [[32 * 16]], id="discards, cached"),
    ],
)
async def test_process_stays_small_while_the_server_answers_nothing(
    directory: Path, cache: str, type_: int, lengths: list[list[int]]
) -> None:
    """Everything that a guest can begin is in flight or waits."""
    async with flooded(directory, cache) as (bridge, server, flood):
        segments = b"".join(struct.pack("<QII", 2048 * at, 2048, 0) for at in range(32))
        flood.memory.view(flood.base + DATA, len(segments))[:] = segments
        pause(server)
        try:
            flood.fill_rings(*[flood.table(type_, each) for each in lengths])
            assert await flood.most_bytes(bridge) < ALLOWED_BYTES
            bridge.send_signal(signal.SIGTERM)
            await wait_for(bridge, limit_s=HUNG_S)
        finally:
            server.send_signal(signal.SIGCONT)
