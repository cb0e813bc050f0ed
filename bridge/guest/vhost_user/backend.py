"""The back-end's socket: one front-end after the other, for ever.

One task reads the main socket, has the session handle each message before the next is read, and
writes the reply. It never waits for anything else of the front-end's: the back-end channel
(SET_BACKEND_REQ_FD) is only ever written to, without waiting, because a front-end may hold back
everything on it until it was answered on the main socket.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable

import structlog
import trio

from bridge.errors import ConnectionLost, LeftBehind, ProtocolError
from bridge.guest.vhost_user.device_interface import VhostUserDevice
from bridge.guest.vhost_user.listener import Listener
from bridge.guest.vhost_user.session import Session
from bridge.guest.vhost_user.transport import Transport
from bridge.guest.vhost_user.unshared import UnsharedMemory

log = structlog.get_logger(__name__)

_SILENCE_S = 5.0
"""A front-end that has said nothing yet has to leave when another has waited this long."""

_ACCEPT_RETRY_S = 0.1
"""Wait this long when the process is out of descriptors; they come back with time."""


async def serve(
    device: VhostUserDevice,
    listener: Listener,
    *,
    on_connected: Callable[[bool], None] | None = None,
) -> None:
    """Serve `device` to the front-ends that connect to `listener`, one at a time, for ever.

    Returns only when the listener is a socket that was connected already and its front-end has
    left. `on_connected` is told when a front-end comes (True) and when it has gone (False). When
    cancelled, the device is given the time it takes to finish what is in flight (bounded).
    """
    unshared = UnsharedMemory()
    if listener.is_connected:
        await _serve_one(device, listener.sock.dup(), on_connected, unshared)
        return
    while True:
        sock = await _accept(listener.sock)
        await _serve_one(device, sock, on_connected, unshared, listener.sock)


async def _accept(listening: socket.socket) -> socket.socket:
    """The next front-end's connection."""
    while True:
        try:
            sock, _ = listening.accept()
        except BlockingIOError:
            await trio.lowlevel.wait_readable(listening)
        except ConnectionAbortedError:
            continue
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                raise
            log.warning("cannot accept a front-end", error=error.strerror)
            await trio.sleep(_ACCEPT_RETRY_S)
        else:
            return sock


async def _serve_one(
    device: VhostUserDevice,
    sock: socket.socket,
    on_connected: Callable[[bool], None] | None,
    unshared: UnsharedMemory,
    listening: socket.socket | None = None,
) -> None:
    """One front-end, from its first message until it is gone and forgotten.

    `listening`: where others may be waiting meanwhile."""
    transport = Transport(sock, replies=False)
    session = Session(device, _send_now, on_refused=unshared.refused, on_region=unshared.of(sock))
    log.info("front-end connected")
    if on_connected is not None:
        on_connected(True)
    reason = "the back-end stops"  # what a cancellation leaves
    try:
        if listening is None:
            await _converse(session, transport)
        else:
            await _Watched(listening).converse(session, transport)
        reason = "closed the connection"
    except ProtocolError as error:
        reason = f"broke the protocol: {error}"
    except ConnectionLost as error:
        reason = str(error)
    except LeftBehind:
        reason = "was hung up on: the stop that it asked for could not be answered"
    except Exception:
        # A bug of ours must not take the disk away from the next front-end.
        log.exception("the vhost-user session failed")
        reason = "internal error"
    finally:
        transport.close()
        await _end(session)
        log.info("front-end disconnected", reason=reason)
        if on_connected is not None:
            on_connected(False)


async def _end(session: Session) -> None:
    with trio.CancelScope(shield=True):
        try:
            await session.close()
        except Exception:
            log.exception("the end of the vhost-user session failed")


class _Watched:
    """A conversation while others may wait: one that says nothing must not keep them out."""

    def __init__(self, listening: socket.socket) -> None:
        self._listening = listening
        self._spoke = False
        self._silent = trio.CancelScope()

    async def converse(self, session: Session, transport: Transport) -> None:
        """See `_converse`. Raises ConnectionLost when another had to wait for silence."""
        failure: Exception | None = None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._watch)
            try:
                with self._silent:
                    await _converse(session, transport, self._note_message)
            except Exception as error:  # not in a group
                failure = error
            nursery.cancel_scope.cancel()
        if failure is not None:
            raise failure
        if self._silent.cancelled_caught:
            raise ConnectionLost(f"said nothing for {_SILENCE_S:g} s, and another front-end waits")

    def _note_message(self) -> None:
        self._spoke = True

    async def _watch(self) -> None:
        """Look whether another front-end waits; say so once."""
        await trio.lowlevel.wait_readable(self._listening)
        if not self._spoke:
            await trio.sleep(_SILENCE_S)
        if self._spoke:
            log.warning("another front-end waits: one is served at a time, the first has to leave")
        else:
            self._silent.cancel()


async def _converse(
    session: Session, transport: Transport, on_message: Callable[[], None] | None = None
) -> None:
    """Message in, reply out, until the front-end hangs up."""
    while True:
        # A front-end that floods the socket must not starve the rest of the process.
        await trio.lowlevel.checkpoint()
        message = await transport.receive()
        if message is None:
            return
        if on_message is not None:
            on_message()
        reply = await session.handle(message)
        if reply is None:
            continue
        try:
            await transport.send(reply.data, [] if reply.fd is None else [reply.fd])
        finally:
            if reply.fd is not None:
                os.close(reply.fd)


def _send_now(fd: int, data: bytes) -> bool:
    """Put a message into the back-end channel without waiting; False when the channel is dead.

    A full channel is no error: what is in it has not been read yet, and reading it makes the
    front-end look at the config space, which is up to date by then.
    """
    try:
        # A socket of the same description: not waiting is asked for with each send, since the
        # front-end may change the blocking mode that both sides share.
        with socket.socket(fileno=os.dup(fd)) as channel:
            return channel.send(data, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL) == len(data)
    except BlockingIOError:
        return True
    except OSError:
        return False
