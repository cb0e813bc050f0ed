"""Which client may write a volume, and when: sessions, their fence and their generation.

Why. NBD has no notion of a session. A client that lost its connection comes back on a new one
and sends its unanswered writes again; a write that the server still holds from the old
connection may be executed after that, and overwrite newer, flushed data. So a volume is written
by one **session** at a time, and the next begins only when nothing of the previous one can
still happen: nbdkit calls `close` after the connection's last request has ended, and the last
`close` of a session ends it.

Which connections form a session:

- Those whose export name carries the same `session=TOKEN`. They are admitted together, so
  multi-conn is announced to them.
- A connection without a token is a session of its own: multi-conn is not announced, so honest
  clients (nbdcopy, the kernel, QEMU) open just one connection. A reconnecting client waits for
  its own old connection to drain, and then goes on.
- `VOLUME@session=TOKEN,connection=N` replaces an earlier connection N of that session: the
  earlier one is **revoked** (each further request gets ESHUTDOWN) and its requests in flight are
  waited for. So one connection of many can be replaced while the old one still looks alive.
- `VOLUME@session=TOKEN,client=ID` replaces, in the same way, the whole earlier session of the
  client ID (a name that no other client uses): after a network failure the server may believe in
  the old connections for long.

- `VOLUME@session=TOKEN,client=ID` joins that session if it is open: others are in it for a
  migration, and may be the ones that write. Nothing tells yet whether the newcomer's guest comes
  from one of them. Its first write does: from then on the connections of the clients that came
  before it are revoked, and that write waits for their requests in flight. So a client that comes
  back names itself anew each time (`ID.1`, `ID.2`): it could not be told from its old self.
- A session whose flush has failed admits no more connections: the disk has to be opened anew. The
  next one with its token ends it, whoever is still in it.

Waiting is bounded by `fence_timeout`; then the newcomer is refused (EBUSY), or, with
`fence=takeover`, the session that is in its way is revoked, drained and ended.

The **generation** counts writable sessions. It is stored before the handshake ends, so the
number in the export's description is the one of the session being opened (nbdkit 1.32 and 1.42
call `open`, then `get_size` and the `can_…`, then `export_description`). `written` is the last
generation that wrote: it is stored before that session's first write is executed. A client that
cached the volume under generation G may keep the cache exactly if `written <= G`; looking around
(`nbdinfo --list` opens and closes every export) raises `generation`, not `written`. Within a
session that several clients share (a migration), `writer` is the ID of the one that wrote last: a
client that finds its own there knows that no other client wrote since. The first session also gives
the volume its **identity**: one of the same name that was made anew, or came back without its
counters, has another. One that was changed past this plugin (see `last_seen`) was written by
a generation of its own. If all that can be said is that it is longer now, `grown_from` is what
`written` was before: a client with unwritten data for the volume may bring it if that is no later
than G, once a look at the content showed nothing else.
"""

from __future__ import annotations

import errno
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import replace

from nbd_plugin.errors import PluginError
from nbd_plugin.names import ExportName
from nbd_plugin.store import Disk, VolumeState

_DRAIN_POLL_S = 0.005

OpenDisk = Callable[[float], Disk]
"""Opens the volume for writing, waiting at most that many seconds for other processes."""


def begin_generation(disk: Disk, *, writes: bool = False) -> VolumeState:
    """Store that a writable session begins, and return the state with its number. `writes`: it
    also counts as having written."""

    def change(state: VolumeState) -> VolumeState:
        generation, written = state.generation, state.written
        grown_from, grown_to = state.grown_from, state.grown_to
        if disk.was_changed(state):
            generation = written = generation + 1
            if disk.has_grown(state):
                grown_from = state.grown_from if state.only_grew else state.written
                grown_to = written
        generation += 1
        return replace(
            state,
            grown_from=grown_from,
            grown_to=grown_to,
            generation=generation,
            written=generation if writes else written,
            identity=state.identity or secrets.token_hex(16),
            seen=disk.seen(writing=False),
        )

    return disk.update_state(change)


class Handle:
    """One connection: nbdkit's handle.

    `busy` holds one item per request being executed: `append` and `pop` are atomic, a counter
    would need a lock per request.
    """

    __slots__ = (
        "busy",
        "client",
        "connection",
        "disk",
        "entered",
        "multi_conn",
        "peer",
        "read_only",
        "revoked",
        "session",
        "volume",
    )

    def __init__(
        self,
        volume: str,
        disk: Disk,
        session: Session | None,
        connection: int | None,
        client: str | None = None,
    ) -> None:
        """`connection`: the number in the export's name, None without one. `session`: None for a
        reader."""
        self.volume = volume
        self.disk = disk
        self.session = session
        self.connection = connection
        self.client = client or ""
        self.read_only = session is None
        self.multi_conn = session is None or session.shared
        self.revoked = False
        self.entered = 0
        """When its client came into the session: see `Session.let_in`."""
        self.peer = b""
        """See `connections`."""
        self.busy: list[None] = []

    def check_alive(self) -> None:
        """Raise PluginError (ESHUTDOWN) when another connection took this one's place."""
        if self.revoked:
            raise PluginError("this connection was replaced by a newer one", errno.ESHUTDOWN)


class Session:
    """A writable session. `disk` and `generation` are set once it is open."""

    def __init__(self, fence: Fence, name: ExportName, *, shared: bool) -> None:
        self.fence = fence
        self.token = name.session
        self.client = name.client
        self.shared = shared
        self.is_open = False
        self.disk: Disk | None = None
        self.generation = 0
        self.writer: str | None = None
        """The client that wrote last, "" for one without a name; None: none yet."""
        self.handles: list[Handle] = []
        self._clients_total = 0
        self._ended: set[str] = set()
        """Clients that have connections here, and no rights: a later one has written."""
        self._mark = threading.Lock()

    def admits(self, token: str | None) -> bool:
        """Whether a connection with this session name may join."""
        if self.disk is None or self.disk.failed:
            return False
        return self.is_open and self.shared and token == self.token

    def is_replaced_by(self, name: ExportName) -> bool:
        """Whether a connection of that name, which is not admitted, need not wait for the end."""
        if not self.is_open:
            return False
        is_of_its_client = name.client is not None and name.client == self.client
        has_failed = self.disk is not None and self.disk.failed
        return is_of_its_client or (has_failed and self.shared and name.session == self.token)

    def note_write(self, handle: Handle) -> None:
        """Store that this generation and client write, before their first write is executed, and
        end the rights of those that wrote before. Raises PluginError (ESHUTDOWN) for one of them.
        """
        with self._mark:
            handle.check_alive()
            if self.writer == handle.client or self.disk is None:
                return
            before = self._clients_before(handle)
            for other in before:
                other.revoked = True
                self._ended.add(other.client)
        # Not with the lock: what they have in flight may want it. As long as it takes: on the same
        # storage this write would take as long.
        while any(other.busy for other in before):
            time.sleep(_DRAIN_POLL_S)
        with self._mark:
            handle.check_alive()
            if self.writer == handle.client:
                return
            seen = self.disk.seen(writing=True)
            self.disk.update_state(
                lambda state: replace(
                    state, written=self.generation, seen=seen, writer=handle.client
                )
            )
            self.writer = handle.client

    def let_in(self, handle: Handle) -> None:
        """Add a connection. All that its client has here came when the first of them did, even if
        that one has left, and lose their rights together: it opens them while others open theirs.
        """
        with self._mark:
            client = handle.client
            known = [each.entered for each in self.handles if client and each.client == client]
            if known:
                handle.entered = known[0]
                handle.revoked = client in self._ended
            else:
                self._clients_total += 1
                handle.entered = self._clients_total
                self._ended.discard(client)
            self.handles.append(handle)

    def _clients_before(self, handle: Handle) -> list[Handle]:
        """The connections of other clients that came before this one. Those without a name cannot
        be told apart: they neither end others' rights nor lose their own."""
        if not handle.client:
            return []
        handles = list(self.handles)
        return [each for each in handles if each.client and each.entered < handle.entered]

    def close_disk(self) -> None:
        """Remember the volume as it is now, after the last writer, and let go of it."""
        assert self.disk is not None
        disk = self.disk
        try:
            if self.writer is not None:
                disk.update_state(lambda state: replace(state, seen=disk.seen(writing=False)))
        finally:
            disk.close()


class Fence:
    """Admits the writable sessions of one volume one after the other."""

    def __init__(self, volume: str, *, takeover: bool = False) -> None:
        self._volume = volume
        self._takeover = takeover
        self._changed = threading.Condition()
        self._session: Session | None = None
        self.users = 0
        """How many calls are about to use this fence; see `Service`."""

    @property
    def is_empty(self) -> bool:
        """No session is open, or about to be."""
        return self._session is None

    def enter(
        self, name: ExportName, *, shared: bool, timeout_s: float, open_disk: OpenDisk
    ) -> Handle:
        """Join the present session or begin the next one, waiting at most `timeout_s`.

        `shared`: connections with the same `name.session` belong together. Raises PluginError
        (EBUSY) and whatever `open_disk` raises.
        """
        deadline = time.monotonic() + timeout_s
        with self._changed:
            while (session := self._session) is not None:
                if session.admits(name.session):
                    return self._join(session, name, deadline)
                if session.is_replaced_by(name):
                    self._break(session, deadline)
                    continue
                if not self._changed.wait(deadline - time.monotonic()):
                    self._break_or_refuse(timeout_s)
            session = self._session = Session(self, name, shared=shared)
        return self._begin(session, name, deadline, open_disk)

    def leave(self, handle: Handle) -> None:
        """The connection's last request has ended; the last connection ends the session."""
        session = handle.session
        assert session is not None
        with self._changed:
            if handle in session.handles:
                session.handles.remove(handle)
            if session.handles or not session.is_open:
                self._changed.notify_all()
                return
            session.is_open = False  # it admits no further connection
        self._end(session)

    def _begin(
        self, session: Session, name: ExportName, deadline: float, open_disk: OpenDisk
    ) -> Handle:
        """Open the disk and raise the generation; others wait meanwhile."""
        disk = None
        try:
            disk = open_disk(max(0.0, deadline - time.monotonic()))
            if disk.read_only:
                self._forget(session)
                return Handle(self._volume, disk, None, None)
            session.generation = begin_generation(disk).generation
        except BaseException:
            try:
                if disk is not None:
                    disk.close()
            finally:
                self._forget(session)
            raise
        with self._changed:
            session.disk = disk
            session.is_open = True
            handle = Handle(self._volume, disk, session, name.connection, name.client)
            session.let_in(handle)
            self._changed.notify_all()
        return handle

    def _join(self, session: Session, name: ExportName, deadline: float) -> Handle:
        """Add a connection to an open session. Called and returns with the lock held."""
        assert session.disk is not None
        if name.connection is not None:
            old = [h for h in session.handles if h.connection == name.connection]
            self._revoke(old, deadline)
        handle = Handle(self._volume, session.disk, session, name.connection, name.client)
        session.let_in(handle)
        return handle

    def _revoke(self, handles: list[Handle], deadline: float) -> None:
        """End these connections' right to do anything, and wait for what they are doing.

        Keeps the lock: the wait is short, or the volume is stuck anyway.
        """
        for handle in handles:
            handle.revoked = True
        # A request appends to `busy` before it looks at `revoked`: so it either sees the flag or
        # is seen here.
        while any(handle.busy for handle in handles):
            if time.monotonic() >= deadline:
                raise PluginError(
                    f"volume {self._volume}: requests of the replaced connection do not end",
                    errno.EBUSY,
                )
            time.sleep(_DRAIN_POLL_S)

    def _break_or_refuse(self, timeout_s: float) -> None:
        """The wait is over: end the session in the way, or refuse. Called with the lock held."""
        session = self._session
        if session is None:
            return
        if not (self._takeover and session.is_open):
            # Not by which token: any client that knows it may join.
            holder = "another session" if session.token else "another connection"
            raise PluginError(
                f"volume {self._volume} is open for writing by {holder} "
                f"({len(session.handles)} connections); waited {timeout_s:g} s",
                errno.EBUSY,
            )
        self._break(session, time.monotonic() + timeout_s)

    def _break(self, session: Session, deadline: float) -> None:
        """End a session whose connections are still there. Called with the lock held."""
        self._revoke(session.handles, deadline)
        session.is_open = False
        session.handles.clear()
        try:
            session.close_disk()
        finally:
            self._session = None
            self._changed.notify_all()

    def _end(self, session: Session) -> None:
        try:
            session.close_disk()
        finally:
            self._forget(session)

    def _forget(self, session: Session) -> None:
        with self._changed:
            if self._session is session:
                self._session = None
            self._changed.notify_all()
