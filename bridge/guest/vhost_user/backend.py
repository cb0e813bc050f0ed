"""The back-end's socket: one front-end after the other, until cancelled.

One task reads the main socket, has the session handle each message before it reads the next, and
writes the reply. It waits for nothing else from the front-end. In particular it only writes to the
back-end channel (SET_BACKEND_REQ_FD), and without waiting: a front-end may leave the channel unread
until it has its reply on the main socket.

**A stop.** The front-end is hung up on when the guest's rings are closed and the listening socket
is gone, not before: it connects again at once, and would have to wait in its main loop for an
answer from a process that is about to end. (QEMU before 9.0 never tries again after that.)
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable
from functools import partial

import structlog
import trio

from bridge.errors import ConnectionLost, LeftBehind, ProtocolError
from bridge.guest.vhost_user.device_interface import VhostUserDevice
from bridge.guest.vhost_user.handover import Conversation, Desk, Handover
from bridge.guest.vhost_user.listener import Listener
from bridge.guest.vhost_user.session import FrontEndSession
from bridge.guest.vhost_user.transport import Transport
from bridge.guest.vhost_user.unshared import UnsharedMemory

log = structlog.get_logger(__name__)

_STOPS = "the back-end stops"

_SILENCE_S = 5.0
"""A front-end that has sent nothing yet is hung up on when another has waited this long."""

_ACCEPT_RETRY_S = 0.1
"""Wait this long when the process is out of descriptors, then try again."""


async def serve(
    device: VhostUserDevice,
    listener: Listener,
    *,
    on_connected: Callable[[bool], None] | None = None,
    desk: Desk | None = None,
    first: Handover | None = None,
) -> None:
    """Serve `device` to the front-ends that connect to `listener`, one at a time, until cancelled.

    Returns only when the listener is a socket that was connected already and its front-end has
    disconnected. The listener is closed in the end. `on_connected` is called when a front-end
    connects (True) and when it has disconnected (False). `desk` has the present conversation
    meanwhile. `first`: what the process before this one had with a front-end; that goes on here.
    After a cancellation the device still finishes what is in flight; it bounds that time itself.
    """
    desk = desk or Desk()
    serve_one = partial(_serve_one, device, listener, on_connected, UnsharedMemory(), desk)
    with listener:
        if first is not None:
            await serve_one(first.sock(), first)
        if listener.is_connected:
            if first is None:
                await serve_one(listener.sock.dup())
            return
        while True:
            await serve_one(await _accept(listener.sock))


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
    listener: Listener,
    on_connected: Callable[[bool], None] | None,
    unshared: UnsharedMemory,
    desk: Desk,
    sock: socket.socket,
    handover: Handover | None = None,
) -> None:
    """Serve one front-end until it disconnects and its session is closed.

    `listener`: where other front-ends may be waiting. `handover`: its conversation has begun with
    another process.
    """
    transport = Transport(sock, replies=False)
    session = FrontEndSession(
        device, _send_now, on_refused=unshared.refused, on_region=unshared.of(sock)
    )
    desk.present = Conversation(session, transport)
    log.info("front-end connected" if handover is None else "front-end taken over")
    if on_connected is not None:
        on_connected(True)
    reason = _STOPS  # stays so when this task is cancelled
    try:
        if handover is not None:
            for message in handover.messages:
                await session.handle(message)
            desk.taken_over()
        if listener.is_connected:
            await _converse(session, transport)
        else:
            watched = _Watched(listener.sock, spoke=handover is not None)
            await watched.converse(session, transport)
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
        desk.present = None
        await _end(session, transport, listener if reason is _STOPS else None)
        log.info("front-end disconnected", reason=reason)
        if on_connected is not None:
            on_connected(False)


async def _end(session: FrontEndSession, transport: Transport, listener: Listener | None) -> None:
    """`listener`: it is closed before the front-end is hung up on; None: others may connect."""
    if listener is None:
        transport.close()
    with trio.CancelScope(shield=True):
        try:
            await session.close()
        except Exception:
            log.exception("the end of the vhost-user session failed")
    if listener is not None:
        listener.close()
        transport.close()


class _Watched:
    """A conversation while other front-ends may wait: a silent one must not keep them out."""

    def __init__(self, listening: socket.socket, *, spoke: bool) -> None:
        self._listening = listening
        self._spoke = spoke
        self._silent = trio.CancelScope()

    async def converse(self, session: FrontEndSession, transport: Transport) -> None:
        """As `_converse`. Raises ConnectionLost when another waits for a silent front-end."""
        failure: Exception | None = None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._watch)
            try:
                with self._silent:
                    await _converse(session, transport, self._note_message)
            except Exception as error:  # taken out of the nursery, which would wrap it in a group
                failure = error
            nursery.cancel_scope.cancel()
        if failure is not None:
            raise failure
        if self._silent.cancelled_caught:
            raise ConnectionLost(f"said nothing for {_SILENCE_S:g} s, and another front-end waits")

    def _note_message(self) -> None:
        self._spoke = True

    async def _watch(self) -> None:
        """Wait until another front-end waits, then log that once or end the silent one."""
        await trio.lowlevel.wait_readable(self._listening)
        if not self._spoke:
            await trio.sleep(_SILENCE_S)
        if self._spoke:
            log.warning("another front-end waits: one is served at a time, the first has to leave")
        else:
            self._silent.cancel()


async def _converse(
    session: FrontEndSession, transport: Transport, on_message: Callable[[], None] | None = None
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

    A full channel is not an error: it holds messages that the front-end has not read yet. Reading
    any of them makes it look at the config space, which is up to date by then.
    """
    try:
        # MSG_DONTWAIT with each send: the front-end shares this file description and may change
        # its blocking mode.
        with socket.socket(fileno=os.dup(fd)) as channel:
            return channel.send(data, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL) == len(data)
    except BlockingIOError:
        return True
    except OSError:
        return False
