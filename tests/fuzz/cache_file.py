"""A cache file that something has changed: bytes of it, its length, and then perhaps its checksums.

Whatever was done to it: it is shown, served from, flushed and dropped, or refused with an error for
the operator; showing changes nothing; what is served from answers every request and flushes; and a
file in which nothing was changed has lost nothing.
"""

from __future__ import annotations

import os
import struct
import tempfile
import zlib
from contextlib import suppress
from functools import cache as once
from pathlib import Path

from bridge.cache.file.cache_file import CacheFile
from bridge.cache.file.inspect import Summary, drop, open_to_flush, show
from bridge.cache.file.layout import (
    HEADER_AREA_BYTES,
    HEADER_BYTES,
    Geometry,
    Identity,
    state_word,
)
from bridge.cache.file.opening import open_or_create
from bridge.cli.cache_show import json_of, text_of
from bridge.cli.wording import explain
from bridge.datapath.request import FLUSH, READ
from bridge.errors import ConfigError
from tests.cache.fakes import FakeServer, Rig
from tests.fuzz.dice import BytesRandom
from tests.fuzz.target import check_line
from tests.turns import forget

BLOCK = 512
GRANULE = 16 * BLOCK
GRANULES = 8
SLOTS = 4
GEOMETRY = Geometry(GRANULES * GRANULE, BLOCK, GRANULE, SLOTS)
IDENTITY = Identity("nbd://server", "disk")
_INDEX_CRC_AT = struct.calcsize("=8sIIIIIIQQQQ16s")
_FIELDS_BYTES = 160
"""Of a header: the fields, and the beginning of the texts after them."""
_TAIL_BYTES = 48
"""The fields at its end."""
_DIRTY = b"dirty " * 100


@once
def _directory() -> Path:
    return Path(tempfile.mkdtemp(prefix="nbd-bridge-fuzz-"))


def _serve_from(file: CacheFile, server: FakeServer) -> Rig:
    return Rig(image=file, server=server)


@once
def templates() -> tuple[bytes, ...]:
    """Cache files of a process that was killed, and of one that was not, with a clean block and
    some that are dirty; and what is no cache file."""
    found = []
    for clean in (False, True):
        path = _directory() / "template"
        path.unlink(missing_ok=True)
        file = open_or_create(str(path), geometry=GEOMETRY, identity=IDENTITY)
        rig = _serve_from(file, FakeServer(GEOMETRY.disk_bytes))
        rig.read(2 * GRANULE, BLOCK)
        rig.write(5 * GRANULE, _DIRTY[:BLOCK])
        rig.write(7 * GRANULE + BLOCK, _DIRTY[:BLOCK])
        file.close(clean=clean)
        found.append(path.read_bytes())
    return (*found, b"", bytes(HEADER_AREA_BYTES), b"#!/bin/sh\n" * 1000)


def run(data: bytes) -> str:
    """One file. Returns what became of it when it was to be served from."""
    random = BytesRandom(data)
    original = templates()[random.choice((0, 0, 0, 1, 1, 1, 2, 3, 4))]
    content = bytearray(original)
    _spoil(random, content)
    path = _directory() / "disk.cache"
    try:
        shown = _show(_fresh(path, content))
        outcome = _serve(_fresh(path, content), shown, intact=bytes(content) == original)
        _flush(_fresh(path, content), skip_damaged=bool(random.getrandbits(1)))
        _drop(_fresh(path, content), content, discard=bool(random.getrandbits(1)))
    finally:
        path.unlink(missing_ok=True)
    return outcome


def _spoil(random: BytesRandom, content: bytearray) -> None:
    """Change some places; then make some of the checksums right again."""
    places = (
        *((at, at + _FIELDS_BYTES) for at in (0, HEADER_BYTES)),
        *((at - _TAIL_BYTES, at - 4) for at in (HEADER_BYTES, HEADER_AREA_BYTES)),
        (HEADER_AREA_BYTES, HEADER_AREA_BYTES + 4 * (SLOTS + 1)),
        (GEOMETRY.states_offset, GEOMETRY.states_offset + 8 * (SLOTS + 1)),
        (0, GEOMETRY.file_bytes),
    )
    for _ in range(random.randrange(8)):
        start, end = random.choice(places)
        at = start + random.randrange(end - start)
        put = random.choice((b"\0", b"\xff", bytes([random.getrandbits(8)]), random.randbytes(4)))
        if at + len(put) <= len(content):
            content[at : at + len(put)] = put
    cut = random.randrange(8)
    if cut == 1:
        del content[random.randrange(GEOMETRY.file_bytes) :]
    elif cut == 2:
        content += bytes(random.randrange(5000))
    fixes = random.getrandbits(3)
    if len(content) >= GEOMETRY.file_bytes:
        _fix(content, slots=fixes & 1, index=fixes & 2, headers=fixes & 4)


def _fix(content: bytearray, *, slots: int, index: int, headers: int) -> None:
    """Make the checks of slots, the checksum of the index, and those of the headers right."""
    if slots:
        for slot in range(1, SLOTS + 1):
            (granule,) = struct.unpack_from("=I", content, HEADER_AREA_BYTES + 4 * slot)
            at = GEOMETRY.states_offset + 8 * slot
            low = struct.unpack_from("=I", content, at)[0]
            if low:
                struct.pack_into("=Q", content, at, state_word(granule, low & 0xFFFF, low >> 16))
    crc = zlib.crc32(content[HEADER_AREA_BYTES : GEOMETRY.data_offset])
    for at in (0, HEADER_BYTES):
        if index:
            struct.pack_into("=I", content, at + _INDEX_CRC_AT, crc)
        if headers and any(content[at : at + HEADER_BYTES]):
            end = at + HEADER_BYTES - 4
            struct.pack_into("=I", content, end, zlib.crc32(content[at:end]))


def _fresh(path: Path, content: bytearray) -> str:
    path.unlink(missing_ok=True)
    path.write_bytes(content)
    path.chmod(0o600)
    return str(path)


def _refused(error: ConfigError) -> str:
    check_line(explain(error))
    return "refused"


def _show(path: str) -> Summary | None:
    try:
        found = show(path)
        assert show(path) == found
    except ConfigError as error:
        _refused(error)
        return None
    text_of(found)
    json_of(found)
    assert 0 <= found.dirty_bytes <= found.valid_bytes <= found.cache_bytes
    return found


def _serve(path: str, shown: Summary | None, *, intact: bool) -> str:
    """Open it as `serve` does, read all of the disk and flush."""
    try:
        file = open_or_create(path, geometry=GEOMETRY, identity=IDENTITY)
    except ConfigError as error:
        return _refused(error)
    try:
        outcome = _used(file, shown, intact=intact)
    except ConfigError as error:
        return _refused(error)
    finally:
        file.close(clean=True)
        forget()
    again = show(path)
    assert again.usable
    assert not again.dirty_bytes
    return outcome


def _used(file: CacheFile, shown: Summary | None, *, intact: bool) -> str:
    size = file.geometry.disk_bytes
    server = FakeServer(min(size, 1 << 20))
    rig = _serve_from(file, server)
    if shown is not None and shown.usable and not file.notes:
        assert rig.cache.index.dirty_blocks * file.geometry.block_bytes == shown.dirty_bytes
    content = _answered(rig, READ, min(size, 1 << 20))
    assert _answered(rig, FLUSH, 0) == b""
    assert not rig.cache.index.dirty_slots
    if intact and shown is not None and shown.dirty_bytes:
        assert content[5 * GRANULE :][:BLOCK] == _DIRTY[:BLOCK]
        assert bytes(server.image[7 * GRANULE + BLOCK :][:BLOCK]) == _DIRTY[:BLOCK]
    return "made anew" if file.notes else "served"


def _answered(rig: Rig, op: int, length: int) -> bytes:
    result = rig.start(op, 0, length)
    rig.serve()
    assert result.value == 0, result.value
    return b"".join(map(bytes, result.request.buffers))


def _flush(path: str, *, skip_damaged: bool) -> None:
    try:
        file = open_to_flush(path, export_bytes=GEOMETRY.disk_bytes, skip_damaged=skip_damaged)
    except ConfigError as error:
        _refused(error)
        return
    file.close(clean=True)


def _drop(path: str, content: bytearray, *, discard: bool) -> None:
    try:
        drop(path, discard_dirty=discard)
    except ConfigError as error:
        _refused(error)
        assert os.path.exists(path)
    else:
        assert not os.path.exists(path)
        assert b"#!/bin/sh" not in content, "another program's file"


def clear() -> None:
    """Remove what the target keeps between inputs."""
    with suppress(OSError):
        for each in _directory().iterdir():
            each.unlink()
        _directory().rmdir()
    _directory.cache_clear()
    templates.cache_clear()
