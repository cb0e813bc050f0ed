"""What the small server offers, and how it answers."""

from __future__ import annotations

from dataclasses import dataclass, field

from bridge.spec import nbd as p
from bridge.spec.nbd import TransmissionFlags

DEFAULT_FLAGS = (
    TransmissionFlags.HAS_FLAGS
    | TransmissionFlags.SEND_FLUSH
    | TransmissionFlags.SEND_FUA
    | TransmissionFlags.SEND_TRIM
    | TransmissionFlags.SEND_WRITE_ZEROES
    | TransmissionFlags.SEND_DF
    | TransmissionFlags.CAN_MULTI_CONN
    | TransmissionFlags.SEND_CACHE
    | TransmissionFlags.SEND_FAST_ZERO
)


@dataclass(slots=True)
class ServerSettings:
    """Every capability can be switched, to show a client every kind of server."""

    flags: TransmissionFlags = DEFAULT_FLAGS
    description: str = ""
    fixed_newstyle: bool = True
    no_zeroes: bool = True
    oldstyle: bool = False
    go: bool = True
    info: bool = True
    list_exports: bool = True
    structured: bool = True
    extended: bool = True
    block_status: bool = True
    tls: bool = False
    tls_required: bool = False
    block_sizes: tuple[int, int, int] | None = None
    """Minimum, preferred, maximum payload."""
    enforce_block_sizes: bool = True
    effect_max_bytes: int = p.LENGTH_32_MAX
    """Longest TRIM, WRITE_ZEROES, CACHE that is not refused with EINVAL."""
    read_chunk_bytes: int = 0
    """Answer structured reads in chunks of this size, last one first; 0 = in one piece."""
    holes: bool = False
    """Answer zeroes in a structured read with hole chunks."""
    refuse: dict[int, int] = field(default_factory=dict)
    """Option → error reply type: refuse these options."""

    @property
    def payload_max_bytes(self) -> int:
        """Longest payload of a READ or WRITE."""
        sizes = self.block_sizes
        return min(sizes[2], 64 << 20) if sizes else p.PAYLOAD_DEFAULT_MAX_BYTES
