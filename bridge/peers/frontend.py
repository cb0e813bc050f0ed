"""The client side of vhost-user: what a virtual machine monitor does.

Plays QEMU for the demo and the tests. Since it also sends any bytes that it is given (`send_raw`),
it plays hostile front-ends, too.

Source: vhost-user "Message types", "Front-end message types".
"""

from __future__ import annotations

import os
import socket
from types import TracebackType

import trio

from bridge.errors import BridgeError, ConnectionLost, ProtocolError
from bridge.guest.vhost_user.messages import (
    F_PROTOCOL_FEATURES,
    P_BACKEND_REQ,
    P_CONFIG,
    P_CONFIGURE_MEM_SLOTS,
    P_INFLIGHT_SHMFD,
    P_LOG_SHMFD,
    P_MQ,
    P_REPLY_ACK,
    P_RESET_DEVICE,
    P_STATUS,
    VERSION,
    VRING_LOG,
    BackendRequest,
    ConfigAccess,
    InflightRange,
    LogRange,
    Message,
    MessageType,
    RegionPayload,
    VringAddress,
    VringFile,
    VringState,
    pack_memory_table,
    pack_message,
    pack_u64,
    unpack_u64,
)
from bridge.guest.vhost_user.messages import FLAG_NEED_REPLY as _NEED_REPLY
from bridge.guest.vhost_user.transport import Transport

DEFAULT_TIMEOUT_S = 120.0
"""A back-end may finish what is in flight before it answers GET_VRING_BASE, but not longer."""

PROTOCOL_FEATURES = (
    P_MQ
    | P_LOG_SHMFD
    | P_REPLY_ACK
    | P_BACKEND_REQ
    | P_CONFIG
    | P_INFLIGHT_SHMFD
    | P_RESET_DEVICE
    | P_CONFIGURE_MEM_SLOTS
    | P_STATUS
)
"""What this side knows; a back-end may offer more."""


class Refused(BridgeError):
    """The back-end said no to a request."""


class FrontEnd:
    """One connection to a vhost-user back-end.

    Every method that sends a request waits for its answer, if it has one: its own reply, or the
    acknowledgement when REPLY_ACK was negotiated. Raises Refused, ProtocolError for a back-end
    that breaks the rules, ConnectionLost when it hangs up or says nothing for `timeout_s`.
    """

    def __init__(self, sock: socket.socket, *, timeout_s: float = DEFAULT_TIMEOUT_S) -> None:
        self._transport = Transport(sock, replies=True)
        self._timeout_s = timeout_s
        self._channel: Transport | None = None
        self.features = 0
        self.protocol_features = 0

    @classmethod
    async def connect(
        cls, path: str | os.PathLike[str], *, timeout_s: float = DEFAULT_TIMEOUT_S
    ) -> FrontEnd:
        """Connect to the back-end that listens at `path`. Raises ConnectionLost."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            while True:
                try:
                    sock.connect(os.fspath(path))
                    return cls(sock, timeout_s=timeout_s)
                except BlockingIOError:
                    await trio.sleep(0.01)  # the backlog is full; unix sockets have no event
        except BaseException as error:
            sock.close()
            if isinstance(error, OSError):
                raise ConnectionLost(f"{os.fspath(path)}: {error.strerror}") from error
            raise

    # Anything.

    async def send_raw(self, data: bytes, fds: list[int] | None = None) -> None:
        """Send these bytes, unchecked, with these descriptors (which stay the caller's)."""
        await self._transport.send(data, fds)

    async def receive(self) -> Message:
        """The next message of the back-end's. Raises ConnectionLost when none comes in time."""
        try:
            with trio.fail_after(self._timeout_s):
                message = await self._transport.receive()
        except trio.TooSlowError:
            raise ConnectionLost(f"the back-end says nothing for {self._timeout_s} s") from None
        if message is None:
            raise ConnectionLost("the back-end hung up")
        return message

    async def call(self, request: MessageType, payload: bytes = b"") -> Message:
        """Send a request that has a reply of its own; the reply."""
        await self.send_raw(pack_message(request, payload))
        return await self._reply_to(request)

    async def tell(
        self, request: MessageType, payload: bytes = b"", fds: list[int] | None = None
    ) -> None:
        """Send a request that has no reply, and see it acknowledged where that was negotiated.

        Raises Refused when the acknowledgement says so, ConnectionLost.
        """
        acknowledged = bool(self.protocol_features & P_REPLY_ACK)
        flags = VERSION | _NEED_REPLY if acknowledged else VERSION
        await self.send_raw(pack_message(request, payload, flags=flags), fds)
        if acknowledged:
            result = _u64(await self._reply_to(request))
            if result:
                raise Refused(f"the back-end refused {request.name} ({result})")

    async def _reply_to(self, request: MessageType) -> Message:
        message = await self.receive()
        if message.header.request != request:
            _close_all(message.fds)
            raise ProtocolError(
                f"back-end replied to request {message.header.request}, {request.name} was asked"
            )
        if message.fds and request != MessageType.GET_INFLIGHT_FD:
            _close_all(message.fds)
            raise ProtocolError(f"back-end sent file descriptors with its reply to {request.name}")
        return message

    async def get_u64(self, request: MessageType) -> int:
        """The value that a GET_… without payload asks for."""
        return _u64(await self.call(request))

    # Negotiation.

    async def negotiate(
        self, features: int, protocol_features: int = PROTOCOL_FEATURES
    ) -> tuple[int, int]:
        """Take what is offered of `features` and `protocol_features`; what was taken.

        The virtio features are only chosen here: `set_features` sends them, after the
        configuration space was read if need be.
        """
        offered = await self.get_u64(MessageType.GET_FEATURES)
        self.features = offered & features
        if offered & F_PROTOCOL_FEATURES and features & F_PROTOCOL_FEATURES:
            offered_protocol = await self.get_u64(MessageType.GET_PROTOCOL_FEATURES)
            chosen = offered_protocol & protocol_features
            await self.tell(MessageType.SET_PROTOCOL_FEATURES, pack_u64(chosen))
            self.protocol_features = chosen
        await self.tell(MessageType.SET_OWNER)
        return self.features, self.protocol_features

    async def set_features(self, features: int | None = None) -> None:
        """Tell the back-end the features, by default those chosen by `negotiate`."""
        if features is not None:
            self.features = features
        await self.tell(MessageType.SET_FEATURES, pack_u64(self.features))

    # Memory.

    async def set_memory(self, regions: list[tuple[RegionPayload, int]]) -> None:
        """SET_MEM_TABLE: these regions of these files, and no others."""
        await self.tell(
            MessageType.SET_MEM_TABLE,
            pack_memory_table([region for region, _ in regions]),
            [fd for _, fd in regions],
        )

    async def add_memory(self, region: RegionPayload, fd: int) -> None:
        """ADD_MEM_REG."""
        await self.tell(MessageType.ADD_MEM_REG, region.pack_single(), [fd])

    async def remove_memory(self, region: RegionPayload) -> None:
        """REM_MEM_REG."""
        await self.tell(MessageType.REM_MEM_REG, region.pack_single())

    # Rings.

    async def set_ring(
        self,
        index: int,
        *,
        size: int,
        base: int,
        desc: int,
        avail: int,
        used: int,
        kick_fd: int | None,
        call_fd: int | None,
        log: int | None = None,
    ) -> None:
        """Describe a ring and start it, in QEMU's order: NUM, BASE, ADDR, KICK, CALL."""
        await self.tell(MessageType.SET_VRING_NUM, VringState(index, size).pack())
        await self.tell(MessageType.SET_VRING_BASE, VringState(index, base).pack())
        await self.set_ring_address(index, desc=desc, avail=avail, used=used, log=log)
        await self.set_ring_file(MessageType.SET_VRING_KICK, index, kick_fd)
        await self.set_ring_file(MessageType.SET_VRING_CALL, index, call_fd)

    async def set_ring_address(
        self, index: int, *, desc: int, avail: int, used: int, log: int | None = None
    ) -> None:
        """SET_VRING_ADDR: front-end addresses; `log` is guest-physical."""
        flags = 0 if log is None else VRING_LOG
        address = VringAddress(index, flags, desc, used, avail, log or 0)
        await self.tell(MessageType.SET_VRING_ADDR, address.pack())

    async def set_ring_file(self, request: MessageType, index: int, fd: int | None) -> None:
        """SET_VRING_KICK, _CALL or _ERR with this eventfd, or with none."""
        payload = VringFile(index, fd is not None).pack()
        await self.tell(request, payload, None if fd is None else [fd])

    async def enable_ring(self, index: int, enabled: bool = True) -> None:
        """SET_VRING_ENABLE."""
        await self.tell(MessageType.SET_VRING_ENABLE, VringState(index, int(enabled)).pack())

    async def stop_ring(self, index: int) -> int:
        """GET_VRING_BASE: stop the ring; where to go on. Raises ProtocolError for another ring."""
        reply = await self.call(MessageType.GET_VRING_BASE, VringState(index, 0).pack())
        _need_size(reply, 8)
        state = VringState.unpack(reply.payload)
        if state.index != index:
            raise ProtocolError(f"back-end stopped ring {state.index}, {index} was asked")
        return state.num

    # Configuration space.

    async def get_config(self, offset: int, size: int) -> bytes:
        """`size` bytes of the configuration space. Raises Refused."""
        access = ConfigAccess(offset, size, 0, bytes(size))
        reply = await self.call(MessageType.GET_CONFIG, access.pack())
        if not reply.payload:
            raise Refused(f"the back-end refused {size} bytes of config space at {offset}")
        _need_size(reply, 12 + size)
        return ConfigAccess.unpack(reply.payload).data

    async def set_config(self, offset: int, data: bytes, *, flags: int = 0) -> None:
        """Write to the configuration space."""
        access = ConfigAccess(offset, len(data), flags, data)
        await self.tell(MessageType.SET_CONFIG, access.pack())

    # In-flight region and dirty log.

    async def get_inflight(self, num_queues: int, queue_size: int) -> tuple[InflightRange, int]:
        """A fresh in-flight region: its description and its file, which the caller closes. Raises
        Refused."""
        wanted = InflightRange(0, 0, num_queues, queue_size)
        reply = await self.call(MessageType.GET_INFLIGHT_FD, wanted.pack())
        if len(reply.fds) != 1 or len(reply.payload) not in (20, 24):
            _close_all(reply.fds)
            raise Refused("the back-end has no in-flight region to give")
        return InflightRange.unpack(reply.payload), reply.fds[0]

    async def set_inflight(self, region: InflightRange, fd: int) -> None:
        """Hand over the in-flight region of a former connection."""
        await self.tell(MessageType.SET_INFLIGHT_FD, region.pack(), [fd])

    async def set_log(self, fd: int, size: int, offset: int = 0) -> None:
        """SET_LOG_BASE: where dirty pages are to be noted; always answered."""
        await self.send_raw(
            pack_message(MessageType.SET_LOG_BASE, LogRange(size, offset).pack()), [fd]
        )
        await self._reply_to(MessageType.SET_LOG_BASE)

    # The back-end's own messages.

    async def open_channel(self) -> None:
        """SET_BACKEND_REQ_FD: give the back-end a way to speak up."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            await self.tell(MessageType.SET_BACKEND_REQ_FD, fds=[theirs.fileno()])
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        if self._channel is not None:
            self._channel.close()
        self._channel = Transport(ours, replies=False)

    async def config_changed(self) -> None:
        """Wait until the back-end says that the configuration space has changed.

        Raises ConnectionLost, and RuntimeError without `open_channel`.
        """
        if self._channel is None:
            raise RuntimeError("open_channel() first")
        while True:
            message = await self._channel.receive()
            if message is None:
                raise ConnectionLost("the back-end closed its channel")
            _close_all(message.fds)
            if message.header.request == BackendRequest.CONFIG_CHANGE:
                return

    @property
    def is_alive(self) -> bool:
        """The back-end has not hung up."""
        return self._transport.is_open

    def close(self) -> None:
        """Hang up. Idempotent."""
        self._transport.close()
        if self._channel is not None:
            self._channel.close()
            self._channel = None

    def __enter__(self) -> FrontEnd:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def _need_size(message: Message, size: int) -> None:
    if len(message.payload) != size:
        raise ProtocolError(
            f"back-end replied to request {message.header.request} with "
            f"{len(message.payload)} bytes, {size} needed"
        )


def _u64(message: Message) -> int:
    _need_size(message, 8)
    return unpack_u64(message.payload)


def _close_all(fds: list[int]) -> None:
    while fds:
        os.close(fds.pop())
