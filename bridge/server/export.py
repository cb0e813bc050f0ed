"""What a server said about an export."""

from __future__ import annotations

from dataclasses import dataclass, field

from bridge.server.volume_words import VolumeDescription, VolumeName
from bridge.spec.nbd import PAYLOAD_DEFAULT_MAX_BYTES, TransmissionFlags


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
    def volume(self) -> VolumeDescription:
        """What our nbdkit plugin says of it, in words of its own; nothing from other servers."""
        return VolumeDescription(self.description)

    @property
    def is_fenced(self) -> bool:
        """The server executes nothing of our lost connections once we have written on the next."""
        return self.volume.is_fenced and VolumeName(self.name).tells_attempts_apart

    @property
    def sessions(self) -> tuple[int, int] | None:
        """See VolumeDescription."""
        return self.volume.sessions

    @property
    def content_sessions(self) -> tuple[int, int] | None:
        """See VolumeDescription."""
        return self.volume.content_sessions

    @property
    def identity(self) -> bytes:
        """See VolumeDescription."""
        return self.volume.identity

    def check_untrusted(self) -> None:
        """Raises ProtocolError if the description has a number that cannot be."""
        _ = self.volume.sessions
