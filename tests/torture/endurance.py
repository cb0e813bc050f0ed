"""A compressed week: what a bridge does in a week of reconnects and of a cache that turns over, in
minutes. Its memory and its descriptors have to be flat, and those of the plugin's nbdkit.

A week with a reconnect every five minutes has 2016 of them; with a guest that restarts once an hour
168 restarts; and a small cache whose whole content is replaced twice an hour is turned over 336
times. `WEEK` has these numbers.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import trio

from tests.processes import short_directory
from tests.torture.campaign import Campaign, Plan
from tests.torture.disk import MIB, Disk, Profile
from tests.torture.tally import Tally

LARGEST_GROWTH_BYTES = 1 * MIB
"""From the second quarter to the last one, comparing the smallest sample of each: what leaks is
not given back, and what is only in use for a while is no leak. Between the quarters are half of the
events: a week's 1008 reconnects, and 168 turns of 4 MiB, which are 172,000 blocks. So a kilobyte
that leaks with each reconnect is found, and seven bytes for each block. A smaller bound would find
what the allocator does: a thread's arena, and the fragments of a burst."""
_RECONNECTS_PER_GUEST = 12
"""After so many the guest goes and another one comes: an hour of five minutes each."""

PROFILES = (
    Profile("plugin", "writeback", proxied=True, cache_bytes=4 * MIB),
    Profile("plugin", "off", proxied=True, connections=2),
    Profile("plugin", "writethrough", engine="pure", proxied=True, cache_bytes=4 * MIB),
)


@dataclass(frozen=True)
class Load:
    """What each disk has to go through."""

    reconnects: int
    turns: int
    """How often as much as the cache holds has come from the server."""
    samples: int = 48
    """A quarter of them, the first, is for warming up."""


WEEK = Load(reconnects=2016, turns=336)


@dataclass(frozen=True)
class Sample:
    """A process while its guest is still. `rss_bytes` is to look at: it has the cache's map."""

    anonymous_bytes: int
    rss_bytes: int
    descriptors: int

    def __str__(self) -> str:
        return (
            f"{self.anonymous_bytes / MIB:.2f} MiB of its own, RSS {self.rss_bytes / MIB:.1f} MiB, "
            f"{self.descriptors} descriptors"
        )


def sample(pid: int) -> Sample:
    """Of a process that lives. PSS without what comes from files: the guest's memory is one."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    values = {
        name: int(rest.split()[0]) * 1024 for name, _, rest in (x.partition(":") for x in lines)
    }
    return Sample(values["Pss_Anon"], values["Rss"], len(os.listdir(f"/proc/{pid}/fd")))


def judge(name: str, samples: Sequence[Sample]) -> list[str]:
    """What is not flat."""
    quarter = len(samples) // 4
    if not quarter:
        return [f"{name}: {len(samples)} samples are too few"]
    early, late = samples[quarter : 2 * quarter], samples[-quarter:]
    found = []
    growth = min(s.anonymous_bytes for s in late) - min(s.anonymous_bytes for s in early)
    if growth > LARGEST_GROWTH_BYTES:
        found.append(f"{name}: its memory has grown by {growth / MIB:.2f} MiB: {late[-1]}")
    more = min(s.descriptors for s in late) - min(s.descriptors for s in early)
    if more > 0:
        found.append(f"{name}: it has {more} descriptors more: {late[-1]}")
    return found


class Endurance(Campaign):
    """A campaign in which nothing is killed, and everything is repeated."""

    def __init__(self, plan: Plan, load: Load, folder: Path, say: Callable[[str], None]) -> None:
        super().__init__(plan, folder, say)
        self._load = load
        self.samples: dict[str, list[Sample]] = {}

    async def _break(self, disk: Disk) -> None:
        """Reconnects and turns, evenly, with samples between."""
        assert disk.proxy is not None
        load = self._load
        for number in range(1, load.samples + 1):
            while disk.proxy.cuts < number * load.reconnects // load.samples:
                await self._reconnect(disk)
                if disk.proxy.cuts % _RECONNECTS_PER_GUEST == 0:
                    await disk.guest.reset()
                    self.tally.faults["guest reset"] += 1
            while disk.proxy.from_server_bytes < self._bytes(disk) * number // load.samples:
                await disk.recovers()
            await self._sample(disk)

    def _bytes(self, disk: Disk) -> int:
        return self._load.turns * disk.profile.cache_bytes if disk.has_cache else 0

    async def _reconnect(self, disk: Disk) -> None:
        disk.cut()
        self.tally.faults["connections cut"] += 1
        await disk.recovers()

    async def _sample(self, disk: Disk) -> None:
        await disk.recovers()
        disk.guest.hold()
        await disk.guest.all_answered()
        await disk.guest.flush_once()
        for program in (disk.bridge, disk.server):
            name = f"disk {disk.number} ({disk.profile}), {program.name}"
            self.samples.setdefault(name, []).append(sample(program.pid))
        disk.guest.release()

    def _judge(self) -> None:
        if not self.tally.verified_bytes:
            self.tally.problems.append("nothing was verified")
        for name, samples in self.samples.items():
            self._say(f"{name}: at first {samples[0]}; at last {samples[-1]}")
            self.tally.problems += judge(name, samples)
        for disk in self.disks:
            assert disk.proxy is not None
            turns = disk.proxy.from_server_bytes / disk.profile.cache_bytes
            self._say(
                f"disk {disk.number}: {disk.proxy.cuts} reconnects, {disk.guest.boots} guests, "
                f"{disk.proxy.from_server_bytes / 1e9:.2f} GB from the server"
                + (f", {turns:.0f} turns of the cache" if disk.has_cache else "")
            )


def run(plan: Plan, load: Load, say: Callable[[str], None]) -> Tally:
    """One compressed week, or as much of it as `load` says."""
    with short_directory() as folder:
        return trio.run(Endurance(plan, load, folder, say).run)
