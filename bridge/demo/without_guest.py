"""The demo's stand-in for a virtual machine: our own vhost-user front-end plays the guest."""

from __future__ import annotations

import random
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import trio

from bridge.demo.report import GuestReport
from bridge.demo.unwrap import unwrapped
from bridge.demo.virtual_machine import Checkpoint
from bridge.errors import BridgeError
from bridge.peers.blk_driver import BlkDriver

CHUNK_BYTES = 1 << 20
_TASKS = 8
_REQUEST_BYTES = 256 << 10


_BASE = random.Random(0).randbytes(CHUNK_BYTES)


def pattern(chunk: int) -> bytes:
    """The data that is written to the disk's chunk number `chunk`.

    No two chunks have the same block at the same place; making one takes two copies.
    """
    turn = (chunk + 1) * 4099 % CHUNK_BYTES
    return _BASE[turn:] + _BASE[:turn]


async def run_without_guest(
    socket_path: Path, total_mib: int = 200, *, checkpoint: Checkpoint | None = None
) -> GuestReport:
    """Write, flush, read back, discard the second half and verify the first, through the socket.

    The report has the real guest's keys where they apply. `written_chunks`: the number of chunks
    that still have their `pattern`. Checkpoints: `written` and `trimmed`.
    """
    report = GuestReport()
    began_s = time.monotonic()
    try:
        async with await BlkDriver.connect(socket_path, request_bytes=_REQUEST_BYTES) as guest:
            await _Workout(guest, report, total_mib, checkpoint).run()
        report.passed = not report.reason
    except (BridgeError, OSError) as error:
        report.reason = f"the front-end: {error}"
    report.elapsed_s = time.monotonic() - began_s
    return report


class _Workout:
    def __init__(
        self, guest: BlkDriver, report: GuestReport, chunks: int, checkpoint: Checkpoint | None
    ) -> None:
        self.guest = guest
        self.report = report
        self.chunks = min(chunks, guest.size_bytes // CHUNK_BYTES)
        self.checkpoint = checkpoint

    async def run(self) -> None:
        values = self.report.values
        values["sectors"] = str(self.guest.config.capacity_sectors)
        values["serial"] = await self.guest.get_id()
        kept = self.chunks // 2
        await self._timed("write", self.chunks, self._write)
        await self._timed("read", self.chunks, self._verify)
        await self._reached("written")
        await self.guest.discard([(kept * CHUNK_BYTES, (self.chunks - kept) * CHUNK_BYTES)])
        await self.guest.flush()
        await self._reached("trimmed")
        await self._for_each(kept, self._verify)
        values["written_chunks"] = str(kept)

    async def _reached(self, name: str) -> None:
        if self.checkpoint is not None:
            await self.checkpoint(name)

    async def _timed(
        self, name: str, chunks: int, action: Callable[[int], Awaitable[None]]
    ) -> None:
        began_s = time.monotonic()
        await self._for_each(chunks, action)
        if name == "write":
            await self.guest.flush()
        elapsed_s = time.monotonic() - began_s
        self.report.values[f"{name}_ms"] = f"{elapsed_s * 1000:.0f}"
        mib = chunks * CHUNK_BYTES / (1 << 20)
        self.report.values[f"{name}_mib_s"] = f"{mib / elapsed_s:.0f}"

    async def _for_each(self, chunks: int, action: Callable[[int], Awaitable[None]]) -> None:
        """Call `action(chunk)` for every chunk, a few at a time."""
        numbers = iter(range(chunks))

        async def work() -> None:
            for chunk in numbers:
                await action(chunk)

        with unwrapped():
            async with trio.open_nursery() as nursery:
                for _ in range(_TASKS):
                    nursery.start_soon(work)

    async def _write(self, chunk: int) -> None:
        await self.guest.write(chunk * CHUNK_BYTES, pattern(chunk))

    async def _verify(self, chunk: int) -> None:
        found = await self.guest.read(chunk * CHUNK_BYTES, CHUNK_BYTES)
        if found != pattern(chunk):
            self.report.reason = self.report.reason or f"MiB {chunk} of the disk reads wrong"
