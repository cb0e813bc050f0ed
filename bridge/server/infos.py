"""What a server says of an export while it is negotiated: the INFO replies."""

from __future__ import annotations

from bridge.errors import ProtocolError
from bridge.server.untrusted import bounded, clean
from bridge.server.untrusted import text as text_of
from bridge.spec import nbd as p


class Infos:
    """The information that comes before the ACK of GO or INFO; order and repetition are free."""

    def __init__(self) -> None:
        self.export: tuple[int, int] | None = None
        self.name: str | None = None
        self.description = ""
        self.block_sizes: tuple[int, int, int] | None = None

    def take(self, kind: int, payload: bytes) -> None:
        """One reply before the ACK. Raises ProtocolError."""
        if kind != p.REP_INFO or len(payload) < 2:
            raise ProtocolError(f"server answered GO with reply type {kind}, {len(payload)} bytes")
        (info,) = p.U16.unpack_from(payload)
        body = payload[2:]
        if info == p.INFO_EXPORT:
            _expect_length("EXPORT", body, p.EXPORT_INFO.size)
            self.export = p.EXPORT_INFO.unpack(body)
        elif info == p.INFO_NAME:
            self.name = text_of(body, "export name")
        elif info == p.INFO_DESCRIPTION:
            self.description = clean(text_of(body, "description"))
        elif info == p.INFO_BLOCK_SIZE:
            _expect_length("BLOCK_SIZE", body, p.BLOCK_SIZE_INFO.size)
            self.block_sizes = _checked_block_sizes(*p.BLOCK_SIZE_INFO.unpack(body))


def _checked_block_sizes(minimum: int, preferred: int, maximum: int) -> tuple[int, int, int]:
    """NBD "Block size constraints". A bad preference is only a bad hint; the others bind us."""
    if not 1 <= minimum <= 65536 or minimum & (minimum - 1):
        raise ProtocolError(f"minimum block size {minimum}: not a power of two up to 65536")
    if maximum < minimum or maximum == 0:
        raise ProtocolError(f"maximum payload {maximum} below the minimum block size {minimum}")
    # Above the preferred size, says the specification, which is 512 at least. Of much less every
    # request of a guest would be thousands of commands.
    bounded("maximum payload", maximum, least=512, most=p.LENGTH_32_MAX)
    if preferred < max(minimum, 512) or preferred & (preferred - 1):
        preferred = max(minimum, 4096)
    if maximum == p.LENGTH_32_MAX:
        maximum = p.PAYLOAD_DEFAULT_MAX_BYTES
    maximum = min(maximum, p.PAYLOAD_DEFAULT_MAX_BYTES)
    return minimum, preferred, maximum - maximum % minimum


def _expect_length(name: str, body: bytes, length: int) -> None:
    if len(body) != length:
        raise ProtocolError(f"INFO_{name} of {len(body)} bytes: it has {length}")
