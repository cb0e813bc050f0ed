"""The control socket of one bridge: who may speak on it, and how many at a time."""

from __future__ import annotations

import errno
import os
import signal
import socket
from collections.abc import Awaitable, Callable
from dataclasses import replace
from functools import partial
from http import HTTPStatus
from typing import Final

import structlog
import trio

from bridge.api.actions import Actions
from bridge.api.http import refuse, serve_connection
from bridge.api.live import Live
from bridge.api.places import default_name, is_of_group, open_control, peer_of
from bridge.api.routes import Router
from bridge.api.sampler import Sampler
from bridge.api.view import View
from bridge.api.watch import Watch
from bridge.app import logs
from bridge.app.settings import ControlSettings
from bridge.guest.vhost_user.listener import Listener

_log = structlog.get_logger(__name__)

CONNECTIONS_MAX: Final = 16
"""With 8 KiB of head, 16 KiB of body and one reply (some 30 KB) each, this bounds the memory."""
_ACCEPT_RETRY_S: Final = 0.1
_OUT_OF_ROOM: Final = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


def _terminate() -> None:
    signal.raise_signal(signal.SIGTERM)


async def _unharmed(task: Callable[[], Awaitable[None]]) -> None:
    """Whatever goes wrong in `task`, the disk is served."""
    try:
        await task()
    except Exception as error:
        _log.error("internal error: a part of the control socket has ended", exc_info=error)


class Service:
    """Watches a disk, and answers on its control socket, if it has one."""

    def __init__(
        self,
        live: Live,
        listener: Listener | None,
        settings: ControlSettings,
        *,
        end: Callable[[], None] = _terminate,
        users: frozenset[int] | None = None,
        gid: int | None = None,
        replace_program: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        """`end()` ends the process in order; `replace_program()` has another program take over, or
        raises BridgeError. `users`: whose processes are answered, by uid; None:
        root's and our own. `gid`: a group whose processes are answered, too."""
        self._listener = listener
        self._gid = gid
        self._users = users if users is not None else frozenset((0, os.geteuid()))
        sampler = Sampler(live)
        watch = Watch(live, sampler, slow_s=settings.slow_ms / 1000)
        view = View(live, sampler, watch)
        self._sampler = sampler
        self._watch = watch
        self._actions = Actions(view, end, replace_program)
        self.router = Router(view, self._actions)
        self._connected = 0

    @classmethod
    def of(
        cls,
        live: Live,
        settings: ControlSettings,
        gid: int | None = None,
        *,
        replace_program: Callable[[], Awaitable[None]] | None = None,
    ) -> Service:
        """For the disk `live`, which gets its name here. `gid`: a group that may ask, too. Raises
        ConfigError if the name or the socket that was asked for cannot be had."""
        facts = live.facts
        wanted = default_name(settings, facts.socket_path, facts.serial)
        name, listener = open_control(settings, wanted, gid)
        logs.set_disk(name)
        live = replace(live, facts=replace(facts, name=name))
        return cls(live, listener, settings, gid=gid, replace_program=replace_program)

    def took_over(self, after_s: float) -> None:
        """A guest has waited so long for this program."""
        self._actions.view.took_over_after_s = after_s

    def stopping(self) -> None:
        """The process ends; until then the status can be asked for."""
        self._actions.stopping()

    async def run(self) -> None:
        """Serve until cancelled; the socket is gone then."""
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_unharmed, self._sampler.run)
                nursery.start_soon(_unharmed, self._watch.run)
                if self._listener is not None:
                    accept = partial(self._accept, self._listener.sock, nursery)
                    nursery.start_soon(_unharmed, accept)
        finally:
            if self._listener is not None:
                self._listener.close()

    async def _accept(self, listening: socket.socket, nursery: trio.Nursery) -> None:
        """Take connections until cancelled."""
        while True:
            try:
                sock, _ = listening.accept()
            except BlockingIOError:
                await trio.lowlevel.wait_readable(listening)
                continue
            except OSError as error:
                if error.errno in _OUT_OF_ROOM:
                    await trio.sleep(_ACCEPT_RETRY_S)
                    continue
                if error.errno == errno.ECONNABORTED:
                    continue
                raise
            self._welcome(sock, nursery)
            # A flood of connections leaves the others their turn.
            await trio.lowlevel.checkpoint()

    def _welcome(self, sock: socket.socket, nursery: trio.Nursery) -> None:
        pid, uid = peer_of(sock)
        if not (uid in self._users or (self._gid is not None and is_of_group(sock, self._gid))):
            _log.warning(
                "another user's process is refused on the control socket", uid=uid, pid=pid
            )
            refuse(
                sock, HTTPStatus.FORBIDDEN, "only root, and the bridge's user and group, may ask"
            )
        elif self._connected >= CONNECTIONS_MAX:
            refuse(sock, HTTPStatus.SERVICE_UNAVAILABLE, "too many connections")
        else:
            self._connected += 1
            nursery.start_soon(self._serve, sock)

    async def _serve(self, sock: socket.socket) -> None:
        try:
            sock.setblocking(False)
            stream = trio.SocketStream(trio.socket.from_stdlib_socket(sock))
            await serve_connection(stream, self.router.handle)
        except OSError as error:
            _log.debug("a connection of the control socket broke", reason=error.strerror)
        except Exception as error:
            _log.error("internal error in the control socket", exc_info=error)
        finally:
            sock.close()
            self._connected -= 1
