"""The virtqueues of a front-end session: their set-up and their states.

vhost-user "Ring states". SET_VRING_KICK makes a ring *started*, as in libvhost-user (waiting for
the first kick instead would lose nothing, but a polling driver never kicks), and GET_VRING_BASE
stops it. SET_VRING_ENABLE makes it *enabled*; without bit 30 it always is. It is *live*, which
means that the device serves it, from the moment when it is started, enabled and completely
described until it is stopped. Disabling a live ring only suspends it. NUM, ADDR, BASE, KICK, CALL,
ERR and ENABLE may come in any order; the message that completes the description starts the ring.
"""

from __future__ import annotations

import os

from bridge.errors import LeftBehind, ProtocolError
from bridge.guest.vhost_user.device_interface import RingSetup, VhostUserDevice
from bridge.guest.vhost_user.messages import (
    F_PROTOCOL_FEATURES,
    VRING_LOG,
    Message,
    MessageType,
    VringAddress,
    VringFile,
    VringState,
    message_of,
    pack_reply,
)
from bridge.guest.vhost_user.reply import Handler, Reply
from bridge.spec.virtqueue import F_RING_PACKED

MAX_VRING_SIZE = 32768
_ERR = MessageType.SET_VRING_ERR


class Ring:
    """The front-end's description of one virtqueue, and the descriptors that came with it."""

    __slots__ = (
        "address",
        "base",
        "call_fd",
        "enabled",
        "error_fd",
        "index",
        "kick_fd",
        "live",
        "size",
        "started",
        "suspended",
    )

    def __init__(self, index: int) -> None:
        self.index = index
        self.call_fd: int | None = None
        self.error_fd: int | None = None
        self.kick_fd: int | None = None
        self.forget_setup()

    def forget_setup(self) -> None:
        """Return to the initial state, but keep the descriptors."""
        self.size = 0
        self.address: VringAddress | None = None
        self.base = 0
        self.enabled = False
        self.started = False
        self.live = False
        self.suspended = False

    @property
    def complete(self) -> bool:
        """Started and completely described, so that it can run."""
        return self.started and self.size > 0 and self.address is not None


class Rings:
    """Every ring of one session. Owns the eventfds that its handlers keep."""

    def __init__(self, device: VhostUserDevice) -> None:
        self._device = device
        self._all = [Ring(index) for index in range(device.max_queues)]
        self.features: int | None = None
        """The negotiated features, with the session's own bits; None: not negotiated yet, so that
        no ring runs. Call `features_changed` after setting it."""

    def handlers(self) -> dict[MessageType, Handler]:
        """The handlers of the messages about rings."""
        return {
            MessageType.SET_VRING_NUM: self.set_vring_num,
            MessageType.SET_VRING_ADDR: self.set_vring_addr,
            MessageType.SET_VRING_BASE: self.set_vring_base,
            MessageType.GET_VRING_BASE: self.get_vring_base,
            MessageType.SET_VRING_KICK: self.set_vring_kick,
            MessageType.SET_VRING_CALL: self.set_vring_call,
            MessageType.SET_VRING_ERR: self.set_vring_err,
            MessageType.SET_VRING_ENABLE: self.set_vring_enable,
        }

    def messages(self, bases: dict[int, int]) -> list[Message]:
        """What brings another session's rings into the state of these. `bases`: where the rings
        that were served go on. The descriptors stay ours."""
        return [each for ring in self._all for each in _described(ring, bases)]

    @property
    def any_live(self) -> bool:
        """The device serves a ring, or would if it were not suspended."""
        return any(ring.live for ring in self._all)

    def features_changed(self) -> None:
        """Start the rings that may run with the new features: without bit 30 all are enabled."""
        for ring in self._all:
            self._start_if_ready(ring)

    async def stop_all(self) -> None:
        """Stop every ring. Raises LeftBehind as `stop_ring` does, after all have stopped."""
        left_behind: LeftBehind | None = None
        for ring in self._all:
            try:
                await self._stop(ring)
            except LeftBehind as error:
                left_behind = error
        if left_behind is not None:
            raise left_behind

    def forget_setups(self) -> None:
        """Return every ring to its initial state, but keep its eventfds. No ring may be live."""
        for ring in self._all:
            ring.forget_setup()

    def close(self) -> None:
        """Close every eventfd. The device must have stopped using them."""
        for ring in self._all:
            _close(ring.kick_fd)
            _close(ring.call_fd)
            _close(ring.error_fd)
        self._all = []

    def _ring(self, index: int) -> Ring:
        if index >= len(self._all):
            raise ProtocolError(f"queue {index}, there are {len(self._all)}")
        return self._all[index]

    def _start_if_ready(self, ring: Ring) -> None:
        """Have the device run, suspend or resume `ring`, as its state requires.

        After a ProtocolError the ring is stopped; only a new SET_VRING_KICK starts it again.
        """
        features = self.features
        if features is None:
            return
        enabled = ring.enabled or not features & F_PROTOCOL_FEATURES
        if ring.live:
            if enabled and ring.suspended:
                self._device.resume_ring(ring.index)
            elif not enabled and not ring.suspended:
                self._device.suspend_ring(ring.index)
            ring.suspended = not enabled
            return
        if not (enabled and ring.complete):
            return
        try:
            self._device.start_ring(ring.index, self._ring_setup(ring, features))
        except BaseException:
            ring.started = False
            _close(ring.kick_fd)
            ring.kick_fd = None
            raise
        ring.live = True
        ring.suspended = False

    def _ring_setup(self, ring: Ring, features: int) -> RingSetup:
        address = ring.address
        assert address is not None
        if not features & F_RING_PACKED and ring.size & (ring.size - 1):
            raise ProtocolError(f"queue {ring.index}: size {ring.size} is not a power of two")
        return RingSetup(
            size=ring.size,
            desc_user_address=address.desc,
            avail_user_address=address.avail,
            used_user_address=address.used,
            log_guest_address=_log_address(address),
            base=ring.base if features & F_RING_PACKED else ring.base & 0xFFFF,
            kick_fd=ring.kick_fd,
            call_fd=ring.call_fd,
            error_fd=ring.error_fd,
        )

    async def _stop(self, ring: Ring) -> None:
        """Stop the ring and forget its kick."""
        try:
            if ring.live:
                # Before waiting: if that fails or is cancelled, the ring must not be served again.
                ring.live = False
                ring.base = await self._device.stop_ring(ring.index)
        finally:
            ring.started = False
            ring.suspended = False
            _close(ring.kick_fd)
            ring.kick_fd = None

    async def set_vring_num(self, payload: bytes, fds: list[int]) -> None:
        state = VringState.unpack(payload)
        ring = self._ring(state.index)
        limit = min(self._device.max_queue_size, MAX_VRING_SIZE)
        if not 0 < state.num <= limit:
            raise ProtocolError(f"queue {state.index}: size {state.num}, the limit is {limit}")
        if ring.live and state.num != ring.size:
            raise ProtocolError(f"queue {state.index}: the size changes while it runs")
        ring.size = state.num
        self._start_if_ready(ring)

    async def set_vring_addr(self, payload: bytes, fds: list[int]) -> None:
        """Set the ring's addresses. While it runs only the log flag may change (migration)."""
        address = VringAddress.unpack(payload)
        ring = self._ring(address.index)
        if address.flags & ~VRING_LOG:
            raise ProtocolError(f"queue {address.index}: unknown flags {address.flags:#x}")
        before = ring.address
        if ring.live:
            assert before is not None
            if (address.desc, address.used, address.avail) != (
                before.desc,
                before.used,
                before.avail,
            ):
                raise ProtocolError(f"queue {address.index}: addresses change while it runs")
            if _log_address(address) != _log_address(before):
                self._device.set_ring_log(ring.index, _log_address(address))
            ring.address = address
            return
        ring.address = address
        self._start_if_ready(ring)

    async def set_vring_base(self, payload: bytes, fds: list[int]) -> None:
        state = VringState.unpack(payload)
        ring = self._ring(state.index)
        if ring.live:
            raise ProtocolError(f"queue {state.index}: the base changes while it runs")
        ring.base = state.num
        self._start_if_ready(ring)

    async def get_vring_base(self, payload: bytes, fds: list[int]) -> Reply:
        state = VringState.unpack(payload)
        ring = self._ring(state.index)
        if state.num:
            raise ProtocolError(f"queue {state.index}: num is {state.num}, not 0")
        await self._stop(ring)
        answer = VringState(state.index, ring.base)
        return Reply(pack_reply(MessageType.GET_VRING_BASE, answer.pack()))

    async def set_vring_kick(self, payload: bytes, fds: list[int]) -> None:
        file = VringFile.unpack(payload)
        ring = self._ring(file.index)
        new = _take_eventfd(file, fds)
        if ring.live:
            try:
                self._device.set_kick(ring.index, new)
            except BaseException:
                _close(new)  # the device keeps the old one
                raise
        old, ring.kick_fd = ring.kick_fd, new
        _close(old)
        if not ring.live:
            ring.started = True
            self._start_if_ready(ring)

    async def set_vring_call(self, payload: bytes, fds: list[int]) -> None:
        file = VringFile.unpack(payload)
        ring = self._ring(file.index)
        old, ring.call_fd = ring.call_fd, _take_eventfd(file, fds)
        try:
            if ring.live:
                self._device.set_call(ring.index, ring.call_fd)
        finally:
            _close(old)

    async def set_vring_err(self, payload: bytes, fds: list[int]) -> None:
        file = VringFile.unpack(payload)
        ring = self._ring(file.index)
        old, ring.error_fd = ring.error_fd, _take_eventfd(file, fds)
        try:
            if ring.live:
                self._device.set_error(ring.index, ring.error_fd)
        finally:
            _close(old)

    async def set_vring_enable(self, payload: bytes, fds: list[int]) -> None:
        state = VringState.unpack(payload)
        ring = self._ring(state.index)
        if state.num not in (0, 1):
            raise ProtocolError(f"queue {state.index}: enable is {state.num}, not 0 or 1")
        if self.features is not None and not self.features & F_PROTOCOL_FEATURES:
            # Rings are enabled from the start then. Enabling one again is harmless.
            if not state.num:
                raise ProtocolError(f"queue {state.index}: disabled without bit 30")
            return
        ring.enabled = bool(state.num)
        self._start_if_ready(ring)


def _described(ring: Ring, bases: dict[int, int]) -> list[Message]:
    index, found = ring.index, []
    if ring.size:
        found.append(_state(MessageType.SET_VRING_NUM, index, ring.size))
    if ring.address is not None:
        found.append(message_of(MessageType.SET_VRING_ADDR, ring.address.pack()))
    base = bases.get(index, ring.base)
    found.append(_state(MessageType.SET_VRING_BASE, index, base))
    for kind, fd in ((MessageType.SET_VRING_CALL, ring.call_fd), (_ERR, ring.error_fd)):
        if fd is not None:
            found.append(message_of(kind, VringFile(index, True).pack(), [fd]))
    if ring.enabled:
        found.append(_state(MessageType.SET_VRING_ENABLE, index, 1))
    if ring.started:
        kick = VringFile(index, ring.kick_fd is not None).pack()
        fds = [] if ring.kick_fd is None else [ring.kick_fd]
        found.append(message_of(MessageType.SET_VRING_KICK, kick, fds))
    if ring.suspended:
        # It was served once: it is suspended, and not waiting to be enabled.
        found.insert(-1, _state(MessageType.SET_VRING_ENABLE, index, 1))
        found.append(_state(MessageType.SET_VRING_ENABLE, index, 0))
    return found


def _state(kind: MessageType, index: int, number: int) -> Message:
    return message_of(kind, VringState(index, number).pack())


def _take_eventfd(file: VringFile, fds: list[int]) -> int | None:
    """Take the message's eventfd out of `fds`, made non-blocking; None when it brought none.

    The device writes to it and waits for it. So it must not block, and must not be, for instance, a
    pipe or a socket of another process.
    """
    if not file.has_fd:
        return None
    fd = fds[0]
    if not _is_eventfd(fd):
        raise ProtocolError(f"queue {file.index}: the descriptor is not an eventfd")
    os.set_blocking(fd, False)
    return fds.pop(0)


def _is_eventfd(fd: int) -> bool:
    try:
        return os.readlink(f"/proc/self/fd/{fd}") == "anon_inode:[eventfd]"
    except OSError:
        return True  # no /proc in this container: the device handles errors of the descriptor


def _log_address(address: VringAddress) -> int | None:
    return address.log if address.flags & VRING_LOG else None


def _close(fd: int | None) -> None:
    if fd is not None:
        os.close(fd)
