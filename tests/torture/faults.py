"""What breaks: each fault is a function that breaks something of a disk and mends it again.

Which requests may fail for it, it says in the guest's excuses before it begins; everything else
that fails is a find.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import trio

from tests.sim.oracle import Violation
from tests.torture.bridge_faults import (
    bridge_told_to_stop,
    bridge_upgraded,
    cache_disk_full,
    cache_disk_full_at_first_start,
    clock_jumps,
    memory_limited,
    memory_taken,
)
from tests.torture.disk import REQUEST_TIMEOUT_S, Disk
from tests.torture.front_ends import LIBBLKIO
from tests.torture.processes import Program
from tests.torture.servers import ERROR_FILTER, FILTERS

ALL_KINDS = ("read", "write", "zeroes", "discard", "flush")
_REFILL_S = 0.2
_LONG = 0.08
"""How often an outage outlasts the request timeout."""


def _always(disk: Disk) -> bool:
    return True


@dataclass(frozen=True)
class Fault:
    """One kind of fault."""

    name: str
    happen: Callable[[Disk], Awaitable[None]]
    weight: float = 1.0
    applies: Callable[[Disk], bool] = _always
    alone: bool = False
    """Nothing else may happen to the disk before it has recovered."""


async def _outage(disk: Disk) -> None:
    if disk.rng.random() < _LONG:
        await disk.sleep(REQUEST_TIMEOUT_S + 1, REQUEST_TIMEOUT_S + 5)
    else:
        await disk.sleep(0.1, 2.5)


# Kills.


async def server_killed(disk: Disk) -> None:
    """SIGKILL of the server, which may be away for a while."""
    await disk.kill_server()
    if disk.rng.random() < 0.3:
        await disk.sleep(0, 2)
    disk.start_server()


async def bridge_killed(disk: Disk) -> None:
    """SIGKILL of the bridge."""
    await disk.kill_bridge()
    disk.start_bridge()


async def bridge_killed_again(disk: Disk) -> None:
    """SIGKILL of bridges that have hardly begun."""
    for _ in range(3):
        await disk.kill_bridge()
        disk.start_bridge()
        await disk.sleep(0, 1.5)


async def both_killed(disk: Disk) -> None:
    """SIGKILL of both; the image is looked at while nobody can change it."""
    first, second = disk.kill_bridge, disk.kill_server
    if disk.rng.random() < 0.5:
        first, second = second, first
    await first()
    await second()
    if disk.kind.loses_unflushed:
        disk.oracle.loss_unnoticed()
    await disk.oracle.judge_frozen_image("server and bridge were killed")
    starts = [disk.start_server, disk.start_bridge]
    disk.rng.shuffle(starts)
    for start in starts:
        start()


async def host_gone(disk: Disk) -> None:
    """The bridge's host loses power with its guest; only the server's image is left."""
    await disk.kill_bridge()
    await disk.kill_server()
    disk.guest.hold()
    try:
        await disk.guest.reset()
        await disk.oracle.judge_frozen_image("the host has lost power")
        await disk.oracle.restart_from_image()
        for file in disk.cache.path.iterdir():
            file.unlink()
    finally:
        disk.guest.release()
    disk.start_server()
    disk.start_bridge()


# Pauses.


@contextmanager
def _paused(program: Program) -> Iterator[None]:
    """It may be killed meanwhile."""
    program.pause()
    try:
        yield
    finally:
        with suppress(RuntimeError, ProcessLookupError):
            program.resume()


async def server_stopped(disk: Disk) -> None:
    """SIGSTOP of the server."""
    disk.begin_flush_excuse()
    with _paused(disk.server):
        await _outage(disk)


async def bridge_stopped(disk: Disk) -> None:
    """SIGSTOP of the bridge."""
    disk.begin_flush_excuse()
    with _paused(disk.bridge):
        await _outage(disk)


async def bridge_killed_server_stopped(disk: Disk) -> None:
    """The bridge dies with writes in flight, which the server executes later."""
    with _paused(disk.server):
        await disk.sleep(0.1, 1)
        await disk.kill_bridge()
        disk.start_bridge()
        await disk.sleep(0, 1.5)


# The network.


async def connections_cut(disk: Disk) -> None:
    """Every connection is reset, once or several times."""
    for _ in range(disk.rng.choice((1, 1, 1, 4))):
        disk.cut()
        await disk.sleep(0, 0.6)


async def connections_swallowed(disk: Disk) -> None:
    """Nothing arrives, and no connection ends; perhaps they are cut in the end."""
    assert disk.proxy is not None
    disk.begin_flush_excuse()
    disk.proxy.swallow()
    try:
        await _outage(disk)
        if disk.rng.random() < 0.5:
            disk.cut()
    finally:
        disk.proxy.flow()


async def connections_refused(disk: Disk) -> None:
    """No connection is accepted any more."""
    assert disk.proxy is not None
    disk.proxy.refuses = True
    try:
        disk.cut()
        await disk.sleep(0.1, 3)
    finally:
        disk.proxy.refuses = False


# The server's filters and disk.


async def server_slow(disk: Disk) -> None:
    """nbdkit delays or limits what it does."""
    name = disk.rng.choice(sorted(FILTERS))
    await disk.kill_server()
    disk.start_server([FILTERS[name]])
    await disk.sleep(1, 5)
    await disk.kill_server()
    disk.start_server()


async def server_fails(disk: Disk) -> None:
    """nbdkit fails one request in so many: reads, writes and flushes."""
    disk.guest.excuses.begin(*ALL_KINDS)
    await disk.kill_server()
    disk.start_server([ERROR_FILTER])
    await disk.sleep(1, 5)
    await disk.kill_server()
    disk.start_server()


async def storage_full(disk: Disk) -> None:
    """The server's disk has no room, and what is discarded there is taken at once."""
    disk.guest.excuses.begin(*ALL_KINDS)
    try:
        with trio.move_on_after(disk.rng.uniform(1, 4)):
            while True:
                disk.storage.fill()
                await trio.sleep(_REFILL_S)
        if disk.rng.random() < 0.3:
            await disk.kill_server()
            disk.start_server()
            await disk.sleep(0.2, 1)
    finally:
        disk.storage.empty()


async def osd_killed(disk: Disk) -> None:
    """SIGKILL of Ceph's storage daemon, which is away for a while."""
    cluster = disk.profile.cluster
    assert cluster is not None
    disk.tally.kills["OSD"] += 1
    await trio.to_thread.run_sync(cluster.kill_osd)
    await disk.sleep(0, 5)
    await trio.to_thread.run_sync(cluster.start_osd)


# The guest.


async def guest_reset(disk: Disk) -> None:
    """The guest goes with requests in flight, and another one comes."""
    await disk.guest.reset()
    await disk.sleep(0, 0.5)


async def guest_pauses(disk: Disk) -> None:
    """All rings are stopped, with requests in flight, and started again."""

    async def paused() -> None:
        await disk.oracle.judge_stopped("the guest's stop was answered")

    await disk.recovers()
    if not await disk.guest.pause(paused):
        raise Violation(f"disk {disk.number}: a stop of the guest's was not answered")


def _has_proxy(disk: Disk) -> bool:
    return disk.proxy is not None


def _has_filters(disk: Disk) -> bool:
    return disk.kind.has_filters


def _has_ceph(disk: Disk) -> bool:
    return disk.profile.cluster is not None


def _has_image(disk: Disk) -> bool:
    return disk.profile.cluster is None


def _may_fail(disk: Disk) -> bool:
    """Through a filter that may change what clients see our plugin does not tell who wrote. Without
    it again, what the bridge wrote meanwhile looks like another host's, and dirty data is kept
    back, as it should be."""
    return disk.kind.has_filters and not (disk.kind.counts_writers and disk.has_cache)


def _small_storage(disk: Disk) -> bool:
    return disk.storage.can_be_filled


def _small_cache(disk: Disk) -> bool:
    return disk.cache.can_be_filled and disk.has_cache


def _cache_on_disk(disk: Disk) -> bool:
    """A tmpfs has nowhere to put what is taken."""
    return disk.has_cache and not disk.cache.can_be_filled


def _can_pause(disk: Disk) -> bool:
    return disk.profile.client != LIBBLKIO


def _needs_no_recovery(disk: Disk) -> bool:
    return not disk.has_to_recover


def _has_limits(disk: Disk) -> bool:
    return disk.bridge.group is not None


def _has_clock(disk: Disk) -> bool:
    return disk.clock is not None


_FIRST_START = "cache's disk full at the first start"
FAULTS = (
    Fault("server killed", server_killed, 3),
    Fault("bridge killed", bridge_killed, 3),
    Fault("bridge killed again and again", bridge_killed_again, 1, _needs_no_recovery),
    Fault("both killed", both_killed, 2, alone=True),
    Fault("host lost power", host_gone, 1, _has_image, alone=True),
    Fault("server stopped for a while", server_stopped),
    Fault("bridge stopped for a while", bridge_stopped),
    Fault("bridge killed, server stopped", bridge_killed_server_stopped),
    Fault("connections cut", connections_cut, 3, _has_proxy),
    Fault("connections swallowed", connections_swallowed, 2, _has_proxy),
    Fault("connections refused", connections_refused, 1, _has_proxy),
    Fault("server slow", server_slow, 1, _has_filters),
    Fault("server fails requests", server_fails, 1, _may_fail, alone=True),
    Fault("OSD killed", osd_killed, 2, _has_ceph, alone=True),
    Fault("storage full", storage_full, 1, _small_storage, alone=True),
    # Before each of them there has to be a cache file, so that only the one removes it.
    Fault("cache's disk full", cache_disk_full, 1, _small_cache, alone=True),
    Fault(_FIRST_START, cache_disk_full_at_first_start, 1, _small_cache, alone=True),
    Fault("bridge told to stop", bridge_told_to_stop),
    Fault("bridge upgraded", bridge_upgraded),
    Fault("clock jumps", clock_jumps, 1, _has_clock),
    Fault("memory taken away", memory_taken, 1, _cache_on_disk),
    Fault("memory limited", memory_limited, 1, _has_limits, alone=True),
    Fault("guest reset", guest_reset, 1, alone=True),
    Fault("guest pauses", guest_pauses, 1, _can_pause, alone=True),
)


def draw(disk: Disk) -> Fault:
    """The next fault of a disk, drawn from its dice."""
    possible = [fault for fault in FAULTS if fault.applies(disk)]
    (chosen,) = disk.rng.choices(possible, [fault.weight for fault in possible])
    return chosen
