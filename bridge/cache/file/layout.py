"""The layout of a cache file: two copies of a header, the index, the data.

    0        header, copy A      4096 bytes, checksummed, with a sequence number
    4096     header, copy B      the valid copy with the higher sequence number counts
    8192     granule numbers     u32 per slot: which granule of the disk the slot holds
    …        states              u64 per slot: valid bits, dirty bits, a check over both
    …        data                granule_bytes per slot

Two copies, because a process can be killed in the middle of writing one. Native byte order:
a cache file never leaves its host. Slot 0 holds nothing: 0 means "no slot" everywhere.

A slot's state is one u64, stored at once: bits 0-15 valid, 16-31 dirty (dirty or written: not
known to be durable on the server), 32-63 a check over these bits and the granule number, so
that a flipped bit in either is found. A slot whose state is 0 is free.

Source: none but this file; the format is this project's own.
"""

from __future__ import annotations

import hashlib
import struct
import zlib
from dataclasses import dataclass, replace

from bridge.errors import ConfigError, Remedy
from bridge.units import size_text

MAGIC = b"NBDBCACH"
VERSION = 1
HEADER_BYTES = 4096
HEADER_AREA_BYTES = 2 * HEADER_BYTES

BITS = 0xFFFF
"""All blocks of a granule of 16 blocks; no granule has more."""
DIRTY_SHIFT = 16
LOW_MASK = 0xFFFFFFFF
NO_GRANULE = 0xFFFFFFFF
"""The granule number of slot 0, and the bound of all others."""

MIN_SLOTS = 64
"""A cache of 4 MiB; below this the dirty limits round to nothing."""
MAX_SLOTS = 1 << 28
"""16 TiB of cache: 3 GiB of index. A header that asks for more is not ours."""

_PAGE = 4096
_FIXED = struct.Struct("=8sIIIIIIQQQQ16sI32sHH")
_TEXT_BYTES = 1500
"""Of the URI and of the export's name, for `cache show`; the identity is their hash."""
_TAIL = struct.Struct("=QQQ16sI")
"""At the end of the page: the witness of a foreign change, what may have been discarded, the
export's identity, and the checksum of all that is before that. Older files have zeroes there."""
_CRC = struct.Struct("=I")


def check_of(granule: int, low: int) -> int:
    """The upper half of a state word, for its lower half: every single flipped bit changes it."""
    return ((low ^ granule * 0x9E3779B1) * 0x85EBCA6B >> 7) & LOW_MASK


def state_word(granule: int, valid: int, dirty: int) -> int:
    """The state of a slot that holds `granule`; `valid` and `dirty` have one bit per block."""
    low = valid | dirty << DIRTY_SHIFT
    return low | ((low ^ granule * 0x9E3779B1) * 0x85EBCA6B >> 7 & LOW_MASK) << 32


@dataclass(frozen=True)
class Geometry:
    """Sizes of a cache and of the disk behind it, all in bytes except `slots`."""

    disk_bytes: int
    block_bytes: int
    granule_bytes: int
    slots: int
    """Usable slots; the arrays have one more."""

    @property
    def granules(self) -> int:
        """Granules of the disk, the last one possibly cut short."""
        return -(-self.disk_bytes // self.granule_bytes)

    @property
    def states_offset(self) -> int:
        """Where the states begin, in bytes from the start of the file."""
        return HEADER_AREA_BYTES + _page_up((self.slots + 1) * 4)

    @property
    def data_offset(self) -> int:
        """Where the data begins, in bytes from the start of the file."""
        return self.states_offset + _page_up((self.slots + 1) * 8)

    @property
    def file_bytes(self) -> int:
        """The size of the whole file."""
        return self.data_offset + (self.slots + 1) * self.granule_bytes

    def fault(self) -> str | None:
        """What is wrong with these numbers, or None."""
        block, granule = self.block_bytes, self.granule_bytes
        if block & (block - 1) or not 512 <= block <= 65536:
            return f"block of {block} bytes (a power of two, 512 to 65536)"
        if granule & (granule - 1) or not block <= granule <= 16 * block:
            return f"granule of {granule} bytes (1, 2, 4, 8 or 16 blocks of {block})"
        if not 1 <= self.slots <= MAX_SLOTS:
            return f"{self.slots} granules (1 to {MAX_SLOTS})"
        if self.disk_bytes < 1 or self.granules >= NO_GRANULE:
            return f"disk of {self.disk_bytes} bytes"
        return None


class CacheSizeFault(ConfigError):
    """A cache of `wanted_bytes` is not possible over blocks of `block_bytes`, the least or most is
    `limit_bytes`."""

    def __init__(
        self, wanted_bytes: int, limit_bytes: int, block_bytes: int, *, too_small: bool
    ) -> None:
        bound = "below the minimum" if too_small else "above the maximum"
        super().__init__(
            f"a cache of {size_text(wanted_bytes)} is {bound} of {size_text(limit_bytes)} for "
            f"blocks of {size_text(block_bytes)}"
        )
        self.wanted_bytes = wanted_bytes
        self.limit_bytes = limit_bytes
        self.block_bytes = block_bytes
        self.too_small = too_small


def geometry_for(*, disk_bytes: int, cache_bytes: int, min_block_bytes: int = 1) -> Geometry:
    """The geometry of a cache of about `cache_bytes` over a disk.

    Blocks are 4 KiB or the server's minimum block, granules 64 KiB. No more slots than the disk
    has granules. Raises ConfigError for a cache or a disk that is too small or too large.
    """
    block = max(4096, min_block_bytes)
    granule = max(65536, block)
    slots = cache_bytes // granule
    if slots < MIN_SLOTS:
        raise CacheSizeFault(cache_bytes, MIN_SLOTS * granule, block, too_small=True)
    geometry = Geometry(disk_bytes, block, granule, min(slots, -(-disk_bytes // granule)))
    if geometry.slots > MAX_SLOTS:
        raise CacheSizeFault(cache_bytes, MAX_SLOTS * granule, block, too_small=False)
    if geometry.granules >= NO_GRANULE:
        raise ConfigError(
            f"no cache is possible for an export of {size_text(disk_bytes)}, only for less than "
            f"{size_text(NO_GRANULE * granule)}",
            remedy=Remedy.NO_CACHE,
        )
    if fault := geometry.fault():
        raise ConfigError(f"no cache is possible with a {fault}", remedy=Remedy.NO_CACHE)
    return geometry


@dataclass(frozen=True)
class Identity:
    """Which export a cache file belongs to."""

    uri: str
    export: str

    @property
    def digest(self) -> bytes:
        """32 bytes that differ when the URI or the export's name does."""
        uri, export = self.uri.encode(), self.export.encode()
        return hashlib.sha256(struct.pack(">I", len(uri)) + uri + export).digest()


@dataclass(frozen=True)
class FileHeader:
    """What the first pages of a cache file say."""

    geometry: Geometry
    uri: str
    export: str
    digest: bytes
    sequence: int
    boot_id: bytes
    clean: bool
    """Shut down in order: data and index were synced before this mark, `index_crc` holds."""
    index_crc: int
    export_generation: int
    """The export's generation that the clean blocks belong to; 0: the server has none."""
    created_s: int
    frozen: bool = False
    """Its guest was stopped before everything was at the server, and may have gone on elsewhere:
    dirty data may be sent only once it is known that no other client wrote."""
    shared: bool = False
    """`frozen` in a session that others were in: its number does not tell whether they wrote."""
    export_identity: bytes = b""
    """16 bytes of the volume that the content belongs to; b"": the server gives none."""
    witness: int = 0
    """1 + the number of a clean block that the server has other content for: another client wrote
    while dirty data was here. 0: none was seen."""
    discarded: tuple[int, int] = (0, 0)
    """First block and end of a range: the server was asked to discard or zero within it, and that
    is not known to be durable. Killed before the answer, the cache still has what was there before;
    if the server loses power, what was read as zeroes since may be there again."""

    def next(self, **changes: object) -> FileHeader:
        """The header that follows this one."""
        return replace(self, sequence=self.sequence + 1, **changes)  # type: ignore[arg-type]

    def pack(self) -> bytes:
        """One header page of `HEADER_BYTES`; URI and export name are cut to 1,500 bytes each."""
        uri = self.uri.encode()[:_TEXT_BYTES]
        export = self.export.encode()[:_TEXT_BYTES]
        sizes = self.geometry
        fixed = _FIXED.pack(
            MAGIC,
            VERSION,
            HEADER_BYTES,
            sizes.block_bytes,
            sizes.granule_bytes,
            sizes.slots,
            self.clean | self.frozen << 1 | self.shared << 2,
            sizes.disk_bytes,
            self.sequence,
            self.export_generation,
            self.created_s,
            self.boot_id,
            self.index_crc,
            self.digest,
            len(uri),
            len(export),
        )
        page = (fixed + uri + export).ljust(HEADER_BYTES - _TAIL.size, b"\0")
        page += _TAIL.pack(self.witness, *self.discarded, self.export_identity, 0)
        page = page[: -_CRC.size]
        return page + _CRC.pack(zlib.crc32(page))


def printable(text: str) -> str:
    """`text` of a file's header for a terminal: control characters are escaped."""
    return "".join(each if each.isprintable() else repr(each)[1:-1] for each in text)


def new_header(
    geometry: Geometry, identity: Identity, boot_id: bytes, created_s: int
) -> FileHeader:
    """The first header of a file; `boot_id` has 16 bytes."""
    return FileHeader(
        geometry=geometry,
        uri=identity.uri,
        export=identity.export,
        digest=identity.digest,
        sequence=1,
        boot_id=boot_id,
        clean=False,
        index_crc=0,
        export_generation=0,
        created_s=created_s,
    )


def is_ours_untrusted(area: bytes) -> bool:
    """Is a file whose first bytes are `area` a cache file, damaged perhaps, or one in the making?

    The header is written last, over zeroes.
    """
    magics = (area[at : at + len(MAGIC)] for at in (0, HEADER_BYTES))
    return MAGIC in magics or not any(area[:HEADER_AREA_BYTES])


def parse_header_untrusted(area: bytes) -> FileHeader | None:
    """The header of a file whose first bytes are `area`; None if nothing was written yet.

    Raises ConfigError (without the file's name) when neither copy is whole, or for another
    version.
    """
    if len(area) < HEADER_AREA_BYTES:
        raise ConfigError(f"is cut short: {len(area)} bytes, no room for a header")
    if not any(area[:HEADER_AREA_BYTES]):
        return None
    pages = (area[:HEADER_BYTES], area[HEADER_BYTES:HEADER_AREA_BYTES])
    headers = [header for page in pages if (header := _parse_page(page)) is not None]
    if headers:
        return max(headers, key=lambda header: header.sequence)
    raise ConfigError(_blame(pages))


def _parse_page(page: bytes) -> FileHeader | None:
    if zlib.crc32(page[: -_CRC.size]) != _CRC.unpack(page[-_CRC.size :])[0]:
        return None
    fields = _FIXED.unpack_from(page)
    magic, version, header_bytes = fields[:3]
    if magic != MAGIC or version != VERSION or header_bytes != HEADER_BYTES:
        return None
    block, granule, slots, marks, disk, sequence, generation, created = fields[3:11]
    boot_id, index_crc, digest, uri_bytes, export_bytes = fields[11:]
    geometry = Geometry(disk, block, granule, slots)
    if geometry.fault() or uri_bytes > _TEXT_BYTES or export_bytes > _TEXT_BYTES:
        return None
    text = page[_FIXED.size :]
    witness, discarded_first, discarded_end, identity, _ = _TAIL.unpack(page[-_TAIL.size :])
    return FileHeader(
        geometry=geometry,
        uri=text[:uri_bytes].decode(errors="replace"),
        export=text[uri_bytes : uri_bytes + export_bytes].decode(errors="replace"),
        digest=digest,
        sequence=sequence,
        boot_id=boot_id,
        clean=bool(marks & 1),
        frozen=bool(marks & 2),
        shared=bool(marks & 4),
        index_crc=index_crc,
        export_generation=generation,
        created_s=created,
        export_identity=identity if any(identity) else b"",
        witness=witness,
        discarded=(discarded_first, discarded_end),
    )


def _blame(pages: tuple[bytes, bytes]) -> str:
    """Why neither page is a header of ours."""
    for page in pages:
        magic, version = struct.unpack_from("=8sI", page)
        whole = zlib.crc32(page[: -_CRC.size]) == _CRC.unpack(page[-_CRC.size :])[0]
        if whole and magic == MAGIC and version != VERSION:
            return f"has layout version {version}, this program reads version {VERSION}"
    if any(page[:8] == MAGIC for page in pages):
        return "has a damaged header (its checksum does not match)"
    return "is not a cache file"


def _page_up(count: int) -> int:
    return -(-count // _PAGE) * _PAGE
