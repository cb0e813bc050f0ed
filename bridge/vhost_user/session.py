"""One front-end's conversation with the back-end, without sockets.

`handle(message)` takes a message, checks it, tells the device what it means, and returns the
reply, if there is one to send. It is `async` only because the device must quiesce rings.

Rules that hold everywhere (vhost-user "Communication"):

- A reply is sent only to a message that asks: requests with a reply of their own always, every
  other one when it says need_reply and REPLY_ACK was negotiated (0 = done, 1 = refused). A front
  end that gets a reply it does not expect is out of step for good.
- A refused message changes nothing but what its method's text says. When nobody asked how it
  went, refusing means ending the conversation (`ProtocolError` leaves `handle`).
- Every descriptor that came with a message belongs to the session. Each is closed exactly once:
  at the end of `handle` unless a ring or the back-end channel keeps it, else when it is replaced,
  else in `close()`.

States of a ring (vhost-user "Ring states"). A ring is *started* by SET_VRING_KICK (as libvhost-user
does it; waiting for the first kick would lose nothing, but polling drivers never kick) and
stopped by GET_VRING_BASE. It is *enabled* by SET_VRING_ENABLE, or always when bit 30 was not
negotiated. It is *live*, known to the device, from the moment when it is started, enabled and
completely described until it is stopped; disabling a live ring only suspends it. NUM, ADDR, BASE,
KICK, CALL, ERR and ENABLE may come in any order; whichever makes the description complete
starts the ring.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from bridge.errors import ProtocolError
from bridge.vhost_user.device import MemoryRegion, RingSetup, VhostUserDevice
from bridge.vhost_user.messages import (
    F_LOG_ALL,
    F_PROTOCOL_FEATURES,
    F_RING_PACKED,
    MAX_CONFIG_BYTES,
    MAX_TABLE_REGIONS,
    P_BACKEND_REQ,
    P_CONFIG,
    P_CONFIGURE_MEM_SLOTS,
    P_INFLIGHT_SHMFD,
    P_LOG_SHMFD,
    P_MQ,
    P_REPLY_ACK,
    P_RESET_DEVICE,
    P_STATUS,
    SHAPES,
    U64_MAX,
    VRING_LOG,
    BackendRequest,
    ConfigAccess,
    InflightRange,
    LogRange,
    Message,
    Region,
    Request,
    VringAddress,
    VringFile,
    VringState,
    check_shape,
    pack_message,
    pack_reply,
    pack_u64,
    request_name,
    unpack_memory_table,
    unpack_u64,
)

MAX_MEMORY_SLOTS = 509
"""What rust-vmm and libvhost-user answer too; QEMU's own limit is 512."""
MAX_VRING_SIZE = 32768
STATUS_FEATURES_OK = 8
STATUS_NEEDS_RESET = 64

_CONFIG_REQUEST_FLAGS = frozenset({0, 1, 2})
"""By the specification 0 is the guest and 1 migration; by rust-vmm, which took them for bits, 1 is
the guest and 2 migration. Told apart by length: a guest writes one field, of one byte."""


@dataclass(slots=True)
class Reply:
    """What to send. `fd` goes along; whoever sends it closes it afterwards, sent or not."""

    data: bytes
    fd: int | None = None


class _Ring:
    """What the front-end has said about one virtqueue, and the descriptors it gave."""

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
        """Back to the initial state, except for the descriptors."""
        self.size = 0
        self.address: VringAddress | None = None
        self.base = 0
        self.enabled = False
        self.started = False
        self.live = False
        self.suspended = False

    @property
    def complete(self) -> bool:
        """Started, and described well enough to run."""
        return self.started and self.size > 0 and self.address is not None


class Session:
    """The back-end's side of one connection. See the module's text.

    `send_to_front_end(fd, data)` puts a message into the front-end's back-end channel without
    ever waiting; False means that the channel is dead.
    """

    def __init__(
        self, device: VhostUserDevice, send_to_front_end: Callable[[int, bytes], bool]
    ) -> None:
        self._device = device
        self._send_to_front_end = send_to_front_end
        self._features: int | None = None
        self._protocol_features = 0
        self._status = 0
        self._regions: list[Region] = []
        self._rings = [_Ring(index) for index in range(device.max_queues)]
        self._channel_fd: int | None = None
        self._config_changed = False
        self._fds: list[int] = []
        self._closed = False
        device.on_config_changed = self._note_config_changed

    # The edge's side.

    async def handle(self, message: Message) -> Reply | None:
        """Do what `message` asks; the reply to send, if it asks for one.

        Takes over the message's descriptors. Raises ProtocolError when the conversation is over;
        then only `close()` may follow. Cancellation closes the descriptors, too.
        """
        self._fds = message.fds
        try:
            return await self._answer(message)
        finally:
            while self._fds:
                os.close(self._fds.pop())
            self._tell_config_changed()

    async def close(self) -> None:
        """The conversation is over: the device drops everything, every descriptor is closed.

        Idempotent. Takes as long as the device needs to finish what is in flight (bounded).
        """
        if self._closed:
            return
        self._closed = True
        self._device.on_config_changed = None
        try:
            await self._device.disconnected()
        finally:
            for ring in self._rings:
                _close(ring.kick_fd)
                _close(ring.call_fd)
                _close(ring.error_fd)
            _close(self._channel_fd)

    # Dispatch.

    async def _answer(self, message: Message) -> Reply | None:
        header = message.header
        own_reply = False
        try:
            request, handler = self._find(header.request)
            shape = SHAPES[request]
            own_reply = shape.replies
            if shape.feature and not self._protocol_features & shape.feature:
                raise ProtocolError(f"{request.name} needs a protocol feature not negotiated")
            check_shape(request, message.payload, len(message.fds))
            reply = await handler(self, message.payload)
        except (ProtocolError, OSError) as error:
            # OSError: a file or eventfd of the front-end's that does not do what one does.
            refusal = self._refusal(message)
            if refusal is None:
                name = request_name(header.request)
                raise ProtocolError(f"{name}: {error}") from error
            return refusal
        if own_reply:
            assert reply is not None
            return reply
        return self._acknowledge(message, 0)

    def _find(self, number: int) -> tuple[Request, _Handler]:
        try:
            request = Request(number)
        except ValueError:
            raise ProtocolError("unknown request") from None
        return request, _HANDLERS[request]

    def _acknowledge(self, message: Message, result: int) -> Reply | None:
        if not (message.header.need_reply and self._protocol_features & P_REPLY_ACK):
            return None
        return Reply(pack_reply(message.header.request, pack_u64(result)))

    def _refusal(self, message: Message) -> Reply | None:
        """How to say no to `message`; None when there is no way but to hang up."""
        request = message.header.request
        if request == Request.GET_CONFIG:
            # "uses zero length of payload to indicate an error"
            return Reply(pack_reply(request, b""))
        if request in _REPLY_HAS_NO_ERROR:
            return None
        return self._acknowledge(message, 1)

    # Features.

    def _offered_features(self) -> int:
        features = self._device.offered_features() | F_PROTOCOL_FEATURES
        return features | F_LOG_ALL if self._device.supports_dirty_log else features

    def _offered_protocol_features(self) -> int:
        features = (
            P_MQ
            | P_REPLY_ACK
            | P_BACKEND_REQ
            | P_CONFIG
            | P_RESET_DEVICE
            | P_CONFIGURE_MEM_SLOTS
            | P_STATUS
        )
        if self._device.supports_dirty_log:
            features |= P_LOG_SHMFD
        if self._device.supports_inflight:
            features |= P_INFLIGHT_SHMFD
        return features

    async def _get_features(self, payload: bytes) -> Reply:
        return Reply(pack_reply(Request.GET_FEATURES, pack_u64(self._offered_features())))

    async def _set_features(self, payload: bytes) -> None:
        """New features, or only LOG_ALL toggled: migration does that while rings run."""
        features = unpack_u64(payload)
        surplus = features & ~self._offered_features()
        if surplus:
            raise ProtocolError(f"features {surplus:#x} were not offered")
        before = self._features
        if before is None or (before ^ features) & ~F_LOG_ALL:
            if any(ring.live for ring in self._rings):
                raise ProtocolError("features other than LOG_ALL change while rings run")
            self._device.set_features(features & ~(F_LOG_ALL | F_PROTOCOL_FEATURES))
        self._features = features
        if self._device.supports_dirty_log and ((before or 0) ^ features) & F_LOG_ALL:
            self._device.set_logging(bool(features & F_LOG_ALL))
        for ring in self._rings:
            self._start_if_ready(ring)

    async def _get_protocol_features(self, payload: bytes) -> Reply:
        return Reply(
            pack_reply(Request.GET_PROTOCOL_FEATURES, pack_u64(self._offered_protocol_features()))
        )

    async def _set_protocol_features(self, payload: bytes) -> None:
        features = unpack_u64(payload)
        surplus = features & ~self._offered_protocol_features()
        if surplus:
            raise ProtocolError(f"protocol features {surplus:#x} were not offered")
        self._protocol_features = features

    async def _get_queue_num(self, payload: bytes) -> Reply:
        return Reply(pack_reply(Request.GET_QUEUE_NUM, pack_u64(self._device.max_queues)))

    async def _set_status(self, payload: bytes) -> None:
        """The driver's status byte; 0 is a virtio reset: rings stop, negotiation goes on."""
        status = unpack_u64(payload)
        if status > 0xFF:
            raise ProtocolError(f"status {status:#x} is more than a byte")
        self._status = status
        if status == 0:
            for ring in self._rings:
                await self._stop(ring)

    async def _get_status(self, payload: bytes) -> Reply:
        status = self._status
        if self._features is None:
            status &= ~STATUS_FEATURES_OK
        return Reply(pack_reply(Request.GET_STATUS, pack_u64(status)))

    async def _set_owner(self, payload: bytes) -> None:
        """There is one front-end per connection, and it is the owner."""

    async def _reset_owner(self, payload: bytes) -> None:
        """Deprecated. "It's better to just ignore this message"."""

    async def _reset_device(self, payload: bytes) -> None:
        """Initial state for a new driver; memory, descriptors and protocol features stay."""
        for ring in self._rings:
            await self._stop(ring)
        await self._device.reset()
        for ring in self._rings:
            ring.forget_setup()
        self._features = None
        self._status = 0

    # Config space.

    async def _get_config(self, payload: bytes) -> Reply:
        access = ConfigAccess.unpack(payload)
        if not 0 < access.size <= MAX_CONFIG_BYTES:
            raise ProtocolError(f"{access.size} bytes of config space asked for")
        data = self._device.read_config(access.offset, access.size)
        assert len(data) == access.size
        answer = ConfigAccess(access.offset, access.size, access.flags, data)
        return Reply(pack_reply(Request.GET_CONFIG, answer.pack()))

    async def _set_config(self, payload: bytes) -> None:
        access = ConfigAccess.unpack(payload)
        if not 0 < access.size <= MAX_CONFIG_BYTES:
            raise ProtocolError(f"{access.size} bytes of config space to be written")
        if access.flags not in _CONFIG_REQUEST_FLAGS:
            raise ProtocolError(f"unknown flags {access.flags:#x}")
        migration = access.flags == 2 or (access.flags == 1 and access.size > 1)
        self._device.write_config(access.offset, access.data, migration=migration)

    # Memory.

    async def _set_mem_table(self, payload: bytes) -> None:
        """All regions anew. On refusal there is no memory at all."""
        regions = unpack_memory_table(payload)
        if len(regions) > MAX_TABLE_REGIONS:
            raise ProtocolError(f"{len(regions)} memory regions, the limit is {MAX_TABLE_REGIONS}")
        checked: list[Region] = []
        for region in regions:
            _check_region(region, checked)
            checked.append(region)
        self._regions = []
        await self._device.replace_memory(
            [_memory_region(region, fd) for region, fd in zip(regions, self._fds, strict=True)]
        )
        self._regions = checked

    async def _add_mem_reg(self, payload: bytes) -> None:
        region = Region.unpack_single(payload)
        if len(self._regions) >= MAX_MEMORY_SLOTS:
            raise ProtocolError(f"more than {MAX_MEMORY_SLOTS} memory regions")
        _check_region(region, self._regions)
        await self._device.add_memory(_memory_region(region, self._fds[0]))
        self._regions.append(region)

    async def _rem_mem_reg(self, payload: bytes) -> None:
        """The region with these addresses and size; the file offset does not count."""
        wanted = Region.unpack_single(payload)
        for region in self._regions:
            if (region.guest_address, region.user_address, region.size_bytes) == (
                wanted.guest_address,
                wanted.user_address,
                wanted.size_bytes,
            ):
                break
        else:
            raise ProtocolError(f"no memory region at {wanted.guest_address:#x}")
        await self._device.remove_memory(
            guest_address=region.guest_address,
            user_address=region.user_address,
            size_bytes=region.size_bytes,
        )
        self._regions.remove(region)

    async def _get_max_mem_slots(self, payload: bytes) -> Reply:
        return Reply(pack_reply(Request.GET_MAX_MEM_SLOTS, pack_u64(MAX_MEMORY_SLOTS)))

    # Dirty log and in-flight region.

    async def _set_log_base(self, payload: bytes) -> Reply:
        log = LogRange.unpack(payload)
        _check_range(log.mmap_offset, log.mmap_size)
        self._device.set_log(self._fds[0], log.mmap_offset, log.mmap_size)
        return Reply(pack_reply(Request.SET_LOG_BASE, pack_u64(0)))

    async def _set_log_fd(self, payload: bytes) -> None:
        """An eventfd for a logger that wants to be woken. No front-end sends it; not used."""

    async def _get_inflight_fd(self, payload: bytes) -> Reply:
        wanted = InflightRange.unpack(payload)
        self._check_inflight(wanted)
        fd, size_bytes = self._device.create_inflight(wanted.num_queues, wanted.queue_size)
        answer = InflightRange(size_bytes, 0, wanted.num_queues, wanted.queue_size)
        return Reply(pack_reply(Request.GET_INFLIGHT_FD, answer.pack(len(payload))), fd)

    async def _set_inflight_fd(self, payload: bytes) -> None:
        region = InflightRange.unpack(payload)
        self._check_inflight(region)
        _check_range(region.mmap_offset, region.mmap_size)
        self._device.set_inflight(
            self._fds[0],
            region.mmap_offset,
            region.mmap_size,
            region.num_queues,
            region.queue_size,
        )

    def _check_inflight(self, region: InflightRange) -> None:
        if not 0 < region.num_queues <= self._device.max_queues:
            raise ProtocolError(
                f"in-flight region for {region.num_queues} queues, "
                f"there are {self._device.max_queues}"
            )
        if not 0 < region.queue_size <= self._device.max_queue_size:
            raise ProtocolError(
                f"in-flight region for queues of {region.queue_size}, "
                f"the limit is {self._device.max_queue_size}"
            )
        if any(ring.live for ring in self._rings):
            raise ProtocolError("the in-flight region changes while rings run")

    # Rings.

    def _ring(self, index: int) -> _Ring:
        if index >= len(self._rings):
            raise ProtocolError(f"queue {index}, there are {len(self._rings)}")
        return self._rings[index]

    def _start_if_ready(self, ring: _Ring) -> None:
        """Tell the device to run, suspend or resume `ring`, whatever its state asks for.

        On ProtocolError the ring is stopped: it takes a new SET_VRING_KICK to try again.
        """
        features = self._features
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
        except ProtocolError:
            ring.started = False
            _close(ring.kick_fd)
            ring.kick_fd = None
            raise
        ring.live = True
        ring.suspended = False

    def _ring_setup(self, ring: _Ring, features: int) -> RingSetup:
        address = ring.address
        assert address is not None
        if not features & F_RING_PACKED and ring.size & (ring.size - 1):
            raise ProtocolError(f"queue {ring.index}: size {ring.size} is no power of two")
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

    async def _stop(self, ring: _Ring) -> None:
        """The ring is stopped afterwards, and its kick forgotten."""
        if ring.live:
            # Whatever happens while waiting, the ring is not to be served again.
            ring.live = False
            ring.base = await self._device.stop_ring(ring.index)
        ring.started = False
        ring.suspended = False
        _close(ring.kick_fd)
        ring.kick_fd = None

    async def _set_vring_num(self, payload: bytes) -> None:
        state = VringState.unpack(payload)
        ring = self._ring(state.index)
        limit = min(self._device.max_queue_size, MAX_VRING_SIZE)
        if not 0 < state.num <= limit:
            raise ProtocolError(f"queue {state.index}: size {state.num}, the limit is {limit}")
        if ring.live and state.num != ring.size:
            raise ProtocolError(f"queue {state.index}: the size changes while it runs")
        ring.size = state.num
        self._start_if_ready(ring)

    async def _set_vring_addr(self, payload: bytes) -> None:
        """Where the ring is. While it runs only the log flag may change (migration does that)."""
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
            ring.address = address
            if _log_address(address) != _log_address(before):
                self._device.set_ring_log(ring.index, _log_address(address))
            return
        ring.address = address
        self._start_if_ready(ring)

    async def _set_vring_base(self, payload: bytes) -> None:
        state = VringState.unpack(payload)
        ring = self._ring(state.index)
        if ring.live:
            raise ProtocolError(f"queue {state.index}: the base changes while it runs")
        ring.base = state.num
        self._start_if_ready(ring)

    async def _get_vring_base(self, payload: bytes) -> Reply:
        state = VringState.unpack(payload)
        ring = self._ring(state.index)
        if state.num:
            raise ProtocolError(f"queue {state.index}: num is {state.num}, not 0")
        await self._stop(ring)
        answer = VringState(state.index, ring.base)
        return Reply(pack_reply(Request.GET_VRING_BASE, answer.pack()))

    async def _set_vring_kick(self, payload: bytes) -> None:
        file = VringFile.unpack(payload)
        ring = self._ring(file.index)
        old, ring.kick_fd = ring.kick_fd, self._take_eventfd(file)
        try:
            if ring.live:
                self._device.set_kick(ring.index, ring.kick_fd)
            else:
                ring.started = True
                self._start_if_ready(ring)
        finally:
            _close(old)

    async def _set_vring_call(self, payload: bytes) -> None:
        file = VringFile.unpack(payload)
        ring = self._ring(file.index)
        old, ring.call_fd = ring.call_fd, self._take_eventfd(file)
        try:
            if ring.live:
                self._device.set_call(ring.index, ring.call_fd)
        finally:
            _close(old)

    async def _set_vring_err(self, payload: bytes) -> None:
        file = VringFile.unpack(payload)
        ring = self._ring(file.index)
        old, ring.error_fd = ring.error_fd, self._take_eventfd(file)
        try:
            if ring.live:
                self._device.set_error(ring.index, ring.error_fd)
        finally:
            _close(old)

    async def _set_vring_enable(self, payload: bytes) -> None:
        state = VringState.unpack(payload)
        ring = self._ring(state.index)
        if state.num not in (0, 1):
            raise ProtocolError(f"queue {state.index}: enable is {state.num}, not 0 or 1")
        if self._features is not None and not self._features & F_PROTOCOL_FEATURES:
            raise ProtocolError(f"queue {state.index}: enabled from the start (no bit 30)")
        ring.enabled = bool(state.num)
        self._start_if_ready(ring)

    def _take_eventfd(self, file: VringFile) -> int | None:
        """The message's eventfd, kept from now on; None when it brought none.

        The device writes to it and waits for it, so it must not be able to block or be anything
        else: a pipe or a socket of somebody else's, for instance.
        """
        if not file.has_fd:
            return None
        fd = self._fds[0]
        if not _is_eventfd(fd):
            raise ProtocolError(f"queue {file.index}: the descriptor is no eventfd")
        os.set_blocking(fd, False)
        return self._fds.pop(0)

    # The back-end's own messages.

    async def _set_backend_req_fd(self, payload: bytes) -> None:
        if not stat.S_ISSOCK(os.fstat(self._fds[0]).st_mode):
            raise ProtocolError("the back-end channel is no socket")
        _close(self._channel_fd)
        self._channel_fd = self._fds.pop(0)

    def _note_config_changed(self) -> None:
        self._config_changed = True
        self._tell_config_changed()

    def _tell_config_changed(self) -> None:
        """Send CONFIG_CHANGE, if it is due and allowed.

        While no ring runs the device is suspended and sends nothing (vhost-user "Suspended device
        state"): it is then sent when the first ring starts. No acknowledgement is asked for:
        QEMU answers by reading the config space on the main socket, and waiting would hang both.
        """
        if not self._config_changed or not any(ring.live for ring in self._rings):
            return
        self._config_changed = False
        if self._channel_fd is None:
            return
        if not self._send_to_front_end(
            self._channel_fd, pack_message(BackendRequest.CONFIG_CHANGE)
        ):
            _close(self._channel_fd)
            self._channel_fd = None


_Handler = Callable[[Session, bytes], Awaitable[Reply | None]]

_HANDLERS: dict[Request, _Handler] = {
    Request.GET_FEATURES: Session._get_features,
    Request.SET_FEATURES: Session._set_features,
    Request.SET_OWNER: Session._set_owner,
    Request.RESET_OWNER: Session._reset_owner,
    Request.SET_MEM_TABLE: Session._set_mem_table,
    Request.SET_LOG_BASE: Session._set_log_base,
    Request.SET_LOG_FD: Session._set_log_fd,
    Request.SET_VRING_NUM: Session._set_vring_num,
    Request.SET_VRING_ADDR: Session._set_vring_addr,
    Request.SET_VRING_BASE: Session._set_vring_base,
    Request.GET_VRING_BASE: Session._get_vring_base,
    Request.SET_VRING_KICK: Session._set_vring_kick,
    Request.SET_VRING_CALL: Session._set_vring_call,
    Request.SET_VRING_ERR: Session._set_vring_err,
    Request.GET_PROTOCOL_FEATURES: Session._get_protocol_features,
    Request.SET_PROTOCOL_FEATURES: Session._set_protocol_features,
    Request.GET_QUEUE_NUM: Session._get_queue_num,
    Request.SET_VRING_ENABLE: Session._set_vring_enable,
    Request.SET_BACKEND_REQ_FD: Session._set_backend_req_fd,
    Request.GET_CONFIG: Session._get_config,
    Request.SET_CONFIG: Session._set_config,
    Request.GET_INFLIGHT_FD: Session._get_inflight_fd,
    Request.SET_INFLIGHT_FD: Session._set_inflight_fd,
    Request.RESET_DEVICE: Session._reset_device,
    Request.GET_MAX_MEM_SLOTS: Session._get_max_mem_slots,
    Request.ADD_MEM_REG: Session._add_mem_reg,
    Request.REM_MEM_REG: Session._rem_mem_reg,
    Request.SET_STATUS: Session._set_status,
    Request.GET_STATUS: Session._get_status,
}

_REPLY_HAS_NO_ERROR = frozenset(request for request, shape in SHAPES.items() if shape.replies) - {
    Request.GET_CONFIG
}


def _close(fd: int | None) -> None:
    if fd is not None:
        os.close(fd)


def _is_eventfd(fd: int) -> bool:
    try:
        return os.readlink(f"/proc/self/fd/{fd}") == "anon_inode:[eventfd]"
    except OSError:
        return True  # no /proc in this container: the device copes with errors


def _log_address(address: VringAddress) -> int | None:
    return address.log if address.flags & VRING_LOG else None


def _memory_region(region: Region, fd: int) -> MemoryRegion:
    return MemoryRegion(
        region.guest_address,
        region.size_bytes,
        region.user_address,
        region.mmap_offset_bytes,
        fd,
    )


def _check_range(offset: int, size: int) -> None:
    """A range of a file: not empty, and its end fits a u64 (CVE-2020-10722)."""
    if size == 0 or offset + size > U64_MAX:
        raise ProtocolError(f"{size} bytes from offset {offset:#x} are no range of a file")


def _check_region(region: Region, others: list[Region]) -> None:
    """A region that is one: not empty, no overflow, no overlap with `others`."""
    _check_range(region.mmap_offset_bytes, region.size_bytes)
    for start in (region.guest_address, region.user_address):
        if start + region.size_bytes - 1 > U64_MAX:
            raise ProtocolError(f"memory region at {start:#x} runs over the end of addresses")
    for other in others:
        if _overlap(region.guest_address, region.size_bytes, other.guest_address, other.size_bytes):
            raise ProtocolError(
                f"memory regions at guest addresses {region.guest_address:#x} and "
                f"{other.guest_address:#x} overlap"
            )
        if _overlap(region.user_address, region.size_bytes, other.user_address, other.size_bytes):
            raise ProtocolError(
                f"memory regions at front-end addresses {region.user_address:#x} and "
                f"{other.user_address:#x} overlap"
            )


def _overlap(start: int, size: int, other_start: int, other_size: int) -> bool:
    return start < other_start + other_size and other_start < start + size
