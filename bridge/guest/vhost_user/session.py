"""One front-end's conversation with the back-end, without sockets.

`handle(message)` checks a message, calls the device for it, and returns the reply, if the message
has one. It is `async` only because the device must quiesce rings.

Rules that hold everywhere (vhost-user "Communication"):

- Two kinds of messages get a reply: those with a reply of their own, always, and every other one
  if it says need_reply and REPLY_ACK was negotiated (0 = done, 1 = refused). A reply that the
  front-end does not expect would put it out of step until it disconnects.
- A refused message changes nothing, except where its method's text says so. If the front-end did
  not ask for an acknowledgement, refusing ends the conversation (`handle` raises `ProtocolError`).
- Every descriptor that came with a message belongs to the session. Each is closed exactly once:
  at the end of `handle` unless a ring or the back-end channel keeps it, else when it is replaced,
  else in `close()`.

`rings` handles the messages about rings, `memory_table` those about guest memory. The others are
here: features, status, configuration space, dirty log, in-flight region, back-end channel.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable

from bridge.errors import LeftBehind, ProtocolError
from bridge.guest.vhost_user.device_interface import VhostUserDevice
from bridge.guest.vhost_user.memory_table import MemoryTable, check_range
from bridge.guest.vhost_user.messages import (
    F_LOG_ALL,
    F_PROTOCOL_FEATURES,
    MAX_CONFIG_BYTES,
    P_BACKEND_REQ,
    P_CONFIG,
    P_CONFIGURE_MEM_SLOTS,
    P_INFLIGHT_SHMFD,
    P_LOG_SHMFD,
    P_MQ,
    P_REPLY_ACK,
    P_RESET_DEVICE,
    P_STATUS,
    BackendRequest,
    ConfigAccess,
    InflightRange,
    LogRange,
    Message,
    MessageType,
    RegionPayload,
    message_of,
    pack_message,
    pack_reply,
    pack_u64,
    request_name,
    unpack_u64,
)
from bridge.guest.vhost_user.reply import Handler, Reply, reply_u64
from bridge.guest.vhost_user.rings import Rings
from bridge.guest.vhost_user.shapes import SHAPES, check_shape
from bridge.spec.virtio_blk import F_CONFIG_WCE, WRITEBACK_OFFSET

STATUS_FEATURES_OK = 8

_ALWAYS_OFFERED = (
    P_MQ
    | P_REPLY_ACK
    | P_BACKEND_REQ
    | P_CONFIG
    | P_RESET_DEVICE
    | P_CONFIGURE_MEM_SLOTS
    | P_STATUS
)

_CONFIG_REQUEST_FLAGS = frozenset({0, 1, 2})
"""In the specification 0 means the guest and 1 migration. In rust-vmm, which took them for bits, 1
means the guest and 2 migration. The length tells which 1 it is: a guest writes a single byte."""

_REPLY_HAS_NO_ERROR = frozenset(request for request, shape in SHAPES.items() if shape.replies) - {
    MessageType.GET_CONFIG
}


class FrontEndSession:
    """The back-end's side of one connection. See the module's text.

    `send_to_front_end(fd, data)` puts a message into the front-end's back-end channel without
    waiting; False means that the channel is dead. `on_refused(error)` is called with the reason for
    which a message is refused, `on_region(region, fd)` with each region of guest memory.
    """

    def __init__(
        self,
        device: VhostUserDevice,
        send_to_front_end: Callable[[int, bytes], bool],
        *,
        on_refused: Callable[[Exception], None] | None = None,
        on_region: Callable[[RegionPayload, int], None] | None = None,
    ) -> None:
        self._device = device
        self._send_to_front_end = send_to_front_end
        self._protocol_features = 0
        self._status = 0
        self._rings = Rings(device)
        self._memory = MemoryTable(device, on_region)
        self._on_refused = on_refused or _no_listener
        self._channel_fd: int | None = None
        self._inflight: tuple[bytes, int] | None = None
        """SET_INFLIGHT_FD's payload and descriptor: kept for `messages`."""
        self._config_changed = False
        self._closed = False
        self._handlers = self._own_handlers() | self._rings.handlers() | self._memory.handlers()
        device.listener = self

    def _own_handlers(self) -> dict[MessageType, Handler]:
        return {
            MessageType.GET_FEATURES: self._get_features,
            MessageType.SET_FEATURES: self._set_features,
            MessageType.SET_OWNER: self._set_owner,
            MessageType.RESET_OWNER: self._reset_owner,
            MessageType.SET_LOG_BASE: self._set_log_base,
            MessageType.SET_LOG_FD: self._set_log_fd,
            MessageType.GET_PROTOCOL_FEATURES: self._get_protocol_features,
            MessageType.SET_PROTOCOL_FEATURES: self._set_protocol_features,
            MessageType.GET_QUEUE_NUM: self._get_queue_num,
            MessageType.SET_BACKEND_REQ_FD: self._set_backend_req_fd,
            MessageType.GET_CONFIG: self._get_config,
            MessageType.SET_CONFIG: self._set_config,
            MessageType.GET_INFLIGHT_FD: self._get_inflight_fd,
            MessageType.SET_INFLIGHT_FD: self._set_inflight_fd,
            MessageType.RESET_DEVICE: self._reset_device,
            MessageType.SET_STATUS: self._set_status,
            MessageType.GET_STATUS: self._get_status,
        }

    # For the caller, which has the socket.

    async def handle(self, message: Message) -> Reply | None:
        """Do what `message` asks; return the reply to send, if there is one.

        Takes over the message's descriptors, also when cancelled. Raises ProtocolError or
        LeftBehind when the conversation is over; then only `close()` may follow.
        """
        try:
            return await self._answer(message)
        finally:
            while message.fds:
                os.close(message.fds.pop())
            self._tell_config_changed()

    async def close(self) -> None:
        """End the conversation: disconnect the device, close every descriptor.

        Idempotent. Waits until the device has finished what is in flight; the device bounds that.
        """
        if self._closed:
            return
        self._closed = True
        self._device.listener = None
        try:
            await self._device.disconnected()
        finally:
            self._rings.close()
            self._memory.close()
            self._close_channel()
            self._keep_inflight(None)

    # For the process after this one.

    @property
    def is_migrating(self) -> bool:
        """The dirty log is on."""
        return bool((self._rings.features or 0) & F_LOG_ALL)

    def messages(self, bases: dict[int, int]) -> list[Message]:
        """What a session of another process has to hear to go on with this conversation: not all
        that was said, but what still counts. No ring may be served any more; `bases` says where
        those that were go on. The descriptors stay ours. Not while `is_migrating`."""
        found = [
            message_of(MessageType.SET_PROTOCOL_FEATURES, pack_u64(self._protocol_features)),
        ]
        if self._rings.features is not None:
            found.append(message_of(MessageType.SET_FEATURES, pack_u64(self._rings.features)))
        if self._status:
            found.append(message_of(MessageType.SET_STATUS, pack_u64(self._status)))
        found += self._memory.messages()
        if self._inflight is not None:
            payload, fd = self._inflight
            found.append(message_of(MessageType.SET_INFLIGHT_FD, payload, [fd]))
        if self._channel_fd is not None:
            found.append(message_of(MessageType.SET_BACKEND_REQ_FD, b"", [self._channel_fd]))
        if self._protocol_features & P_CONFIG and (self._rings.features or 0) & F_CONFIG_WCE:
            writeback = self._device.read_config(WRITEBACK_OFFSET, 1)
            access = ConfigAccess(WRITEBACK_OFFSET, 1, 0, writeback)
            found.append(message_of(MessageType.SET_CONFIG, access.pack()))
        return found + self._rings.messages(bases)

    # Dispatch.

    async def _answer(self, message: Message) -> Reply | None:
        number = message.header.request
        try:
            try:
                request = MessageType(number)
            except ValueError:
                raise ProtocolError("unknown request") from None
            shape = SHAPES[request]
            if shape.feature and not self._protocol_features & shape.feature:
                raise ProtocolError("its protocol feature was not negotiated")
            check_shape(request, message.payload, len(message.fds))
            reply = await self._handlers[request](message.payload, message.fds)
        except (ProtocolError, OSError) as error:
            # OSError: a file or eventfd of the front-end's that does not behave as one.
            self._on_refused(error)
            refusal = self._refusal(message)
            if refusal is None:
                raise ProtocolError(f"{request_name(number)}: {error}") from error
            return refusal
        except LeftBehind:
            # Answering the stop promises that everything is on the server. It is not, so the
            # front-end has to see the stop fail before it starts the guest on another host.
            refusal = self._refusal(message)
            if refusal is None:
                raise
            return refusal
        assert shape.replies == (reply is not None)
        return reply or self._acknowledge(message, 0)

    def _acknowledge(self, message: Message, result: int) -> Reply | None:
        if not (message.header.need_reply and self._protocol_features & P_REPLY_ACK):
            return None
        return Reply(pack_reply(message.header.request, pack_u64(result)))

    def _refusal(self, message: Message) -> Reply | None:
        """The reply that refuses `message`; None when only hanging up refuses it."""
        request = message.header.request
        if request == MessageType.GET_CONFIG:
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
        features = _ALWAYS_OFFERED
        if self._device.supports_dirty_log:
            features |= P_LOG_SHMFD
        if self._device.supports_inflight:
            features |= P_INFLIGHT_SHMFD
        return features

    async def _get_features(self, payload: bytes, fds: list[int]) -> Reply:
        return reply_u64(MessageType.GET_FEATURES, self._offered_features())

    async def _set_features(self, payload: bytes, fds: list[int]) -> None:
        """Set the features. While rings run only LOG_ALL may change, as in a migration."""
        features = unpack_u64(payload)
        surplus = features & ~self._offered_features()
        if surplus:
            raise ProtocolError(f"features {surplus:#x} were not offered")
        before = self._rings.features
        if before is None or (before ^ features) & ~F_LOG_ALL:
            if self._rings.any_live:
                raise ProtocolError("features other than LOG_ALL change while rings run")
            self._device.set_features(features & ~(F_LOG_ALL | F_PROTOCOL_FEATURES))
        self._rings.features = features
        if ((before or 0) ^ features) & F_LOG_ALL:
            self._device.set_logging(bool(features & F_LOG_ALL))
        self._rings.features_changed()

    async def _get_protocol_features(self, payload: bytes, fds: list[int]) -> Reply:
        return reply_u64(MessageType.GET_PROTOCOL_FEATURES, self._offered_protocol_features())

    async def _set_protocol_features(self, payload: bytes, fds: list[int]) -> None:
        features = unpack_u64(payload)
        surplus = features & ~self._offered_protocol_features()
        if surplus:
            raise ProtocolError(f"protocol features {surplus:#x} were not offered")
        self._protocol_features = features

    async def _get_queue_num(self, payload: bytes, fds: list[int]) -> Reply:
        return reply_u64(MessageType.GET_QUEUE_NUM, self._device.max_queues)

    # Owner, status, reset.

    async def _set_owner(self, payload: bytes, fds: list[int]) -> None:
        """Does nothing: a connection has one front-end, and that is the owner."""

    async def _reset_owner(self, payload: bytes, fds: list[int]) -> None:
        """Does nothing. Deprecated: "It's better to just ignore this message"."""

    async def _set_status(self, payload: bytes, fds: list[int]) -> None:
        """Set the driver's status byte. 0 is a virtio reset: rings stop, features stay."""
        status = unpack_u64(payload)
        if status > 0xFF:
            raise ProtocolError(f"status {status:#x} is more than a byte")
        self._status = status
        if status == 0:
            await self._rings.stop_all()

    async def _get_status(self, payload: bytes, fds: list[int]) -> Reply:
        status = self._status
        if self._rings.features is None:
            status &= ~STATUS_FEATURES_OK
        return reply_u64(MessageType.GET_STATUS, status)

    async def _reset_device(self, payload: bytes, fds: list[int]) -> None:
        """Return to the state for a new driver; memory, descriptors, protocol features stay."""
        try:
            await self._rings.stop_all()
        finally:
            # Also if the stop failed: the driver has forgotten its requests in flight.
            await self._device.reset()
            self._rings.forget_setups()
            self._keep_inflight(None)
            self._rings.features = None
            self._status = 0

    # Config space.

    async def _get_config(self, payload: bytes, fds: list[int]) -> Reply:
        access = ConfigAccess.unpack(payload)
        if not 0 < access.size <= MAX_CONFIG_BYTES:
            raise ProtocolError(f"{access.size} bytes of config space asked for")
        data = self._device.read_config(access.offset, access.size)
        assert len(data) == access.size
        answer = ConfigAccess(access.offset, access.size, access.flags, data)
        return Reply(pack_reply(MessageType.GET_CONFIG, answer.pack()))

    async def _set_config(self, payload: bytes, fds: list[int]) -> None:
        access = ConfigAccess.unpack(payload)
        if not 0 < access.size <= MAX_CONFIG_BYTES:
            raise ProtocolError(f"{access.size} bytes of config space to be written")
        if access.flags not in _CONFIG_REQUEST_FLAGS:
            raise ProtocolError(f"unknown flags {access.flags:#x}")
        migration = access.flags == 2 or (access.flags == 1 and access.size > 1)
        self._device.write_config(access.offset, access.data, migration=migration)

    # Dirty log and in-flight region.

    async def _set_log_base(self, payload: bytes, fds: list[int]) -> Reply:
        log = LogRange.unpack(payload)
        check_range(log.mmap_offset, log.mmap_size)
        self._device.set_log(fds[0], log.mmap_offset, log.mmap_size)
        return reply_u64(MessageType.SET_LOG_BASE, 0)

    async def _set_log_fd(self, payload: bytes, fds: list[int]) -> None:
        """Does nothing with the eventfd, which would wake a logger. No front-end sends one."""

    async def _get_inflight_fd(self, payload: bytes, fds: list[int]) -> Reply:
        wanted = InflightRange.unpack(payload)
        self._check_inflight(wanted)
        fd, size_bytes = self._device.create_inflight(wanted.num_queues, wanted.queue_size)
        answer = InflightRange(size_bytes, 0, wanted.num_queues, wanted.queue_size)
        return Reply(pack_reply(MessageType.GET_INFLIGHT_FD, answer.pack(len(payload))), fd)

    async def _set_inflight_fd(self, payload: bytes, fds: list[int]) -> None:
        region = InflightRange.unpack(payload)
        self._check_inflight(region)
        check_range(region.mmap_offset, region.mmap_size)
        self._device.set_inflight(
            fds[0], region.mmap_offset, region.mmap_size, region.num_queues, region.queue_size
        )
        self._keep_inflight((payload, fds.pop()))

    def _keep_inflight(self, region: tuple[bytes, int] | None) -> None:
        if self._inflight is not None:
            os.close(self._inflight[1])
        self._inflight = region

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
        if self._rings.any_live:
            raise ProtocolError("the in-flight region changes while rings run")

    # The back-end's own messages.

    async def _set_backend_req_fd(self, payload: bytes, fds: list[int]) -> None:
        if not stat.S_ISSOCK(os.fstat(fds[0]).st_mode):
            raise ProtocolError("the back-end channel is not a socket")
        self._close_channel()
        self._channel_fd = fds.pop()

    def _close_channel(self) -> None:
        if self._channel_fd is not None:
            os.close(self._channel_fd)
            self._channel_fd = None

    def config_changed(self) -> None:
        """See ConfigListener."""
        self._config_changed = True
        self._tell_config_changed()

    def _tell_config_changed(self) -> None:
        """Send CONFIG_CHANGE, if it is due and allowed.

        While no ring runs the device is suspended and may not send (vhost-user "Suspended device
        state"): the message goes out when the first ring starts. It does not ask for an
        acknowledgement: QEMU first reads the config space on the main socket, so that waiting for
        one would hang both sides.
        """
        if not self._config_changed or not self._rings.any_live:
            return
        self._config_changed = False
        if self._channel_fd is None:
            return
        message = pack_message(BackendRequest.CONFIG_CHANGE)
        if not self._send_to_front_end(self._channel_fd, message):
            self._close_channel()


def _no_listener(error: Exception) -> None:
    """The default of `on_refused`."""
