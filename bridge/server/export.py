"""What a server said about an export."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from bridge.server.nbd_protocol import PAYLOAD_DEFAULT_MAX_BYTES, TransmissionFlags
from bridge.server.untrusted import counter

_WORD = re.compile(r"(?:^|[\s;,])([a-z_]+)=([^\s;,]{1,128})")
_REFUSAL = re.compile(r"nbd-bridge volume=.*? refused: (.+)")
_READ_ONLY = re.compile(r"nbd-bridge volume=.*? read-only: (.+)")
_IDENTITY = re.compile("[0-9a-f]{32}")
_COUNTER = re.compile("[0-9]{1,19}", re.ASCII)


@dataclass(frozen=True, slots=True)
class Export:
    """One export, as negotiated on one connection (NBD "Transmission flags", "Info types").

    Block sizes are in bytes; `min_block_bytes` is 1 where the server named none.
    """

    name: str
    size_bytes: int
    flags: TransmissionFlags = field(default=TransmissionFlags(0))
    description: str = ""
    canonical_name: str | None = None
    min_block_bytes: int = 1
    preferred_block_bytes: int = 4096
    max_payload_bytes: int = PAYLOAD_DEFAULT_MAX_BYTES
    has_block_sizes: bool = False
    """The server named its block sizes."""
    structured: bool = False
    extended: bool = False
    tls: bool = False
    contexts: dict[str, int] = field(default_factory=dict)
    """Metadata contexts selected on this connection: name → id."""

    @property
    def read_only(self) -> bool:
        """Changes are refused."""
        return bool(self.flags & TransmissionFlags.READ_ONLY)

    @property
    def can_flush(self) -> bool:
        """FLUSH is understood. Without it, nothing says when a write is durable."""
        return bool(self.flags & TransmissionFlags.SEND_FLUSH)

    @property
    def can_fua(self) -> bool:
        """Changes may be sent with FUA."""
        return bool(self.flags & TransmissionFlags.SEND_FUA)

    @property
    def can_trim(self) -> bool:
        """TRIM is understood."""
        return bool(self.flags & TransmissionFlags.SEND_TRIM)

    @property
    def can_write_zeroes(self) -> bool:
        """WRITE_ZEROES is understood."""
        return bool(self.flags & TransmissionFlags.SEND_WRITE_ZEROES)

    @property
    def can_fast_zero(self) -> bool:
        """WRITE_ZEROES with FAST_ZERO fails where it would not be fast."""
        return bool(self.flags & TransmissionFlags.SEND_FAST_ZERO)

    @property
    def can_df(self) -> bool:
        """A READ with DF is answered in one chunk."""
        return bool(self.flags & TransmissionFlags.SEND_DF)

    @property
    def can_multi_conn(self) -> bool:
        """A FLUSH on one connection covers the writes answered on the others."""
        return bool(self.flags & TransmissionFlags.CAN_MULTI_CONN)

    @property
    def can_cache(self) -> bool:
        """CACHE (read ahead) is understood."""
        return bool(self.flags & TransmissionFlags.SEND_CACHE)

    @property
    def can_block_status(self) -> bool:
        """A metadata context was selected: BLOCK_STATUS is understood."""
        return bool(self.contexts)

    @property
    def rotational(self) -> bool:
        """The medium prefers long sequential requests."""
        return bool(self.flags & TransmissionFlags.ROTATIONAL)

    @property
    def usable_bytes(self) -> int:
        """The size down to a whole minimum block: the rest cannot be reached by any request."""
        return self.size_bytes - self.size_bytes % self.min_block_bytes

    @property
    def sessions(self) -> tuple[int, int] | None:
        """(generation, written): our plugin's count of writable sessions, this one's and the last
        that wrote; None from other servers."""
        properties = self.properties
        generation = counter("generation in the description", properties.get("generation"))
        written = counter("written in the description", properties.get("written"))
        if generation is None or written is None:
            return None
        return generation, written

    def check_untrusted(self) -> None:
        """Raises ProtocolError if the description has a number that cannot be."""
        _ = self.sessions

    @property
    def content_sessions(self) -> tuple[int, int] | None:
        """`sessions`, where growing the volume past our plugin does not count as a write.

        The plugin cannot tell for certain that nothing else was changed: a look at the content has
        to confirm it.
        """
        sessions = self.sessions
        text = self.properties.get("grown_from", "")
        if sessions is None or not _COUNTER.fullmatch(text):
            return sessions
        return sessions[0], min(sessions[1], int(text))

    @property
    def identity(self) -> bytes:
        """16 bytes that no other volume of our plugin has; b"" from other servers."""
        text = self.properties.get("identity", "")
        return bytes.fromhex(text) if _IDENTITY.fullmatch(text) else b""

    @property
    def properties(self) -> dict[str, str]:
        """The `key=value` words of the description, which our nbdkit plugin puts there."""
        words, _, _ = self.description.partition(" read-only: ")
        return dict(_WORD.findall(words))

    @property
    def why_read_only(self) -> str:
        """Why our plugin could not open the volume for writing, "" if it could or was not to."""
        match = _READ_ONLY.match(self.description)
        return match[1] if match else ""


def refusal_reason(description: str) -> str:
    """Why our plugin did not open a volume, from the volume's line in the list of exports: nbdkit
    before 1.42 has no other way to tell. "" from other servers."""
    match = _REFUSAL.match(description)
    return match[1] if match else ""
