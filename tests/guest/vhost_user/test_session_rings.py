"""The states of a ring, in any order of messages (rules `notify` and `session`)."""

from __future__ import annotations

import itertools
import os

import pytest
import trio
import trio.testing

from bridge.errors import LeftBehind, ProtocolError
from bridge.guest.vhost_user.messages import (
    F_PROTOCOL_FEATURES,
    VRING_LOG,
    MessageType,
    VringFile,
    VringState,
    pack_u64,
)
from tests.guest.vhost_user.fakes import (
    F_PACKED,
    F_VERSION_1,
    FakeDevice,
    Talk,
    eventfd,
    memfd,
    open_fds,
    ring_address,
)


def state(num: int, index: int = 0) -> bytes:
    return VringState(index, num).pack()


def file(index: int = 0, has_fd: bool = True) -> bytes:
    return VringFile(index, has_fd).pack()


STEPS = {
    "NUM": lambda: (MessageType.SET_VRING_NUM, state(128), []),
    "BASE": lambda: (MessageType.SET_VRING_BASE, state(77), []),
    "ADDR": lambda: (MessageType.SET_VRING_ADDR, ring_address().pack(), []),
    "CALL": lambda: (MessageType.SET_VRING_CALL, file(), [eventfd()]),
    "KICK": lambda: (MessageType.SET_VRING_KICK, file(), [eventfd()]),
}


@pytest.mark.parametrize("order", list(itertools.permutations(STEPS)), ids="-".join)
async def test_ring_described_in_any_order_starts_with_everything(
    talk: Talk, order: tuple[str, ...]
) -> None:
    await talk.negotiate()

    for step in order:
        request, payload, fds = STEPS[step]()
        await talk.send(request, payload, fds)
    assert "start_ring" not in talk.device.names()
    await talk.send(MessageType.SET_VRING_ENABLE, state(1))

    ring = talk.device.rings[0]
    address = ring_address()
    assert (ring.size, ring.base, ring.log_guest_address) == (128, 77, None)
    assert ring.desc_user_address == address.desc
    assert ring.avail_user_address == address.avail
    assert ring.used_user_address == address.used
    assert ring.kick_fd is not None
    assert ring.call_fd is not None
    assert ring.error_fd is None


async def test_repeated_messages_of_a_running_ring_change_nothing(talk: Talk) -> None:
    await talk.negotiate()
    await talk.run_ring()
    talk.device.calls.clear()

    assert await talk.ask(MessageType.SET_VRING_NUM, state(128)) == 0
    assert await talk.ask(MessageType.SET_VRING_ADDR, ring_address().pack()) == 0
    assert await talk.ask(MessageType.SET_VRING_ENABLE, state(1)) == 0
    assert talk.device.names() == ["resume_ring"] * talk.device.names().count("resume_ring")


@pytest.mark.parametrize(
    ("request_", "payload"),
    [
        (MessageType.SET_VRING_NUM, state(64)),
        (MessageType.SET_VRING_BASE, state(5)),
        (MessageType.SET_VRING_ADDR, ring_address(shift=4096).pack()),
    ],
)
async def test_running_ring_cannot_be_moved(
    talk: Talk, request_: MessageType, payload: bytes
) -> None:
    await talk.negotiate()
    await talk.run_ring()

    assert await talk.ask(request_, payload) == 1
    assert talk.device.names()[-1] != "start_ring" or 0 in talk.device.rings


async def test_ring_without_kick_fd_is_polled(talk: Talk) -> None:
    await talk.negotiate()
    await talk.send(MessageType.SET_VRING_NUM, state(8))
    await talk.send(MessageType.SET_VRING_ADDR, ring_address().pack())
    await talk.send(MessageType.SET_VRING_KICK, file(has_fd=False))
    await talk.send(MessageType.SET_VRING_CALL, file(has_fd=False))
    await talk.send(MessageType.SET_VRING_ENABLE, state(1))

    assert talk.device.rings[0].kick_fd is None
    assert talk.device.rings[0].call_fd is None


async def test_ring_disabled_and_enabled_is_suspended_and_resumed(talk: Talk) -> None:
    await talk.negotiate()
    await talk.run_ring()
    talk.device.calls.clear()

    await talk.send(MessageType.SET_VRING_ENABLE, state(0))
    await talk.send(MessageType.SET_VRING_ENABLE, state(0))
    assert talk.device.suspended == {0}
    await talk.send(MessageType.SET_VRING_ENABLE, state(1))

    assert talk.device.names() == ["suspend_ring", "resume_ring"]


async def test_ring_enabled_while_stopped_starts_with_its_kick(talk: Talk) -> None:
    await talk.negotiate()
    await talk.send(MessageType.SET_VRING_ENABLE, state(1))
    assert talk.device.rings == {}

    await talk.set_up_ring()

    assert 0 in talk.device.rings


async def test_stopped_ring_answers_the_devices_base_and_keeps_enabled(talk: Talk) -> None:
    await talk.negotiate()
    await talk.run_ring()

    reply = await talk.send(MessageType.GET_VRING_BASE, state(0))

    assert reply is not None
    assert VringState.unpack(reply.data[12:]) == VringState(0, talk.device.stop_base)
    assert talk.device.rings == {}
    await talk.send(MessageType.SET_VRING_KICK, file(), [eventfd()])
    assert talk.device.rings[0].base == talk.device.stop_base


async def test_base_of_a_ring_that_never_ran_is_what_was_set(talk: Talk) -> None:
    await talk.negotiate()
    await talk.send(MessageType.SET_VRING_BASE, state(42))

    reply = await talk.send(MessageType.GET_VRING_BASE, state(0))

    assert reply is not None
    assert VringState.unpack(reply.data[12:]) == VringState(0, 42)
    assert talk.device.names() == ["set_features"]


async def test_stop_is_answered_only_after_the_device_is_done(talk: Talk) -> None:
    await talk.negotiate()
    await talk.run_ring()
    drained = trio.Event()

    async def slow(index: int) -> int:
        await drained.wait()
        return 9

    talk.device.stop_ring = slow  # type: ignore[method-assign]
    replies = []

    async def stop() -> None:
        replies.append(await talk.send(MessageType.GET_VRING_BASE, state(0)))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(stop)
        await trio.testing.wait_all_tasks_blocked()
        assert replies == []
        drained.set()
    assert replies


async def test_stopped_ring_has_its_kick_closed(talk: Talk) -> None:
    await talk.negotiate()
    await talk.run_ring()
    before = open_fds()

    await talk.send(MessageType.GET_VRING_BASE, state(0))

    assert open_fds() == before - 1


@pytest.mark.parametrize("num", [1, 0xFFFFFFFF])
async def test_stop_with_num_other_than_0_is_refused(talk: Talk, num: int) -> None:
    await talk.negotiate()

    with pytest.raises(ProtocolError):
        await talk.send(MessageType.GET_VRING_BASE, state(num))


async def test_split_base_keeps_only_its_low_16_bits(talk: Talk) -> None:
    await talk.negotiate()
    await talk.send(MessageType.SET_VRING_ENABLE, state(1))

    await talk.set_up_ring(base=0x1_8005)

    assert talk.device.rings[0].base == 0x8005


async def test_packed_base_keeps_all_32_bits_and_any_size(talk: Talk) -> None:
    await talk.negotiate(F_VERSION_1 | F_PACKED | F_PROTOCOL_FEATURES)
    await talk.send(MessageType.SET_VRING_ENABLE, state(1))

    await talk.set_up_ring(base=0x8005_8005, size=100)

    assert talk.device.rings[0].base == 0x8005_8005
    assert talk.device.rings[0].size == 100


@pytest.mark.parametrize("size", [0, 1025, 0x10001, 0xFFFFFFFF])
async def test_queue_size_out_of_range_is_refused(talk: Talk, size: int) -> None:
    """CVE-2026-61402: the size was taken as it came."""
    await talk.negotiate()

    assert await talk.ask(MessageType.SET_VRING_NUM, state(size)) == 1


async def test_split_queue_size_not_a_power_of_two_does_not_start(talk: Talk) -> None:
    await talk.negotiate()
    await talk.set_up_ring(size=100)

    assert await talk.ask(MessageType.SET_VRING_ENABLE, state(1)) == 1
    assert talk.device.rings == {}


@pytest.mark.parametrize("index", [4, 255, 256, 0x10000, 0xFFFFFFFF])
@pytest.mark.parametrize(
    "request_",
    [MessageType.SET_VRING_NUM, MessageType.SET_VRING_BASE, MessageType.SET_VRING_ENABLE],
)
async def test_unknown_queue_is_refused_by_its_full_width(
    talk: Talk, request_: MessageType, index: int
) -> None:
    """CVE-2020-10723: a 32-bit index was checked after it was cut to 16 bits."""
    await talk.negotiate()

    assert await talk.ask(request_, state(1, index)) == 1


@pytest.mark.parametrize("index", [4, 0x10000, 0xFFFFFFFF])
async def test_stop_or_address_of_an_unknown_queue_is_refused(talk: Talk, index: int) -> None:
    await talk.negotiate()

    assert await talk.ask(MessageType.SET_VRING_ADDR, ring_address(index & 0xFF).pack()) in (0, 1)
    with pytest.raises(ProtocolError):
        await talk.send(MessageType.GET_VRING_BASE, state(0, index))


@pytest.mark.parametrize(
    "request_", [MessageType.SET_VRING_KICK, MessageType.SET_VRING_CALL, MessageType.SET_VRING_ERR]
)
async def test_eventfd_of_an_unknown_queue_is_refused_and_closed(
    talk: Talk, request_: MessageType
) -> None:
    await talk.negotiate()

    assert await talk.ask(request_, file(4), [eventfd()]) == 1


@pytest.mark.parametrize("num", [2, 0xFFFFFFFF])
async def test_enable_other_than_0_or_1_is_refused(talk: Talk, num: int) -> None:
    await talk.negotiate()

    assert await talk.ask(MessageType.SET_VRING_ENABLE, state(num)) == 1


async def test_without_bit_30_rings_can_be_enabled_but_not_disabled(talk: Talk) -> None:
    await talk.negotiate(F_VERSION_1)

    assert await talk.ask(MessageType.SET_VRING_ENABLE, state(1)) == 0
    assert await talk.ask(MessageType.SET_VRING_ENABLE, state(0)) == 1


@pytest.mark.parametrize(
    ("request_", "name"),
    [
        (MessageType.SET_VRING_KICK, "set_kick"),
        (MessageType.SET_VRING_CALL, "set_call"),
        (MessageType.SET_VRING_ERR, "set_error"),
    ],
)
async def test_eventfd_of_a_running_ring_is_replaced_and_the_old_one_closed(
    talk: Talk, request_: MessageType, name: str
) -> None:
    await talk.negotiate()
    await talk.run_ring()
    await talk.send(request_, file(), [eventfd()])
    before = open_fds()

    for _ in range(5):
        await talk.send(request_, file(), [eventfd()])
    assert open_fds() == before
    await talk.send(request_, file(has_fd=False))

    assert open_fds() == before - 1
    assert talk.device.calls[-1] == (name, 0, None)


async def test_eventfd_replaced_is_still_open_while_the_device_lets_go_of_it(talk: Talk) -> None:
    await talk.negotiate()
    await talk.run_ring()
    old = talk.device.rings[0].kick_fd
    assert old is not None

    class Checks(Exception):
        pass

    def set_kick(index: int, fd: int | None) -> None:
        os.fstat(old)
        raise Checks

    talk.device.set_kick = set_kick  # type: ignore[method-assign]
    with pytest.raises(Checks):
        await talk.send(MessageType.SET_VRING_KICK, file(), [eventfd()])


@pytest.mark.parametrize("make", [memfd, lambda: os.pipe2(os.O_CLOEXEC)[1], lambda: os.dup(2)])
@pytest.mark.parametrize(
    "request_", [MessageType.SET_VRING_KICK, MessageType.SET_VRING_CALL, MessageType.SET_VRING_ERR]
)
async def test_descriptor_that_is_not_an_eventfd_is_refused(
    request_: MessageType, make: object
) -> None:
    talk = Talk()
    await talk.negotiate()

    assert await talk.ask(request_, file(), [make()]) == 1  # type: ignore[operator]
    await talk.session.close()


async def test_eventfd_is_made_non_blocking_so_that_nothing_can_hang(talk: Talk) -> None:
    await talk.negotiate()
    await talk.run_ring()

    for fd in (talk.device.rings[0].kick_fd, talk.device.rings[0].call_fd):
        assert fd is not None
        assert not os.get_blocking(fd)


async def test_ring_that_the_device_refuses_needs_a_new_kick(talk: Talk) -> None:
    await talk.negotiate()
    await talk.set_up_ring()
    talk.device.refuse.add("start_ring")
    assert await talk.ask(MessageType.SET_VRING_ENABLE, state(1)) == 1
    talk.device.refuse.clear()

    assert await talk.ask(MessageType.SET_VRING_ENABLE, state(1)) == 0
    assert talk.device.rings == {}
    assert await talk.ask(MessageType.SET_VRING_KICK, file(), [eventfd()]) == 0
    assert 0 in talk.device.rings


async def test_log_flag_of_a_running_ring_can_change(talk: Talk) -> None:
    await talk.negotiate()
    await talk.run_ring()
    talk.device.calls.clear()

    logged = ring_address(flags=VRING_LOG, log=0x5000).pack()
    for payload in (logged, logged, ring_address().pack()):
        assert await talk.ask(MessageType.SET_VRING_ADDR, payload) == 0

    assert talk.device.calls == [("set_ring_log", 0, 0x5000), ("set_ring_log", 0, None)]


async def test_unknown_address_flags_are_refused(talk: Talk) -> None:
    await talk.negotiate()

    assert await talk.ask(MessageType.SET_VRING_ADDR, ring_address(flags=2).pack()) == 1


async def test_reset_device_forgets_rings_but_not_eventfds(talk: Talk) -> None:
    await talk.negotiate()
    await talk.run_ring()

    assert await talk.ask(MessageType.RESET_DEVICE) == 0
    assert talk.device.names()[-2:] == ["stop_ring", "reset"]
    await talk.send(MessageType.SET_FEATURES, pack_u64(F_VERSION_1 | F_PROTOCOL_FEATURES))
    await talk.send(MessageType.SET_VRING_ENABLE, state(1))
    assert talk.device.rings == {}
    await talk.set_up_ring()
    assert 0 in talk.device.rings


def leave_behind(talk: Talk) -> None:
    """The device cannot bring everything to where the next host looks."""
    stop_ring = talk.device.stop_ring

    async def stop(index: int) -> int:
        await stop_ring(index)
        raise LeftBehind("4096 bytes")

    talk.device.stop_ring = stop  # type: ignore[method-assign]


async def test_stop_that_leaves_something_behind_ends_the_conversation(talk: Talk) -> None:
    """The reply of GET_VRING_BASE has no room for a failure."""
    leave_behind(talk)
    await talk.negotiate()
    await talk.run_ring()

    with pytest.raises(LeftBehind):
        await talk.send(MessageType.GET_VRING_BASE, state(0))
    await talk.send(MessageType.SET_VRING_ENABLE, state(1))
    assert talk.device.rings == {}


@pytest.mark.parametrize(
    ("request_", "payload"),
    [(MessageType.SET_STATUS, pack_u64(0)), (MessageType.RESET_DEVICE, b"")],
)
async def test_reset_that_leaves_something_behind_is_answered_with_failure(
    talk: Talk, request_: MessageType, payload: bytes
) -> None:
    leave_behind(talk)
    await talk.negotiate()
    await talk.run_ring(0)
    await talk.run_ring(1)

    assert await talk.ask(request_, payload) == 1
    assert talk.device.rings == {}
    assert ("reset" in talk.device.names()) == (request_ == MessageType.RESET_DEVICE)


async def test_queues_are_independent(talk: Talk) -> None:
    await talk.negotiate()
    for index in range(4):
        await talk.run_ring(index)

    await talk.send(MessageType.GET_VRING_BASE, state(0, 2))

    assert set(talk.device.rings) == {0, 1, 3}


async def test_session_cancelled_while_a_ring_stops_forgets_the_ring(no_fd_leak: None) -> None:
    device = FakeDevice()
    talk = Talk(device)
    await talk.negotiate()
    await talk.run_ring()

    async def never(index: int) -> int:
        await trio.sleep_forever()
        return 0

    device.stop_ring = never  # type: ignore[method-assign]
    with trio.CancelScope() as scope:
        scope.cancel()
        await talk.send(MessageType.GET_VRING_BASE, state(0))

    await talk.session.close()
