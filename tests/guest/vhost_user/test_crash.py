"""The back-end is killed between two lines of the data path; nothing is lost, nothing is answered
twice (rule `inflight`, the crash matrix).

    python -m tests.guest.vhost_user.test_crash          every line, all kinds of ring
    python -m tests.guest.vhost_user.test_crash 10       every tenth
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import cast

import pytest
import trio

from bridge.peers.blk_driver import FEATURES, PACKED_FEATURES, BlkDriver
from bridge.spec.virtio_blk import S_OK, T_FLUSH, T_IN, T_OUT
from tests.guest.vhost_user.crashing import Zygote
from tests.tools import HUNG_S

KINDS = [
    pytest.param(FEATURES, "", id="split, answered at once"),
    pytest.param(FEATURES, "late", id="split, answered late"),
    pytest.param(FEATURES, "sent", id="split, the usual way to a server"),
    pytest.param(FEATURES, "sent late", id="split, the usual way to a server, answered late"),
    pytest.param(FEATURES, "hits", id="split, the usual way from a cache"),
    pytest.param(PACKED_FEATURES, "", id="packed, answered at once"),
    pytest.param(PACKED_FEATURES, "late", id="packed, answered late"),
]


@pytest.fixture
def zygote(directory: Path) -> Iterator[Zygote]:
    """A maker of back-ends."""
    zygote = Zygote(directory)
    yield zygote
    zygote.close()


class Workload:
    """Requests on two queues, and what must come of them."""

    def __init__(self, guest: BlkDriver, model: bytearray) -> None:
        self.guest = guest
        self.model = model
        self.reads: dict[tuple[int, int], bytes] = {}
        self.expected = 0
        self.completed = 0

    def submit(self, fill: int) -> None:
        """A batch per queue: writes, a read of what no write touches, a flush."""
        for queue in self.guest.queues:
            start = queue.index * 128
            for number in range(3):
                data = bytes([fill + number]) * 1024
                sector = start + number * 2
                queue.submit(T_OUT, sector, 1024, data)
                self.model[sector * 512 : sector * 512 + 1024] = data
            sector = start + 64
            slot = queue.submit(T_IN, sector, 512)
            self.reads[queue.index, slot] = bytes(self.model[sector * 512 : sector * 512 + 512])
            queue.submit(T_FLUSH)
            self.expected += 5
            queue.kick()

    def overwrite(self, fill: int) -> None:
        """Several writes to one place, in one batch: executed again, their order must stay."""
        queue = self.guest.queues[0]
        for number in range(4):
            data = bytes([fill + number]) * 512
            queue.submit(T_OUT, 100, 512, data)
            self.model[51200:51712] = data
            self.expected += 1
        queue.kick()

    def collect(self) -> None:
        """Take completions; each must be good, and the only one of its request."""
        for queue in self.guest.queues:
            for slot, status in queue.poll():  # raises for one that comes twice
                assert status == S_OK
                self.completed += 1
                wanted = self.reads.pop((queue.index, slot), None)
                if wanted is not None:
                    assert queue.data(slot, 512) == wanted

    async def finish(self, zygote: Zygote) -> bool:
        """Wait until everything is complete (True), or the back-end dead (False)."""
        with trio.fail_after(HUNG_S):
            while self.completed < self.expected:
                self.collect()
                if zygote.is_dead:
                    self.collect()
                    return self.completed == self.expected
                await trio.sleep(0.0005)
        return True


async def crash_at(zygote: Zygote, *, features: int, how: str, kill_at: int) -> int:
    """One life and death; the number of lines that were executed until the end of it."""
    zygote.start(how=how, kill_at=kill_at)
    model = bytearray(zygote.image[:])
    guest = BlkDriver(
        zygote.path,
        num_queues=2,
        depth=16,
        request_bytes=4096,
        features=features,
        inflight=True,
    )
    try:
        await guest.start()
        work = Workload(guest, model)
        work.submit(1)
        assert await work.finish(zygote)
        zygote.control.arm()
        work.submit(10)
        if "late" not in how:
            work.overwrite(100)
        await work.finish(zygote)
        lines = zygote.control.lines
        zygote.kill()
        zygote.start(how=how, kill_at=0)
        await guest.reconnect()
        assert await work.finish(zygote)
        # The new back-end goes on with new requests, too, and repeats nothing.
        work.submit(30)
        assert await work.finish(zygote)
        await guest.stop()
        work.collect()
        assert work.completed == work.expected
        assert zygote.image[:] == model
        assert all(queue.driver.in_flight == 0 for queue in guest.queues)
        return lines
    finally:
        guest.close()
        zygote.kill()


@pytest.mark.slow
@pytest.mark.parametrize(("features", "how"), KINDS)
async def test_back_end_killed_at_any_step_loses_and_repeats_nothing(
    zygote: Zygote, features: int, how: str
) -> None:
    lines = await crash_at(zygote, features=features, how=how, kill_at=0)
    assert lines > 100
    for kill_at in range(1, lines, max(1, lines // 25)):
        await crash_at(zygote, features=features, how=how, kill_at=kill_at)


async def every_line(zygote: Zygote, *, step: int) -> int:
    """The whole matrix; how many deaths it had."""
    deaths = 0
    kinds = [each.values for each in KINDS]
    for features, how in cast(list[tuple[int, str]], kinds):
        lines = await crash_at(zygote, features=features, how=how, kill_at=0)
        for kill_at in range(1, lines + 1, step):
            try:
                await crash_at(zygote, features=features, how=how, kill_at=kill_at)
            except BaseException as error:
                error.add_note(f"{features=:#x} {how=} {kill_at=} of {lines}")
                raise
            deaths += 1
        print(
            f"features {features:#x}, {how}: killed at every {step}. of {lines} lines",
            flush=True,
        )
    return deaths


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(prefix="vu", dir="/tmp") as name:
        maker = Zygote(Path(name))
        try:
            stride = int(sys.argv[1]) if len(sys.argv) > 1 else 1
            deaths = trio.run(partial(every_line, maker, step=stride))
            print(f"{deaths} deaths, nothing lost, nothing twice")
        finally:
            maker.close()
