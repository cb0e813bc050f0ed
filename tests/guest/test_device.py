"""The device: rings, memory, draining, recovery, migration.

Rules `malformed`, `notify`, `session`, `inflight`, `dirty_log` of docs/rules/virtio.md.
"""

from __future__ import annotations

import gc
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from errno import EIO
from pathlib import Path
from typing import Any

import pytest
import trio
from structlog.testing import capture_logs
from trio.testing import MockClock

from bridge.datapath.request import FLUSH, INTERNAL, READ, REPEATED, WRITE, Request
from bridge.errors import LeftBehind, ProtocolError
from bridge.guest.eventfds import EventfdWriter
from bridge.guest.vhost_user.device_interface import MemoryRegion
from bridge.guest.virtio.inflight import InflightRegion, queue_region_bytes
from bridge.guest.virtio.long_chains import MAX_LONG_VIEWS
from bridge.spec.virtio_blk import (
    F_CONFIG_WCE,
    F_FLUSH,
    S_IOERR,
    S_OK,
    T_FLUSH,
    T_GET_ID,
    T_IN,
    T_OUT,
)
from bridge.spec.virtqueue import F_VERSION_1
from tests.guest.device_guest import (
    MEMORY_BYTES,
    USER_BASE,
    DeviceGuest,
    GuestRing,
    PendingRequest,
    a_while,
    running_device,
    signals,
    until,
)
from tests.guest.virtio.mock import FakeDisk
from tests.turns import submit


@pytest.fixture(params=[False, True], ids=["split", "packed"])
async def guest(request: pytest.FixtureRequest) -> AsyncIterator[DeviceGuest]:
    """A connected device without a ring, for either kind of ring."""
    async with running_device(packed=request.param, drain_timeout_s=30) as running:
        await running.connect()
        yield running


# The ordinary way


async def test_requests_are_served_after_a_kick(guest: DeviceGuest) -> None:
    guest.start()
    assert await guest.request(T_OUT, 4, out=b"w" * 1024) == (S_OK, b"")
    assert await guest.request(T_IN, 4, room=1024) == (S_OK, b"w" * 1024)
    assert await guest.request(T_FLUSH) == (S_OK, b"")


async def test_requests_that_wait_at_the_start_are_served_without_a_kick(
    guest: DeviceGuest,
) -> None:
    """A kick may have been consumed before (rust-vmm/vhost#247, #343)."""
    guest.make_ring()
    pending = guest.put(T_GET_ID, room=20)
    guest.start()
    await until(lambda: pending.status == S_OK)


async def test_notify_start_calls_once_in_case_a_call_was_lost(guest: DeviceGuest) -> None:
    """SPDK dbe47004e5 (#3150)."""
    ring = guest.start()
    assert ring.calls() == 1


async def test_notify_new_call_descriptor_is_signalled_at_once(guest: DeviceGuest) -> None:
    guest.start()
    fd = os.eventfd(0, os.EFD_NONBLOCK)
    guest.device.set_call(0, fd)
    assert signals(fd) == 1
    guest.device.set_call(0, None)
    await guest.request(T_FLUSH)
    assert signals(fd) == 0
    os.close(fd)


async def test_notify_completion_calls_the_driver(guest: DeviceGuest) -> None:
    ring = guest.start()
    ring.calls()
    await guest.request(T_FLUSH)
    assert ring.calls() == 1


async def test_notify_batch_calls_once(guest: DeviceGuest) -> None:
    ring = guest.start()
    ring.calls()
    last = [guest.put(T_FLUSH) for _ in range(5)][-1]
    ring.kick_device()
    await until(lambda: last.status == S_OK)
    await a_while()
    assert ring.calls() == 1


@pytest.mark.parametrize("event_idx", [False, True])
async def test_no_kick_is_lost_however_it_falls_in_the_loops_turn(event_idx: bool) -> None:
    """`ring_barriers`, `ring_rearm`: a driver that kicks only when asked to, again and again.

    The loop falls asleep between requests each time; a lost kick would stop everything.
    """
    async with running_device(event_idx=event_idx) as guest:
        await guest.connect()
        ring = guest.start()
        for number in range(300):
            guest._next = 0x100000
            guest._token += 1
            header = guest.alloc(bytes([4] + [0] * 15))
            status = guest.alloc(b"\xee")
            ring.driver.add(guest._token, [(header, 16, 0), (status, 1, 2)])
            if ring.driver.publish():
                ring.kick_device()
            for _ in range(number % 7):
                await trio.lowlevel.checkpoint()
            await until(lambda: bool(ring.driver.poll()))


async def test_notify_polling_guest_needs_neither_kick_nor_call(
    guest: DeviceGuest, autojump_clock: MockClock
) -> None:
    """KICK and CALL with bit 8: the back-end polls the ring, and sends no call."""
    ring = guest.start(kick_fd=None, call_fd=None)
    for _ in range(3):
        pending = guest.put(T_FLUSH)
        with trio.fail_after(1):
            while pending.status != S_OK:
                await trio.sleep(0.001)
    assert ring.calls() == 0


async def test_ring_without_kick_gets_one_later(guest: DeviceGuest) -> None:
    ring = guest.start(kick_fd=None)
    guest.device.set_kick(0, ring.kick)
    await guest.request(T_FLUSH)
    guest.device.set_kick(0, None)
    await guest.request(T_FLUSH)


async def test_queues_are_served_side_by_side(guest: DeviceGuest) -> None:
    for index in range(4):
        guest.start(index)
    guest.disk.hold = True
    pending = [guest.put(T_IN, index, room=512, index=index) for index in range(4)]
    for ring in guest.rings.values():
        ring.kick_device()
    await until(lambda: len(guest.disk.held) == 4)
    guest.disk.release()
    await until(lambda: all(each.status == S_OK for each in pending))


async def test_full_call_eventfd_does_no_harm(guest: DeviceGuest) -> None:
    """A front-end may fill its counter: writing would block, or raise."""
    ring = guest.start()
    ring.calls()
    os.eventfd_write(ring.call, (1 << 64) - 2)
    await guest.request(T_FLUSH)


async def test_read_only_call_descriptor_does_no_harm(guest: DeviceGuest, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    fd = os.open(tmp_path / "file", os.O_RDONLY)
    guest.start(call_fd=fd)
    await guest.request(T_FLUSH)
    os.close(fd)


async def test_kick_descriptor_that_cannot_be_waited_for_is_refused(
    guest: DeviceGuest, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    fd = os.open(tmp_path / "file", os.O_RDONLY)
    with pytest.raises(ProtocolError, match="kick"):
        guest.start(kick_fd=fd)
    os.close(fd)
    guest.start()
    await guest.request(T_FLUSH)


# Impossible rings


@pytest.mark.parametrize(
    "change",
    [
        {"size": 0},
        {"size": 2048},
        {"desc_user_address": USER_BASE + 8},
        {"avail_user_address": USER_BASE + 0x4001},
        {"used_user_address": USER_BASE + 0x4002},
        {"desc_user_address": 0},
        {"desc_user_address": USER_BASE + MEMORY_BYTES},
        {"used_user_address": USER_BASE + MEMORY_BYTES - 4 + 4},
        {"used_user_address": USER_BASE},  # over the descriptors
    ],
)
async def test_ring_layout_impossible_ring_is_refused(
    guest: DeviceGuest, change: dict[str, int]
) -> None:
    """T41-T49; CVE-2026-61402."""
    with pytest.raises(ProtocolError):
        guest.start(**change)
    guest.start()
    await guest.request(T_FLUSH)


async def test_ring_layout_split_ring_size_not_a_power_of_two_is_refused(
    autojump_clock: MockClock,
) -> None:
    async with running_device() as guest:
        await guest.connect()
        with pytest.raises(ProtocolError, match="power of two"):
            guest.start(size=12)


async def test_packed_ring_may_have_any_size(autojump_clock: MockClock) -> None:
    async with running_device(packed=True, size=12) as guest:
        await guest.connect()
        guest.start()
        for _ in range(20):
            await guest.request(T_FLUSH)


# Broken rings


async def test_malformed_broken_ring_stops_alone_and_says_so_once() -> None:
    """Its error descriptor is signalled; the other queue and the disk live on."""
    async with running_device() as guest:
        await guest.connect()
        bad, good = guest.start(0), guest.start(1)
        bad.driver.set_avail_idx(1000)
        bad.kick_device()
        await until(lambda: guest.device.guest_faults["a broken ring"] == 1)
        assert signals(bad.error) == 1
        bad.kick_device()
        await a_while()
        assert guest.device.guest_faults["a broken ring"] == 1
        assert signals(bad.error) == 0
        assert signals(good.error) == 0
        assert (await guest.request(T_FLUSH, index=1))[0] == S_OK
        guest.device.set_error(0, bad.error)
        assert signals(bad.error) == 1
        await guest.device.stop_ring(0)


async def test_malformed_broken_ring_stays_broken_through_resume_and_memory_changes() -> None:
    async with running_device() as guest:
        await guest.connect()
        bad = guest.start()
        bad.driver.set_avail_idx(1000)
        bad.kick_device()
        await until(lambda: guest.device.guest_faults["a broken ring"] == 1)
        guest.device.suspend_ring(0)
        guest.device.resume_ring(0)
        await guest.device.replace_memory([guest.region()])
        await a_while()
        assert guest.device.guest_faults["a broken ring"] == 1


async def test_faults_are_counted_and_said_once(
    guest: DeviceGuest, capsys: pytest.CaptureFixture[str]
) -> None:
    guest.start()
    for _ in range(5):
        await guest.request(99)
    assert guest.device.guest_faults["an unknown request type"] == 5
    assert capsys.readouterr().out.count("an unknown request type") == 1


async def test_faults_with_any_details_are_one_kind(
    guest: DeviceGuest, capsys: pytest.CaptureFixture[str]
) -> None:
    """A guest that tries every address fills neither the log nor our memory."""
    ring = guest.start()
    for number in range(20):
        ring.add(1000 + number, [((1 << 40) + number, 16, 0), (guest.alloc(b"x"), 1, 2)])
        ring.kick_device()
        await until(lambda: bool(ring.driver.poll()))
    assert guest.device.guest_faults == {"a bad address": 20}
    assert capsys.readouterr().out.count("bad address") == 1


async def test_rings_broken_again_and_again_do_not_fill_the_log(
    capsys: pytest.CaptureFixture[str],
) -> None:
    async with running_device() as guest:
        await guest.connect()
        for count in range(1, 40):
            ring = guest.start()
            ring.driver.set_avail_idx(1000)
            ring.kick_device()
            await until(lambda count=count: guest.device.guest_faults["a broken ring"] == count)
            await guest.device.stop_ring(0)
            ring.driver.set_avail_idx(0)
    assert capsys.readouterr().out.count("a ring broke") == 6


# Suspend and resume


async def test_session_suspended_ring_leaves_requests_and_completes_what_it_has(
    guest: DeviceGuest,
) -> None:
    ring, first = await with_one_held(guest, T_FLUSH)
    guest.device.suspend_ring(0)
    guest.device.suspend_ring(0)
    second = guest.put(T_FLUSH)
    ring.kick_device()
    await a_while()
    assert len(guest.disk.held) == 1
    guest.disk.release()
    await until(lambda: first.status == S_OK)
    guest.disk.hold = False
    guest.device.resume_ring(0)
    guest.device.resume_ring(0)
    await until(lambda: second.status == S_OK)


async def with_one_held(
    guest: DeviceGuest, op: int, sector: int = 0, **options: Any
) -> tuple[GuestRing, PendingRequest]:
    """Start ring 0 with a request that the disk holds back."""
    ring = guest.start()
    guest.disk.hold = True
    pending = guest.put(op, sector, **options)
    ring.kick_device()
    await until(lambda: len(guest.disk.held) == 1)
    return ring, pending


# Stopping


async def test_session_stop_answers_everything_first_and_names_the_base(
    guest: DeviceGuest, autojump_clock: MockClock
) -> None:
    ring = guest.start()
    guest.disk.hold = True
    pending = [guest.put(T_IN, 1, room=512) for _ in range(3)]
    ring.kick_device()
    await until(lambda: len(guest.disk.held) == 3)
    bases = []
    async with trio.open_nursery() as nursery:

        async def stop() -> None:
            bases.append(await guest.device.stop_ring(0))

        nursery.start_soon(stop)
        await a_while()
        late = guest.put(T_FLUSH)
        ring.kick_device()
        await a_while()
        assert bases == []
        guest.disk.release(2)
        await a_while()
        assert bases == []
        guest.disk.release()
    assert [each.status for each in pending] == [S_OK] * 3
    assert len(ring.driver.poll()) == 3
    assert late.status == 0xEE
    assert guest.stopped_all == 1
    # Another start goes on there.
    guest.disk.hold = False
    guest.start(base=bases[0])
    await until(lambda: late.status == S_OK)


async def test_session_stop_is_bounded_and_fails_unanswered_requests(
    guest: DeviceGuest, autojump_clock: MockClock
) -> None:
    """A dead server must not hang QEMU's main loop."""
    ring, pending = await with_one_held(guest, T_IN, room=512)
    started_s = trio.current_time()
    await guest.device.stop_ring(0)
    assert trio.current_time() - started_s == pytest.approx(30)
    assert pending.status == S_IOERR
    assert ring.driver.poll() == [(pending.token, 0)]


async def test_ring_closed_with_requests_unanswered_is_never_written_again(
    autojump_clock: MockClock,
) -> None:
    """Even a storage side that goes on with them cannot reach ring, status or data."""
    async with running_device(on_abandoned=lambda requests: None, drain_timeout_s=5) as guest:
        await guest.connect()
        ring = guest.start()
        guest.disk.hold = True
        guest.put(T_IN, room=512)
        ring.kick_device()
        await until(lambda: len(guest.disk.held) == 1)
        await guest.device.stop_ring(0)
        await guest.device.disconnected()
        before = bytes(guest.memory)
        ring.calls()
        guest.disk.release()
        await a_while()
        assert bytes(guest.memory) == before
        assert ring.calls() == 0


async def test_all_rings_share_one_drain_timeout(
    guest: DeviceGuest, autojump_clock: MockClock
) -> None:
    guest.disk.hold = True
    for index in range(4):
        guest.start(index)
        guest.put(T_FLUSH, index=index)
    await until(lambda: len(guest.disk.held) == 4)
    started_s = trio.current_time()
    await guest.device.reset()
    assert trio.current_time() - started_s == pytest.approx(30)


async def test_rings_stopped_one_after_the_other_do_not_each_take_that_long(
    guest: DeviceGuest, autojump_clock: MockClock
) -> None:
    guest.disk.hold = True
    for index in range(4):
        guest.start(index)
    started_s = trio.current_time()
    for index in range(4):
        guest.put(T_FLUSH, index=index)
        guest.rings[index].kick_device()
        await until(lambda: len(guest.disk.held) == 1)
        await guest.device.stop_ring(index)
    assert trio.current_time() - started_s == pytest.approx(30 + 3)


async def test_cancelled_stop_leaves_nothing_behind(
    guest: DeviceGuest, autojump_clock: MockClock
) -> None:
    _, pending = await with_one_held(guest, T_IN, room=512)
    with trio.move_on_after(1):
        await guest.device.stop_ring(0)
    assert pending.status == S_IOERR
    guest.disk.hold = False
    guest.start()


async def test_session_last_stop_waits_for_the_disk_to_be_up_to_date(
    autojump_clock: MockClock,
) -> None:
    """Another host may open the image next."""
    order = []

    async def on_all_stopped() -> None:
        await trio.sleep(3)
        order.append("up to date")

    async with running_device(on_all_stopped=on_all_stopped) as guest:
        await guest.connect()
        guest.start(0)
        guest.start(1)
        await guest.device.stop_ring(0)
        assert order == []
        await guest.device.stop_ring(1)
        assert order == ["up to date"]


@pytest.mark.parametrize("fails", [False, True])
async def test_session_last_stop_that_leaves_something_behind_is_not_answered(
    autojump_clock: MockClock, fails: bool
) -> None:
    """The wait has an end, too: QEMU's main loop waits with it."""

    async def on_all_stopped() -> None:
        if fails:
            raise LeftBehind("the flush failed")
        await trio.sleep_forever()

    async def on_left_behind() -> LeftBehind:
        return LeftBehind("4096 bytes")

    async with running_device(
        on_all_stopped=on_all_stopped, on_left_behind=on_left_behind, drain_timeout_s=7
    ) as guest:
        await guest.connect()
        guest.start(0)
        began_s = trio.current_time()
        with pytest.raises(LeftBehind, match="4096 bytes"):
            await guest.device.stop_ring(0)
        assert trio.current_time() - began_s == pytest.approx(0 if fails else 7)
        guest.start(0)  # the guest may come back


async def test_front_end_that_has_gone_is_promised_nothing(autojump_clock: MockClock) -> None:
    asked = []

    async def on_left_behind() -> LeftBehind:
        asked.append(1)
        return LeftBehind("something")

    async with running_device(
        on_all_stopped=trio.sleep_forever, on_left_behind=on_left_behind, drain_timeout_s=7
    ) as guest:
        await guest.connect()
        guest.start(0)
        await guest.device.disconnected()
    assert not asked


async def test_ring_held_at_its_start_begins_nothing_until_it_is_let_go(
    guest: DeviceGuest,
) -> None:
    let_go: list[Any] = []
    fd, _ = guest.device.create_inflight(1, 16)
    guest.start()
    guest.disk.hold = True
    left = guest.put(T_IN, room=512)
    guest.rings[0].kick_device()
    await until(lambda: len(guest.disk.held) == 1)
    guest.device.hurry(0)
    await guest.device.stop_ring(0)
    guest.disk.hold = False
    guest.above.calls["on_starting"] = let_go.append
    guest.start()
    late = guest.put(T_FLUSH)
    guest.rings[0].kick_device()
    await a_while()
    guest.device.suspend_ring(0)
    guest.device.resume_ring(0)
    await guest.device.replace_memory([guest.region()])
    await a_while()
    assert (left.status, late.status) == (0xEE, 0xEE)
    await guest.device.stop_ring(0)  # at once: nothing was begun
    guest.start()
    let_go[-1]()
    await until(lambda: late.status == left.status == S_OK)
    assert [each.op for each in guest.disk.requests] == [READ, READ, FLUSH]
    os.close(fd)


async def test_requests_left_in_the_region_are_forgotten_by_a_reset(
    guest: DeviceGuest, autojump_clock: MockClock
) -> None:
    """The driver has forgotten them, and uses their memory again."""
    fd, size = guest.device.create_inflight(1, 16)
    _, pending = await with_one_held(guest, T_IN, room=512)
    base = await guest.device.stop_ring(0)
    await guest.device.reset()
    await guest.connect()
    guest.disk.hold = False
    guest.device.set_inflight(fd, 0, size, 1, 16)
    guest.start(base=base)
    await a_while()
    assert pending.status == 0xEE
    assert len(guest.disk.requests) == 1
    os.close(fd)


@pytest.mark.parametrize("same", [True, False])
async def test_inflight_requests_that_this_process_left_are_not_another_processs(
    guest: DeviceGuest, autojump_clock: MockClock, same: bool
) -> None:
    """It knows what it has sent: nothing need be waited for. QEMU hands the region over anew with
    each start."""
    told: list[None] = []
    guest.above.calls["on_recovered"] = lambda: told.append(None)
    fd, size = guest.device.create_inflight(1, 16)
    guest.start()
    guest.disk.hold = True
    pending = guest.put(T_IN, room=512)
    guest.rings[0].kick_device()
    await until(lambda: len(guest.disk.held) == 1)
    await guest.device.stop_ring(0)
    guest.disk.hold = False
    if not same:
        with open(os.dup(fd), "rb") as file:
            file.seek(0)
            content = file.read()
        os.close(fd)
        fd = os.memfd_create("another")
        os.write(fd, content)
    guest.device.set_inflight(fd, 0, size, 1, 16)
    guest.start()
    await until(lambda: pending.status == S_OK)
    assert len(told) == (0 if same else 1)
    os.close(fd)


@pytest.mark.parametrize("restarted", [False, True])
async def test_inflight_what_a_dead_process_left_of_a_stopped_ring_does_not_migrate(
    guest: DeviceGuest, autojump_clock: MockClock, restarted: bool
) -> None:
    """The front-end stopped one ring of two, the server did not answer in time, the process died,
    and the next one was never asked to start that ring: it would be lost where the guest goes."""
    fd, size = guest.device.create_inflight(2, 16)
    guest.start(1)
    guest.disk.hold = True
    pending = guest.put(T_OUT, index=1, out=b"l" * 512)
    guest.rings[1].kick_device()
    await until(lambda: len(guest.disk.held) == 1)
    base = await guest.device.stop_ring(1)
    async with running_device(packed=guest.packed) as second:
        second.fd, second.memory, second.rings, own = (
            *(guest.fd, guest.memory, guest.rings),
            (second.fd, second.memory),
        )
        await second.connect()
        second.device.set_inflight(fd, 0, size, 2, 16)
        log = os.memfd_create("log")
        os.ftruncate(log, 4096)
        second.device.set_log(log, 0, 4096)
        os.close(log)
        second.device.set_logging(True)
        second.start(0)
        if restarted:
            second.start(1, base=base)
            await until(lambda: pending.status == S_OK)
            await second.device.stop_ring(1)
            await second.device.stop_ring(0)
        else:
            with pytest.raises(LeftBehind, match="1 requests in time"):
                await second.device.stop_ring(0)
        second.fd, second.memory, second.rings = *own, {}
    os.close(fd)


async def test_disconnect_twice_and_before_anything_is_fine(guest: DeviceGuest) -> None:
    await guest.device.disconnected()
    await guest.device.disconnected()


def mappings() -> int:
    return Path("/proc/self/maps").read_text().count("memfd:device-guest")


async def test_disconnect_gives_the_memory_back(guest: DeviceGuest) -> None:
    guest.start()
    await guest.request(T_IN, room=512)
    guest.disk.requests.clear()
    before = mappings()
    await guest.device.disconnected()
    await a_while()
    assert mappings() == before - 1


# Memory


async def goes_on(guest: DeviceGuest, pending: PendingRequest) -> None:
    """What was in flight is answered, and a request in memory that came meanwhile."""
    guest.disk.release()
    await until(lambda: pending.status == S_OK)
    guest.disk.hold = False
    guest._next = 0x200000
    assert (await guest.request(T_IN, 3, room=512))[0] == S_OK


async def test_memory_added_while_requests_are_in_flight_does_not_wait(guest: DeviceGuest) -> None:
    await guest.device.replace_memory([guest.region(0, 0x200000)])
    _, pending = await with_one_held(guest, T_IN, room=512)
    await guest.device.add_memory(guest.region(0x200000, 0x100000))
    await goes_on(guest, pending)


async def test_memory_removed_waits_for_requests_in_flight(
    guest: DeviceGuest, autojump_clock: MockClock
) -> None:
    """SPDK#3132."""
    await guest.device.replace_memory([guest.region(0, 0x200000), guest.region(0x200000, 0x100000)])
    ring = guest.start()
    guest._next = 0x200000
    guest.disk.hold = True
    pending = guest.put(T_IN, room=512)
    ring.kick_device()
    await until(lambda: len(guest.disk.held) == 1)
    removed = False
    async with trio.open_nursery() as nursery:

        async def remove() -> None:
            nonlocal removed
            await guest.device.remove_memory(
                guest_address=0x200000,
                user_address=USER_BASE + 0x200000,
                size_bytes=0x100000,
            )
            removed = True

        nursery.start_soon(remove)
        await a_while()
        assert not removed
        guest.disk.release()
    assert pending.status == S_OK
    guest.disk.hold = False
    # What lies there now is a bad address; the rest works.
    assert (await guest.request(T_IN, room=512))[0] in (S_IOERR, 0xEE)
    guest._next = 0x180000
    assert (await guest.request(T_IN, room=512))[0] == S_OK


@pytest.mark.parametrize("replaced", [True, False])
async def test_memory_that_no_request_uses_is_taken_away_at_once(
    guest: DeviceGuest, autojump_clock: MockClock, replaced: bool
) -> None:
    """QEMU's main loop waits: not for a server that is away, because of other memory."""
    await guest.device.replace_memory([guest.region(0, 0x200000), guest.region(0x200000, 0x100000)])
    _, pending = await with_one_held(guest, T_IN, room=512)
    began_s = trio.current_time()
    if replaced:
        await guest.device.replace_memory([guest.region(0, 0x200000)])
    else:
        await guest.device.remove_memory(
            guest_address=0x200000, user_address=USER_BASE + 0x200000, size_bytes=0x100000
        )
    assert trio.current_time() == began_s
    guest.disk.release()
    await until(lambda: pending.status == S_OK)
    guest.disk.hold = False
    assert (await guest.request(T_IN, room=512))[0] == S_OK


async def test_memory_replaced_by_the_same_goes_on(guest: DeviceGuest) -> None:
    ring = guest.start()
    guest.device.suspend_ring(0)
    await guest.device.replace_memory([guest.region()])
    pending = guest.put(T_FLUSH)
    ring.kick_device()
    await a_while()
    assert pending.status == 0xEE  # still suspended
    guest.device.resume_ring(0)
    await until(lambda: pending.status == S_OK)
    await guest.request(T_IN, room=512)


async def test_memory_replaced_by_more_does_not_wait(guest: DeviceGuest) -> None:
    """QEMU without memory slots hot-plugs like that, perhaps while the server is away."""
    await guest.device.replace_memory([guest.region(0, 0x200000)])
    _, pending = await with_one_held(guest, T_IN, room=512)
    await guest.device.replace_memory([guest.region(0, 0x200000), guest.region(0x200000, 0x100000)])
    await goes_on(guest, pending)


async def test_memory_taken_away_under_a_slow_request_does_not_fail_it(
    guest: DeviceGuest, autojump_clock: MockClock
) -> None:
    _, pending = await with_one_held(guest, T_IN, room=512)
    await guest.device.replace_memory([guest.region(0, 0x200000)])
    assert pending.status == 0xEE
    guest.disk.release()
    await until(lambda: pending.status == S_OK)
    guest.disk.hold = False
    assert (await guest.request(T_IN, room=512))[0] == S_OK


async def test_memory_that_cannot_be_mapped_leaves_none(guest: DeviceGuest) -> None:
    ring = guest.start()
    with pytest.raises(ProtocolError):
        await guest.device.replace_memory([guest.region(0, MEMORY_BYTES * 2)])
    assert signals(ring.error) == 1  # its memory is gone
    await guest.device.stop_ring(0)
    with pytest.raises(ProtocolError):
        guest.start()


async def test_memory_under_a_ring_removed_breaks_that_ring_only(guest: DeviceGuest) -> None:
    await guest.device.replace_memory([guest.region(0, 0x8000), guest.region(0x8000, 0x300000)])
    first, second = guest.start(0), guest.start(1)
    await guest.device.remove_memory(guest_address=0, user_address=USER_BASE, size_bytes=0x8000)
    assert (signals(first.error), signals(second.error)) == (1, 0)
    assert (await guest.request(T_FLUSH, index=1))[0] == S_OK
    assert await guest.device.stop_ring(0) == first.base


async def test_memory_unknown_cannot_be_removed(guest: DeviceGuest) -> None:
    with pytest.raises(ProtocolError):
        await guest.device.remove_memory(guest_address=1, user_address=2, size_bytes=3)


# Configuration


async def test_resize_is_told_and_counts_at_once(guest: DeviceGuest) -> None:
    told: list[None] = []

    class Listener:
        def config_changed(self) -> None:
            told.append(None)

    guest.device.listener = Listener()
    guest.start()
    assert (await guest.request(T_IN, 2048, room=512))[0] == S_IOERR
    guest.disk.data += bytes(1 << 20)
    guest.device.resize(2 << 20)
    assert len(told) == 1
    assert guest.device.read_config(0, 8) == (4096).to_bytes(8, "little")
    assert (await guest.request(T_IN, 2048, room=512))[0] == S_OK


async def test_writeback_turned_off_flushes_what_was_written_before(guest: DeviceGuest) -> None:
    guest.device.write_config(32, b"\0", migration=False)
    assert [request.op for request in guest.disk.requests] == [FLUSH]
    guest.device.write_config(32, b"\0", migration=False)
    assert len(guest.disk.requests) == 1
    guest.start()
    await guest.request(T_OUT, out=b"x" * 512)
    assert (guest.disk.requests[-1].op, guest.disk.requests[-1].flags) == (WRITE, 1)


async def test_write_cache_turned_off_again_and_again_leaves_one_flush_and_one_to_come(
    guest: DeviceGuest,
) -> None:
    guest.disk.hold = True
    for _ in range(1000):
        guest.device.write_config(32, b"\1", migration=False)
        guest.device.write_config(32, b"\0", migration=False)
        assert guest.loop.turn.pending  # the target may only have queued it
    assert [(each.op, each.flags) for each in guest.disk.requests] == [(FLUSH, INTERNAL)]
    guest.disk.release()
    await a_while()
    assert len(guest.disk.requests) == 2
    guest.disk.release()
    await a_while()
    assert len(guest.disk.requests) == 2
    guest.device.write_config(32, b"\1", migration=False)
    guest.device.write_config(32, b"\0", migration=False)
    assert len(guest.disk.requests) == 3
    guest.disk.release()


@pytest.mark.parametrize(("offset", "data"), [(32, b"\0"), (0, bytes(60)), (30, bytes(4))])
async def test_migrated_configuration_restores_writeback(
    guest: DeviceGuest, offset: int, data: bytes
) -> None:
    guest.device.write_config(offset, data, migration=True)
    assert guest.device.read_config(32, 1) == b"\0"


async def test_migrated_configuration_without_writeback_is_ignored(guest: DeviceGuest) -> None:
    guest.device.write_config(0, bytes(8), migration=True)
    assert guest.device.read_config(32, 1) == b"\1"


async def test_features_withheld_are_not_offered(autojump_clock: MockClock) -> None:
    async with running_device(withheld_features=F_FLUSH) as guest:
        assert not guest.device.offered_features() & F_FLUSH


async def test_driver_that_accepts_nothing_but_version_1_works(
    autojump_clock: MockClock,
) -> None:
    """`features`: no INDIRECT, no EVENT_IDX, no FLUSH."""
    async with running_device(event_idx=False) as guest:
        await guest.connect(F_VERSION_1)
        guest.start()
        assert (await guest.request(T_OUT, out=b"x" * 512))[0] == S_OK
        assert guest.disk.requests[-1].flags == 1  # write-through


# Crash recovery


async def test_inflight_write_cache_turned_off_stays_off_after_a_death(guest: DeviceGuest) -> None:
    """The guest believes that what completes is durable, under every process that serves it."""
    fd, size = guest.device.create_inflight(1, 16)
    guest.device.write_config(32, b"\0", migration=False)
    async with running_device(packed=guest.packed) as second:
        await second.connect()
        second.device.set_inflight(fd, 0, size, 1, 16)
        assert second.device.read_config(32, 1) == b"\0"
        second.start()
        await second.request(T_OUT, out=b"x" * 512)
        assert [(each.op, each.flags) for each in second.disk.requests] == [(WRITE, 1)]
        second.device.write_config(32, b"\1", migration=False)
        async with running_device(packed=guest.packed) as third:
            await third.connect()
            third.device.set_inflight(fd, 0, size, 1, 16)
            assert third.device.read_config(32, 1) == b"\1"
    os.close(fd)


async def test_inflight_unflushed_mark_and_its_instance_outlive_a_death(guest: DeviceGuest) -> None:
    """Beside the write cache that is off, and whatever came first."""
    left = ((1 << 56) - 2, False)
    guest.device.remember_durability(unflushed_on=left[0], loss_unreported=left[1])
    fd, size = guest.device.create_inflight(1, 16)
    guest.device.write_config(32, b"\0", migration=False)
    guest.start()  # From here on a guest has used it.
    for leaves in ((1, True), (0, True), (1 << 55, False), (0, False), (7, False)):
        inherited: list[tuple[int, bool]] = []
        async with running_device(
            packed=guest.packed,
            on_inherited=lambda *what, inherited=inherited: inherited.append(what),
        ) as following:
            await following.connect()
            following.device.set_inflight(fd, 0, size, 1, 16)
            assert following.device.read_config(32, 1) == b"\0"
            assert inherited == [left]
            following.device.remember_durability(unflushed_on=leaves[0], loss_unreported=leaves[1])
        left = leaves
    os.close(fd)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("left", [(7, False), (0, True)])
async def test_inflight_what_a_paused_guest_left_outlives_a_death(
    left: tuple[int, bool], packed: bool, autojump_clock: MockClock
) -> None:
    """A packed ring that had stopped left its part of the region as if it were fresh. So the next
    process took the region for unused: a loss was forgotten, and the guest's flush succeeded."""
    came: list[object] = []
    async with noting(came, packed=packed) as guest:
        fd, size = guest.device.create_inflight(1, 16)
        guest.start()
        assert (await guest.request(T_FLUSH))[0] == S_OK
        await guest.device.stop_ring(0)
        guest.device.remember_durability(unflushed_on=left[0], loss_unreported=left[1])
    came.clear()
    async with noting(came, packed=packed) as following:
        following.device.set_inflight(fd, 0, size, 1, 16)
        assert came == [left]
        await following.device.reset()
    came.clear()
    async with noting(came, packed=packed) as another:
        another.device.set_inflight(fd, 0, size, 1, 16)
        assert came == []  # The guest began anew: nothing was promised to it.
    os.close(fd)


@asynccontextmanager
async def noting(came: list[object], *, packed: bool = False) -> AsyncIterator[DeviceGuest]:
    """A device that notes in `came` where its guests come from."""
    async with running_device(
        packed=packed,
        on_inherited=lambda *what: came.append(what),
        on_fresh_guest=lambda: came.append("fresh"),
    ) as guest:
        await guest.connect()
        yield guest


async def test_inflight_region_that_no_ring_used_leaves_nothing_to_inherit(
    autojump_clock: MockClock,
) -> None:
    came: list[object] = []
    async with noting(came) as guest:
        fd, size = guest.device.create_inflight(1, 16)
        guest.device.set_inflight(fd, 0, size, 1, 16)
        assert came == []
        guest.start()
        assert came == ["fresh"]
        os.close(fd)


@pytest.mark.parametrize("packed", [False, True])
async def test_guest_whose_ring_has_run_inherits_also_without_a_region(
    packed: bool, autojump_clock: MockClock
) -> None:
    came: list[object] = []
    async with noting(came, packed=packed) as guest:
        guest.start(base=0x8003_8003 if packed else 3)
        assert came == [(0, False)]


async def test_guest_that_was_paused_here_inherits_nothing(autojump_clock: MockClock) -> None:
    """What it left is known: an outage meanwhile must not look like a loss."""
    came: list[object] = []
    async with noting(came) as guest:
        fd, size = guest.device.create_inflight(1, 16)
        guest.start()
        await guest.request(T_FLUSH)
        base = await guest.device.stop_ring(0)
        guest.device.set_inflight(fd, 0, size, 1, 16)
        guest.start(base=base)
        assert came == ["fresh"]
        os.close(fd)


async def test_inflight_write_cache_that_is_off_is_so_in_a_new_region(guest: DeviceGuest) -> None:
    """Whatever came first: the guest's write or the region."""
    guest.device.write_config(32, b"\0", migration=False)
    fd, size = guest.device.create_inflight(1, 16)
    async with running_device(packed=guest.packed) as second:
        await second.connect()
        second.device.set_inflight(fd, 0, size, 1, 16)
        assert second.device.read_config(32, 1) == b"\0"
    os.close(fd)


async def test_inflight_write_through_is_not_taken_from_a_region_where_it_was_not_offered(
    guest: DeviceGuest,
) -> None:
    guest.device.write_config(32, b"\0", migration=False)
    fd, size = guest.device.create_inflight(1, 16)
    async with running_device(packed=guest.packed, withheld_features=F_CONFIG_WCE) as second:
        await second.connect()
        second.device.set_inflight(fd, 0, size, 1, 16)
        assert second.device.read_config(32, 1) == b"\1"
    os.close(fd)


async def test_inflight_requests_of_a_dead_process_are_executed_again(guest: DeviceGuest) -> None:
    fd, size = guest.device.create_inflight(1, 16)
    ring = guest.start()
    guest.disk.hold = True
    pending = [guest.put(T_IN, sector, room=512) for sector in range(3)]
    ring.kick_device()
    await until(lambda: len(guest.disk.held) == 3)
    guest.disk.release(1)
    await until(lambda: pending[0].status == S_OK)
    await a_while()
    guest.disk.held.clear()  # the process dies; another one comes
    # (Its own clean-up would drain; it must not be given the chance.)
    guest.device._rings.clear()
    guest.device._setups.clear()
    guest.disk.hold = False
    async with running_device(packed=guest.packed, disk=guest.disk) as second:
        second.fd, second.memory, second.rings, first_fd, first_memory = (
            *(guest.fd, guest.memory, guest.rings),
            *(second.fd, second.memory),
        )
        await second.connect()
        second.device.set_inflight(fd, 0, size, 1, 16)
        guest.disk.hold = True
        second.start(base=0)
        assert second.loop.turn.pending  # the target may only have queued them
        guest.disk.hold = False
        guest.disk.release()
        await until(lambda: all(each.status == S_OK for each in pending))
        await a_while()
        assert len(ring.driver.poll()) == 3
        assert pending[2].data == bytes(guest.disk.data[1024:1536])
        await second.device.stop_ring(0)
        second.fd, second.memory, second.rings = first_fd, first_memory, {}
    os.close(fd)
    gc.collect()  # of the ring that was never closed


@pytest.mark.parametrize("answered", [True, False])
async def test_inflight_recovered_requests_are_told_of_before_they_are_executed(
    guest: DeviceGuest, answered: bool
) -> None:
    """The layers below may have to wait: the server may be about to execute the same ones."""
    fd, size = guest.device.create_inflight(1, 16)
    ring = guest.start()
    guest.disk.hold = not answered
    pending = guest.put(T_OUT, out=b"x" * 512)
    ring.kick_device()
    await until(lambda: len(guest.disk.requests) == 1)
    await a_while()
    assert (pending.status == S_OK) == answered
    guest.disk.held.clear()  # the process dies
    guest.device._rings.clear()
    guest.device._setups.clear()
    guest.disk.hold = False
    told: list[int] = []
    async with running_device(
        packed=guest.packed,
        disk=guest.disk,
        on_recovered=lambda: told.append(len(guest.disk.requests)),
    ) as second:
        second.fd, second.memory, second.rings, first_fd, first_memory = (
            *(guest.fd, guest.memory, guest.rings),
            *(second.fd, second.memory),
        )
        await second.connect()
        second.device.set_inflight(fd, 0, size, 1, 16)
        second.start(base=ring.base + 1 if answered else ring.base)
        await a_while()
        assert told == ([] if answered else [1])
        assert len(guest.disk.requests) == (1 if answered else 2)
        await second.device.stop_ring(0)
        second.fd, second.memory, second.rings = first_fd, first_memory, {}
    os.close(fd)
    gc.collect()  # of the ring that was never closed


@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
async def test_inflight_flush_that_is_executed_again_is_marked(packed: bool) -> None:
    """Its failure would tell the guest nothing: when it was sent is no longer known."""
    async with running_device(packed=packed, drain_timeout_s=0.01) as guest:
        await guest.connect()
        fd, size = guest.device.create_inflight(1, 16)
        ring = guest.start()
        guest.device.set_inflight(fd, 0, size, 1, 16)
        guest.disk.hold = True
        pending = guest.put(T_FLUSH)
        ring.kick_device()
        await until(lambda: len(guest.disk.requests) == 1)
        base = await guest.device.stop_ring(0)
        guest.disk.hold = False
        guest.start(base=base)
        await until(lambda: pending.status == S_OK)
        await guest.request(T_FLUSH)
        assert [each.flags for each in guest.disk.requests] == [0, REPEATED, 0]
        os.close(fd)


@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
@pytest.mark.parametrize("when", ["before the start", "while it is disabled"])
async def test_flush_that_was_left_in_its_ring_is_marked(packed: bool, when: str) -> None:
    """What the guest has seen meanwhile of other requests, it had not seen when it sent it."""
    async with running_device(packed=packed) as guest:
        await guest.connect()
        ring = guest.start()
        await guest.request(T_FLUSH)
        if when == "while it is disabled":
            guest.device.suspend_ring(0)
            pending = guest.put(T_FLUSH)
            ring.kick_device()
            await a_while()
            guest.device.resume_ring(0)
        else:
            base = await guest.device.stop_ring(0)
            pending = guest.put(T_FLUSH)
            guest.start(base=base)
        await until(lambda: pending.status == S_OK)
        await guest.request(T_FLUSH)
        assert [each.flags for each in guest.disk.requests] == [0, REPEATED, 0]


async def test_inflight_stopped_in_order_nothing_is_executed_again(guest: DeviceGuest) -> None:
    fd, size = guest.device.create_inflight(1, 16)
    guest.start()
    await guest.request(T_FLUSH)
    base = await guest.device.stop_ring(0)
    guest.device.set_inflight(fd, 0, size, 1, 16)
    guest.start(base=base)
    await a_while()
    assert len(guest.disk.requests) == 1
    await guest.request(T_FLUSH)
    os.close(fd)


async def test_inflight_region_for_smaller_queues_is_refused(guest: DeviceGuest) -> None:
    _, fd, size = InflightRegion.create(num_queues=1, queue_size=8, packed=guest.packed)
    guest.device.set_inflight(fd, 0, size, 1, 8)
    os.close(fd)
    with pytest.raises(ProtocolError, match="is for 8"):
        guest.start()
    with pytest.raises(ProtocolError, match="among the 1"):
        guest.start(1)


async def test_inflight_region_made_here_has_room_for_the_largest_ring(guest: DeviceGuest) -> None:
    """QEMU 10 asks for its queue-size, and its guest's driver starts a larger ring."""
    fd, size = guest.device.create_inflight(1, 8)
    guest.start()
    await guest.request(T_FLUSH)
    await guest.device.stop_ring(0)
    guest.device.set_inflight(fd, 0, size, 1, 8)
    guest.start(base=guest.rings[0].base if guest.packed else 1)
    os.close(fd)


async def test_inflight_region_that_does_not_fit_is_refused(guest: DeviceGuest) -> None:
    fd, size = guest.device.create_inflight(1, 8)
    with pytest.raises(ProtocolError):
        guest.device.set_inflight(fd, 0, size, 4, 1024)
    os.close(fd)
    guest.start()  # without tracking
    await guest.request(T_FLUSH)


# Migration


def dirty(fd: int) -> set[int]:
    data = os.pread(fd, 4096, 0)
    return {page for page in range(len(data) * 8) if data[page >> 3] >> (page & 7) & 1}


@pytest.fixture
def log_fd() -> Any:
    fd = os.memfd_create("dirty-log")
    os.ftruncate(fd, MEMORY_BYTES >> 15)
    yield fd
    os.close(fd)


async def test_dirty_log_everything_written_is_marked_while_logging(
    guest: DeviceGuest, log_fd: int
) -> None:
    ring = guest.start(log_guest_address=0x300000)
    await guest.request(T_IN, room=4096)
    guest.device.set_log(log_fd, 0, MEMORY_BYTES >> 15)
    assert dirty(log_fd) == set()
    guest.device.set_logging(True)
    before = bytes(guest.memory)
    pending = guest.put(T_IN, 8, room=8192)
    others = guest.put(T_GET_ID, room=20)
    written = bytes(guest.memory)
    ring.kick_device()
    await until(lambda: others.status == S_OK and pending.status == S_OK)
    await a_while()
    changed = {
        page
        for page in range(MEMORY_BYTES >> 12)
        if guest.memory[page << 12 : page + 1 << 12] != written[page << 12 : page + 1 << 12]
    }
    data_pages = {page for page in changed if page >= 0x100}
    assert len(data_pages) >= 2
    assert dirty(log_fd) >= data_pages | {0x300}
    if guest.packed:
        assert dirty(log_fd) >= changed
    assert before is not written


async def test_dirty_log_request_from_before_logging_is_marked_when_it_ends(
    guest: DeviceGuest, log_fd: int
) -> None:
    """The front-end has copied the page meanwhile."""
    _, pending = await with_one_held(guest, T_IN, room=4096)
    guest.device.set_log(log_fd, 0, MEMORY_BYTES >> 15)
    guest.device.set_logging(True)
    guest.disk.release()
    await until(lambda: pending.status == S_OK)
    assert pending.data_address >> 12 in dirty(log_fd)
    assert pending.status_address >> 12 in dirty(log_fd)


class _EverythingAtHand:
    """A cache that has all of `disk`."""

    def __init__(self, disk: FakeDisk) -> None:
        self._disk = disk

    def read_hit(self, offset: int, length: int, buffers: list[memoryview], /) -> bool:
        (buffer,) = buffers
        buffer[:] = self._disk.data[offset : offset + length]
        return True

    def write_hit(self, offset: int, length: int, buffers: list[memoryview], /) -> bool:
        return False


async def test_dirty_log_request_of_a_dead_process_is_marked_also_if_it_is_answered_at_once(
    guest: DeviceGuest, log_fd: int
) -> None:
    """The process that follows reads it from its cache while the ring starts: the front-end has
    asked for the log before that."""
    fd, size = guest.device.create_inflight(1, 16)
    _, pending = await with_one_held(guest, T_IN, room=4096)
    guest.device._rings.clear()  # the process dies, which drains nothing
    guest.device._setups.clear()
    guest.disk.held.clear()
    hits = _EverythingAtHand(guest.disk)
    async with running_device(packed=guest.packed, disk=guest.disk, hits=hits) as second:
        second.fd, second.memory, second.rings, first_fd, first_memory = (
            *(guest.fd, guest.memory, guest.rings),
            *(second.fd, second.memory),
        )
        await second.connect()
        second.device.set_inflight(fd, 0, size, 1, 16)
        second.device.set_log(log_fd, 0, MEMORY_BYTES >> 15)
        second.device.set_logging(True)
        second.start(base=0)
        await until(lambda: pending.status == S_OK)
        assert pending.data_address >> 12 in dirty(log_fd)
        assert pending.status_address >> 12 in dirty(log_fd)
        await second.device.stop_ring(0)
        second.fd, second.memory, second.rings = first_fd, first_memory, {}
    os.close(fd)
    gc.collect()  # of the ring that was never closed


async def test_dirty_log_nothing_is_marked_after_logging(guest: DeviceGuest, log_fd: int) -> None:
    guest.start(log_guest_address=0)
    guest.device.set_log(log_fd, 0, MEMORY_BYTES >> 15)
    guest.device.set_logging(True)
    guest.device.set_logging(False)
    await guest.request(T_IN, room=4096)
    assert dirty(log_fd) == set()


async def test_dirty_log_ring_is_logged_from_when_the_front_end_says_so(
    guest: DeviceGuest, log_fd: int
) -> None:
    ring = guest.start()
    guest.device.set_log(log_fd, 0, MEMORY_BYTES >> 15)
    guest.device.set_logging(True)
    guest.device.set_ring_log(0, 0x300000)
    await guest.request(T_FLUSH)
    assert 0x300 in dirty(log_fd)
    assert ring.index == 0


async def test_dirty_log_beyond_its_file_is_refused(guest: DeviceGuest, log_fd: int) -> None:
    with pytest.raises(ProtocolError):
        guest.device.set_log(log_fd, 0, (MEMORY_BYTES >> 15) + 1)


async def test_dirty_log_read_of_many_pages_marks_them_all(guest: DeviceGuest, log_fd: int) -> None:
    guest.start()
    guest.device.set_log(log_fd, 0, MEMORY_BYTES >> 15)
    guest.device.set_logging(True)
    guest._next = 0x180000
    pending = guest.put(T_IN, room=1 << 19)
    guest.rings[0].kick_device()
    await until(lambda: pending.status == S_OK)
    first, last = pending.data_address >> 12, pending.data_address + (1 << 19) - 1 >> 12
    assert dirty(log_fd) >= set(range(first, last + 1))


# Errors of the disk


async def test_failed_requests_are_answered(guest: DeviceGuest) -> None:
    guest.start()
    guest.disk.error = EIO
    assert (await guest.request(T_IN, room=512))[0] == S_IOERR
    guest.disk.error = 0
    assert (await guest.request(T_IN, room=512))[0] == S_OK


async def test_target_that_finishes_out_of_turn_wakes_the_loop(guest: DeviceGuest) -> None:
    ring, pending = await with_one_held(guest, T_FLUSH)
    await a_while()  # the loop sleeps
    ring.calls()
    guest.disk.release()
    await until(lambda: pending.status == S_OK and ring.calls() == 1)


def test_fake_disk_executes_what_it_gets() -> None:
    disk = FakeDisk()
    done: list[Request] = []
    submit(disk, Request(WRITE, 0, 4, [memoryview(b"abcd")], done.append))
    assert disk.data[:4] == b"abcd"
    assert done[0].error == 0


# Changes that are made or undone


async def test_memory_of_a_logged_ring_taken_away_leaves_the_other_rings_running(
    guest: DeviceGuest, log_fd: int
) -> None:
    await guest.device.replace_memory([guest.region(0, 0x8000), guest.region(0x8000, 0x300000)])
    guest.device.set_log(log_fd, 0, MEMORY_BYTES >> 15)
    guest.device.set_logging(True)
    guest.start(0, log_guest_address=0x3000)
    guest.start(1, log_guest_address=0xB000)

    await guest.device.remove_memory(guest_address=0, user_address=USER_BASE, size_bytes=0x8000)

    assert (await guest.request(T_FLUSH, index=1))[0] == S_OK
    guest.start(2)
    assert (await guest.request(T_FLUSH, index=2))[0] == S_OK
    await guest.device.disconnected()


async def test_ring_whose_start_fails_late_does_not_exist(
    guest: DeviceGuest, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(memory: object, ring: object, *, packed: bool) -> None:
        raise RuntimeError("a bug")

    with monkeypatch.context() as patched:
        patched.setattr(guest.device._dirty_logs, "of", fails)
        with pytest.raises(RuntimeError, match="a bug"):
            guest.start()
    guest.start()
    assert (await guest.request(T_FLUSH))[0] == S_OK


async def test_rings_go_on_when_a_memory_change_fails(
    guest: DeviceGuest, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(memory: Any) -> None:
        raise RuntimeError("a bug")

    guest.start()
    with monkeypatch.context() as patched:
        patched.setattr(guest.device, "_move_rings", fails)
        with pytest.raises(RuntimeError, match="a bug"):
            await guest.device.replace_memory([])
    assert (await guest.request(T_FLUSH))[0] == S_OK


async def disconnect_amid_a_bug(guest: DeviceGuest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The front-end goes, and the rings cannot be closed in order."""
    with monkeypatch.context() as patched:

        async def fails(*_: object, **__: object) -> None:
            raise RuntimeError("a bug")

        patched.setattr(guest.device, "_close_rings", fails)
        with pytest.raises(RuntimeError, match="a bug"):
            await guest.device.disconnected()


async def test_disconnect_lets_go_of_every_ring_whatever_fails(
    guest: DeviceGuest, monkeypatch: pytest.MonkeyPatch
) -> None:
    guest.start(0)
    guest.start(1)
    await disconnect_amid_a_bug(guest, monkeypatch)
    guest.disk.requests.clear()
    guest.put(T_FLUSH)
    guest.rings[0].kick_device()
    await a_while()
    assert guest.disk.requests == []


@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
async def test_inflight_ring_whose_stop_is_not_answered_goes_on_where_it_was(packed: bool) -> None:
    """The front-end has only an older base: the region has to know."""

    async def fails() -> None:
        raise LeftBehind("something is left")

    async with running_device(packed=packed, on_all_stopped=fails) as guest:
        await guest.connect()
        fd, _ = guest.device.create_inflight(1, 16)
        os.close(fd)
        ring = guest.start()
        for _ in range(3):
            assert (await guest.request(T_FLUSH))[0] == S_OK
        with pytest.raises(LeftBehind):
            await guest.device.stop_ring(0)
        # Of a split ring the front-end knows it from the used index.
        guest.start(base=ring.base if packed else 3)
        for _ in range(3):
            assert (await guest.request(T_FLUSH))[0] == S_OK


async def test_inflight_packed_ring_of_a_process_that_dies_before_it_answers_goes_on_where_it_was(
    autojump_clock: MockClock,
) -> None:
    async with running_device(packed=True, on_all_stopped=trio.sleep_forever) as guest:
        await guest.connect()
        fd, size = guest.device.create_inflight(1, 16)
        guest.start()
        for _ in range(3):
            assert (await guest.request(T_FLUSH))[0] == S_OK
        async with trio.open_nursery() as nursery:
            nursery.start_soon(guest.device.stop_ring, 0)
            await a_while()
            region = InflightRegion.map(fd, 0, size, num_queues=1, queue_size=1024, packed=True)
            version = region.queue(0)[8:10]
            assert any(version)
        assert not any(version)
        os.close(fd)


async def test_storage_is_told_of_requests_whose_ring_is_closed_by_an_error(
    guest: DeviceGuest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their bytes are gone: nothing of them may be sent."""
    guest.start()
    guest.disk.hold = True
    guest.put(T_OUT, out=bytes(512))
    guest.rings[0].kick_device()
    await a_while()
    assert len(guest.disk.held) == 1
    await disconnect_amid_a_bug(guest, monkeypatch)
    assert guest.disk.held == []


async def test_kick_that_cannot_be_waited_for_leaves_the_old_one(
    guest: DeviceGuest, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    fd = os.open(tmp_path / "file", os.O_RDONLY)
    guest.start()
    with pytest.raises(ProtocolError, match="kick"):
        guest.device.set_kick(0, fd)
    os.close(fd)
    assert not guest.device._rings[0].must_be_polled
    assert (await guest.request(T_FLUSH))[0] == S_OK


@pytest.mark.parametrize("entries", [1 << 16, 1 << 33])
async def test_in_flight_region_of_any_size_has_entries_for_our_largest_ring_at_most(
    guest: DeviceGuest, entries: int
) -> None:
    """A sparse file of 256 GiB is billions of entries, each of which was written."""
    fd = os.memfd_create("inflight")
    size = queue_region_bytes(entries, packed=guest.packed)
    os.ftruncate(fd, size)
    guest.device.set_inflight(fd, 0, size, 1, 16)
    guest.start()
    assert (await guest.request(T_FLUSH))[0] == S_OK
    assert os.fstat(fd).st_blocks * 512 <= 1 << 20
    os.close(fd)


async def test_in_flight_region_refused_leaves_the_former_one(guest: DeviceGuest) -> None:
    fd, size_bytes = guest.device.create_inflight(1, 16)
    before = guest.device._remembered.region
    with pytest.raises(ProtocolError):
        guest.device.set_inflight(fd, size_bytes, size_bytes, 1, 16)
    assert guest.device._remembered.region is before
    os.close(fd)


# A second device on the same connection


async def test_same_memory_may_come_again(guest: DeviceGuest) -> None:
    """QEMU's device_del and device_add with the chardev kept."""
    guest.start()
    await guest.device.stop_ring(0)
    await guest.device.add_memory(guest.region())
    guest.rings[0] = guest.make_ring(0)
    guest.memory[0x0:0x8000] = bytes(0x8000)
    guest.start()
    assert (await guest.request(T_FLUSH))[0] == S_OK


async def test_same_memory_again_under_a_running_ring_harms_nothing(guest: DeviceGuest) -> None:
    guest.start()
    await guest.device.add_memory(guest.region())
    assert (await guest.request(T_FLUSH))[0] == S_OK


async def test_other_memory_at_the_same_place_is_refused_while_rings_run(
    guest: DeviceGuest,
) -> None:
    fd = os.memfd_create("other")
    os.ftruncate(fd, MEMORY_BYTES)
    guest.start()
    with pytest.raises(ProtocolError, match="while rings run"):
        await guest.device.add_memory(replace(guest.region(), fd=fd))
    assert (await guest.request(T_FLUSH))[0] == S_OK
    await guest.device.stop_ring(0)
    await guest.device.add_memory(replace(guest.region(), fd=fd))
    os.close(fd)


# What a front-end could do to us


async def test_memory_file_cannot_be_made_shorter_while_it_is_mapped(guest: DeviceGuest) -> None:
    """A store beyond its end would be a SIGBUS."""
    fd = os.memfd_create("memory", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, 1 << 20)
    region = MemoryRegion(1 << 30, 1 << 20, 1 << 40, 0, fd)
    await guest.device.add_memory(region)
    with pytest.raises(PermissionError):
        os.ftruncate(fd, 4096)
    log = os.memfd_create("log", os.MFD_ALLOW_SEALING)
    os.ftruncate(log, 1 << 20)
    guest.device.set_log(log, 0, 1 << 20)
    with pytest.raises(PermissionError):
        os.ftruncate(log, 4096)
    os.close(fd)
    os.close(log)


async def test_memory_that_cannot_be_sealed_is_told_once(tmp_path: Path) -> None:
    path = tmp_path / "memory"
    path.write_bytes(bytes(MEMORY_BYTES))
    fd = os.open(path, os.O_RDWR)
    async with running_device() as guest:
        with capture_logs() as logs:
            for _ in range(2):
                await guest.device.replace_memory([replace(guest.region(), fd=fd)])
        assert len([line for line in logs if "cannot be sealed" in line["event"]]) == 1
    os.close(fd)


async def test_call_descriptor_that_blocks_does_not_stop_the_ring(
    guest: DeviceGuest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The front-end shares the open file: it may clear O_NONBLOCK and fill the counter."""
    monkeypatch.setattr("bridge.guest.ring._signal", EventfdWriter(look_s=0.001).signal)
    ring = guest.start()
    ring.calls()
    os.eventfd_write(ring.call, (1 << 64) - 2)
    os.set_blocking(ring.call, True)
    with capture_logs() as logs:
        assert (await guest.request(T_FLUSH))[0] == S_OK
        await until(lambda: any("blocked" in line["event"] for line in logs))
        assert (await guest.request(T_FLUSH))[0] == S_OK
        await a_while()
    assert len([line for line in logs if "blocked" in line["event"]]) == 1


# Another process takes over


async def test_rings_that_are_quiet_are_handed_over_where_they_are(
    guest: DeviceGuest, autojump_clock: MockClock
) -> None:
    guest.start()
    for _ in range(3):
        await guest.request(T_FLUSH)

    assert not guest.device.is_quiet
    assert await guest.device.quiesce(1)
    late = guest.put(T_FLUSH)
    guest.rings[0].kick_device()
    await a_while()
    assert guest.device.is_quiet
    bases = guest.device.hand_over_rings()

    assert late.status == 0xEE
    assert guest.stopped_all == 0  # Nothing has to be at the server: the guest stays here.
    guest.start(base=bases[0])
    await until(lambda: late.status == S_OK)


async def test_rings_that_are_not_quiet_in_time_go_on(
    guest: DeviceGuest, autojump_clock: MockClock
) -> None:
    ring, pending = await with_one_held(guest, T_IN, room=512)
    started_s = trio.current_time()

    assert not await guest.device.quiesce(7)

    assert trio.current_time() - started_s == pytest.approx(7)
    assert not guest.device.is_quiet
    assert pending.status == 0xEE
    guest.disk.hold = False
    guest.disk.release()
    assert await guest.request(T_FLUSH) == (S_OK, b"")
    assert pending.status == S_OK
    assert ring is guest.rings[0]


# Long requests


async def test_stop_fails_long_requests_that_have_not_begun(autojump_clock: MockClock) -> None:
    disk = FakeDisk(8 << 20)
    disk.hold = True
    async with running_device(disk=disk, drain_timeout_s=1, size=64) as guest:
        await guest.connect()
        ring = guest.start()
        pending = []
        for _ in range(3):
            guest._token += 1
            header = guest.alloc(bytes(16))
            status = guest.alloc(b"\xee")
            data = [(0x200000, 1 << 20, 2)] * 8
            ring.add(guest._token, [(header, 16, 0), *data, (status, 1, 2)])
            pending.append(status)
        ring.kick_device()
        await until(lambda: bool(disk.held))
        await guest.device.stop_ring(0)
        assert [guest.memory[status] for status in pending] == [S_IOERR] * 3
        assert disk.held == []


async def test_views_of_long_chains_are_counted_for_all_rings_together() -> None:
    disk = FakeDisk()
    disk.hold = True
    async with running_device(disk=disk, size=128) as guest:
        await guest.connect()
        guest.device._long_views.count = MAX_LONG_VIEWS + 1  # of another ring
        ring = guest.start()
        for _ in range(3):
            guest._token += 1
            header = guest.alloc(bytes(16))
            status = guest.alloc(b"\xee")
            data = [(0x200000, 512, 2)] * 40
            ring.add(guest._token, [(header, 16, 0), *data, (status, 1, 2)])
        ring.kick_device()
        await a_while()
        assert guest.device._rings[0].in_flight == 1
        guest.device._long_views.count -= MAX_LONG_VIEWS + 1
        disk.release()
        await until(lambda: len(disk.held) == 2)
        disk.hold = False
        disk.release()
