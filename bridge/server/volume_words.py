"""The words that only our nbdkit plugin and this client use with each other.

NBD has no field for what a fence and a cache need to know, so it stands in two places of free text.

The name of an export says who asks:

    VOLUME                                    the volume, for one writer
    VOLUME@SNAPSHOT                           a snapshot, read-only
    VOLUME@readonly                           the volume, read-only, beside a writer
    VOLUME@session=TOKEN,client=ID,connection=N
                                              connection N of the session TOKEN of the client ID
    VOLUME@session=TOKEN,client=ID.N          attempt N of the client ID to join the shared session

An operator gives two bridges the same `@session=TOKEN` for a migration: such a session is shared.

The description of an export says what the plugin vouches for, in words with blanks between them:

    nbd-bridge volume=NAME generation=G written=W [grown_from=F] [writer=ID] [identity=HEX]
    instance=ID session=yes [read-only: REASON]

and that of a volume which could not be opened, in the list: `nbd-bridge volume=NAME refused: …`.
`nbd_plugin.names` takes the names apart, `nbd_plugin.service` writes the descriptions. From any
other server both are text that means nothing, and is not trusted: a word of another shape counts
as missing, a number out of bounds as a violation.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from bridge.server.untrusted import counter

_SESSION = "@session="
_CLIENT = ",client="
_CONNECTION = ",connection="
_READER = "@readonly"

_OURS = "nbd-bridge volume="
_REASON_MARK = " read-only: "
_READ_ONLY = re.compile(f"{_OURS}.*?{_REASON_MARK}(.+)")
_REFUSED = re.compile(f"{_OURS}.*? refused: (.+)")
_WORD = re.compile(r"(?:^|[\s;,])([a-z_]+)=([^\s;,]{1,128})")
_IDENTITY = re.compile("[0-9a-f]{32}")
_COUNTER = re.compile("[0-9]{1,19}", re.ASCII)


@dataclass(frozen=True, slots=True)
class VolumeName:
    """The name of an export, as far as it would mean something to our plugin."""

    text: str

    @property
    def without_session(self) -> str:
        """What a cache belongs to: the next session of a volume finds it."""
        return self.text.partition(_SESSION)[0]

    @property
    def is_shared(self) -> bool:
        """It names a session already: others may be in the same one, for a migration."""
        return _SESSION in self.text

    @property
    def client(self) -> str | None:
        """The client that it names already."""
        found = re.search(f"{_CLIENT}([^,]+)", self.text)
        return found[1] if found else None

    @property
    def is_plain(self) -> bool:
        """It is a volume, and says nothing else."""
        return "@" not in self.text

    @property
    def may_name_reader(self) -> bool:
        """It is a volume, no snapshot, and does not say yet how it is to be opened."""
        return "@" not in self.without_session

    @property
    def may_name_client(self) -> bool:
        """It does not say yet who we are."""
        return self.is_plain or (self.is_shared and _CLIENT not in self.text)

    @property
    def tells_attempts_apart(self) -> bool:
        """Our plugin can tell our connections from those that we have lost: of a session that is
        shared it has to know the client, and which of its attempts it is."""
        return not self.is_shared or self.may_name_client

    def for_reader(self) -> str:
        """The name of the same volume for one that only reads."""
        return self.without_session + _READER

    def for_connection(self, token: str, *, client: str, number: int) -> str:
        """The name for connection `number` of the session `token`, which is ours, `client`.

        A session that is shared keeps its own token: who we are tells later who wrote last.
        """
        if not self.is_plain:
            return f"{self.text}{_CLIENT}{client}"
        return f"{self.text}{_SESSION}{token}{_CLIENT}{client}{_CONNECTION}{number}"


@dataclass(frozen=True, slots=True)
class VolumeDescription:
    """The description of an export, as far as it is our plugin's."""

    text: str

    @property
    def words(self) -> dict[str, str]:
        """The `key=value` words; a reason at the end has none."""
        return dict(_WORD.findall(self.text.partition(_REASON_MARK)[0]))

    @property
    def is_ours(self) -> bool:
        """Our plugin wrote it."""
        return self.text.startswith(_OURS)

    @property
    def is_fenced(self) -> bool:
        """The server admits one session that writes, and executes nothing of a lost connection
        once it has admitted the next."""
        return self.words.get("session") == "yes"

    @property
    def instance(self) -> str:
        """Changes whenever unflushed writes may have been lost; "" if the plugin does not say."""
        return self.words.get("instance", "")

    @property
    def sessions(self) -> tuple[int, int] | None:
        """(generation, written): the count of writable sessions, this one's and the last that
        wrote; None if that is not told. Raises ProtocolError for numbers that cannot be."""
        words = self.words
        generation = counter("generation in the description", words.get("generation"))
        written = counter("written in the description", words.get("written"))
        if generation is None or written is None:
            return None
        return generation, written

    @property
    def content_sessions(self) -> tuple[int, int] | None:
        """`sessions`, where growing the volume past our plugin does not count as a write.

        The plugin cannot tell for certain that nothing else was changed: a look at the content has
        to confirm it.
        """
        sessions = self.sessions
        text = self.words.get("grown_from", "")
        if sessions is None or not _COUNTER.fullmatch(text):
            return sessions
        return sessions[0], min(sessions[1], int(text))

    @property
    def writer(self) -> str | None:
        """The client that wrote last: one in a shared session has another name for each attempt to
        connect, its own with a number."""
        return self.words.get("writer")

    def was_written_by(self, client: str) -> bool:
        """That client wrote last, whichever attempt to connect it was."""
        writer = self.writer or ""
        name, dot, attempt = writer.rpartition(".")
        return writer == client or (name == client and bool(dot) and attempt.isdecimal())

    @property
    def identity(self) -> bytes:
        """16 bytes that no other volume has; b"" if it is not told."""
        text = self.words.get("identity", "")
        return bytes.fromhex(text) if _IDENTITY.fullmatch(text) else b""

    @property
    def why_read_only(self) -> str:
        """Why the volume could not be opened for writing, "" if it could or was not to."""
        match = _READ_ONLY.match(self.text)
        return match[1] if match else ""

    @property
    def why_refused(self) -> str:
        """Why the volume was not opened: nbdkit before 1.42 has no other way to tell."""
        match = _REFUSED.match(self.text)
        return match[1] if match else ""
