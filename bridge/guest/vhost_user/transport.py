"""Messages and descriptors over a non-blocking unix socket, for back-end and front-end."""

from __future__ import annotations

import array
import os
import socket

import trio

from bridge.errors import ConnectionLost, ProtocolError
from bridge.guest.vhost_user.messages import MAX_FDS, Message
from bridge.guest.vhost_user.reader import MessageReader

_FD = array.array("i")
_CONTROL_BYTES = socket.CMSG_SPACE(MAX_FDS * _FD.itemsize)


class Transport:
    """One connection. Owns its socket; `close()` also closes descriptors of half a message."""

    def __init__(self, sock: socket.socket, *, replies: bool) -> None:
        sock.setblocking(False)
        self.sock = sock
        self._reader = MessageReader(replies=replies)
        self._waits = False
        self._held: trio.Event | None = None

    async def receive(self) -> Message | None:
        """The next message, whose descriptors the caller owns; None at the stream's end.

        Raises ProtocolError for a malformed or truncated message, and ConnectionLost. After a
        cancellation the next call goes on with the bytes that have arrived.
        """
        reader = self._reader
        while True:
            if self._held is not None:
                await self._held.wait()
            try:
                data, fds = self._receive_some(reader.wanted)
            except BlockingIOError:
                self._waits = True
                try:
                    await trio.lowlevel.wait_readable(self.sock)
                finally:
                    self._waits = False
                continue
            except OSError as error:
                raise ConnectionLost(f"vhost-user connection: {error.strerror}") from error
            if not data and not fds:
                if reader.between_messages:
                    return None
                raise ProtocolError("the stream ends in the middle of a message")
            message = reader.feed_untrusted(data, fds)
            if message is not None:
                return message

    def hold(self) -> bool:
        """Receive nothing more until `release`: perhaps another program does. False, and nothing
        has changed: a message has begun to arrive, or the last one is still being handled."""
        if self._held is None and self._waits and self._reader.between_messages:
            self._held = trio.Event()
        return self._held is not None

    def release(self) -> None:
        """The end of `hold`."""
        if self._held is not None:
            self._held.set()
            self._held = None

    def _receive_some(self, size: int) -> tuple[bytes, list[int]]:
        """At most `size` bytes and the descriptors with them. Raises what `recvmsg` raises."""
        data, control, flags, _ = self.sock.recvmsg(size, _CONTROL_BYTES, socket.MSG_CMSG_CLOEXEC)
        fds: list[int] = []
        for level, kind, content in control:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                numbers = array.array("i")
                numbers.frombytes(content[: len(content) - len(content) % numbers.itemsize])
                fds += numbers
        if flags & socket.MSG_CTRUNC:
            for fd in fds:
                os.close(fd)
            raise ProtocolError(f"more than {MAX_FDS} file descriptors with one message")
        return data, fds

    async def send(self, data: bytes, fds: list[int] | None = None) -> None:
        """Send a whole message. `fds` travel with its first byte; the caller still owns them.

        Raises ConnectionLost. After a cancellation part of the message may have been sent, so that
        only `close()` is left.
        """
        control = []
        if fds:
            control = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))]
        view = memoryview(data)
        while view:
            try:
                sent = self.sock.sendmsg([view], control)
            except BlockingIOError:
                await trio.lowlevel.wait_writable(self.sock)
                continue
            except OSError as error:
                raise ConnectionLost(f"vhost-user connection: {error.strerror}") from error
            control = []
            view = view[sent:]

    @property
    def is_open(self) -> bool:
        """The other side has not hung up. Does not wait, and takes no bytes from the stream."""
        try:
            return bool(self.sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT))
        except BlockingIOError:
            return True
        except OSError:
            return False

    def close(self) -> None:
        """Hang up. Idempotent."""
        self._reader.close()
        self.sock.close()
