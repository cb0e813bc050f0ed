"""The usual case of a turn: what nearly every request of a guest goes through, in batches.

    take_hits       pop, check, copy from or into the cache, status, used element
    take_commands   pop, check, note in a row, encode the NBD command
    answers         parse replies, copy, status, used element
    publish         one store of the used index; is the driver to be called?

**This is the one place that exists for speed**, to be replaced by compiled code as it stands: it
works on flat state only (`cells`), logs nothing, raises nothing, makes no object that outlives a
request's turn but the bytes to be sent, and never blocks. It does what is usual, and leaves
everything else where it is, untouched, to the general path (`virtio.blk`, `server.transmission`),
which is the specification: whatever is done here, that would have done as well.

Usual is: a split ring, with an in-flight region or without; a chain of header, data and status,
direct or in an indirect table whose descriptors stand in their order, with data in up to
MAX_SEGMENTS segments, each in one region; IN or OUT inside the disk; a hit in the cache, or one
command on a connection; a reply without an error, all of it received, a READ's in one chunk. Of
what one look finds in a ring, small requests each of which begins where the one before ends are
sent as one command (see `cells.ROW`); nothing waits for more of them. Without a cache, and on the
only connection, also a FLUSH, a chain of header and status, while there is no other and nothing is
known that could make it fail (`Flushes.may_be_row`). What cannot be true is not found out here: a
guest or a server that breaks a rule is unusual.

Everything of the guest's is read once, into a local name, before it is looked at: the guest may
change it meanwhile. Numbers are compared so that they would not wrap in 64 bits either. A chain is
noted in the in-flight region before anything is done for it, in the order of `virtio.inflight`.
"""

from __future__ import annotations

from struct import Struct
from typing import TYPE_CHECKING, Final

from bridge.datapath.cells import (
    ALIGN_MASK,
    ALONE,
    ARMED,
    BATCH_PIECES,
    BLOCK_MASK,
    CAN_FLUSH,
    CAPACITY_BYTES,
    COUNTER,
    COVERED,
    EVENT_IDX,
    FLUSH_ARMED,
    FLUSH_COVERS,
    FLUSH_ROW,
    FLUSH_SEEN,
    FLUSHED,
    FLUSHES,
    HEAD_BITS,
    IN_FLIGHT,
    INDIRECT,
    LAST_HEAD,
    LONG_BYTES,
    MAX_HEADS,
    MAX_READ_BYTES,
    MAX_SEGMENTS,
    MAX_WRITE_BYTES,
    MAY_FLUSH,
    MAY_WRITE,
    MERGED,
    MERGED_BYTES,
    NAME,
    NAME_BITS,
    NEXT_AVAIL,
    NEXT_USED,
    NOT_ROWS,
    PUBLISHED,
    PUSHED,
    READ_BYTES,
    ROW,
    ROW_BYTES,
    ROW_COOKIE,
    ROW_SEGMENTS,
    ROWS,
    SEEN,
    SEGMENT,
    SEGMENT_BYTES,
    SEGMENTS,
    SEGMENTS_BYTES,
    SEQUENCE,
    SIGNAL_ANYWAY,
    SIZE,
    SIZE_BYTES,
    STOP_FLUSH,
    STOP_FORM,
    STOP_MISS,
    STOP_RANGE,
    STOP_RING,
    STOP_ROOM,
    STOP_WRITE,
    STOPPED,
    TOUCHED,
    UNFLUSHED,
    WHOLE_READ_BYTES,
    WHOLE_WRITE_BYTES,
    WRITTEN_BYTES,
    Cells,
    Channel,
    Queue,
    Resident,
    Route,
)
from bridge.datapath.fence import WEAK_ORDER, fence
from bridge.datapath.lanes import TURN_BYTES, WHOLE_BYTES
from bridge.datapath.request import FLUSH
from bridge.datapath.spans import forget_span, note_span, stop_of_span
from bridge.spec.nbd import CMD_FLUSH
from bridge.spec.virtio_blk import T_FLUSH
from bridge.spec.virtqueue import (
    AVAIL_NO_INTERRUPT,
    DESC_INDIRECT,
    DESC_NEXT,
    DESC_WRITE,
    DESCRIPTOR,
    DESCRIPTOR_BYTES,
)

if TYPE_CHECKING:
    import mmap

    from bridge.datapath.rows import Rows

_unpack_descriptor = DESCRIPTOR.unpack_from
_unpack_three = Struct("=QIHHQIHHQIHH").unpack_from
_unpack_header = Struct("<I4xQ").unpack_from
_pack_row = ROW.pack_into
_unpack_row = ROW.unpack_from
_pack_following = Struct("=H").pack_into
_pack_length = Struct("=I").pack_into
_pack_segment = SEGMENT.pack_into
_unpack_segment = SEGMENT.unpack_from
_pack_command = Struct(">IHHQQI").pack
_unpack_reply = Struct(">IIQ").unpack_from
_unpack_chunk = Struct(">IQ").unpack_from

_COMMAND_BYTES_AT: Final = 40
_FOLLOWING_AT: Final = 44
"""In a row: see `cells.ROW`."""
_HEADER_BYTES: Final = 16
_SECTOR_SHIFT: Final = 9
_IN: Final = 0
_OUT: Final = 1
_NAME_MASK: Final = (1 << NAME_BITS) - 1
_HEAD_MASK: Final = MAX_HEADS - 1

_MAX_LINKS: Final = MAX_SEGMENTS + 2
_MAX_PLACES: Final = 64
"""Granules that a hit may be in."""

Segment = tuple[int, int, int]
"""A piece of the data: its region, where in it, its length in bytes."""

UsualChain = tuple[int, int, int, int, int, int, int, list[Segment]]
"""Type, sector, region of the data, where in it, bytes of data, region of the status, where in it,
segments of the data: empty if it is in one piece, and otherwise where the data is says nothing.
"""

_Link = tuple[int, int, int, int]
"""A descriptor, copied: address, length, flags, next."""


def available(queue: Queue, first: int, used: int) -> int:
    """How many chains the driver has made available; 0, and STOPPED, if that breaks the ring.

    What the driver cannot know to be used is in flight, too (see `split_queue.SplitQueue.pop`).
    """
    state = queue.cells
    count = queue.avail[1] - first & 0xFFFF
    if count + state[IN_FLIGHT] + (used - state[PUBLISHED] & 0xFFFF) > state[SIZE]:
        state[STOPPED] = STOP_RING
        return 0
    if WEAK_ORDER:
        fence()  # the ring's entries are read after its index
    return count


def usual_chain(queue: Queue, head: int, mask: int, base: int, size: int) -> UsualChain | None:
    """The chain at `head`, if it is a usual one: header of 16 bytes, data, status of one byte, in
    descriptors of the table or of an indirect one; None: it is something else.

    `mask`: of heads. `base` and `size` are of region 0, the largest, which has most of them. (What
    is here is data in one piece, twice as fast as `_chain_of`, which comes to the same result.)
    """
    first = _unpack_descriptor(queue.descriptors, head << 4)
    address, length, flags, following = first
    if flags == DESC_INDIRECT:
        if length != 48:
            return _indirect_chain(queue, address, length)
        if not queue.cells[INDIRECT]:
            return None
        region, at = 0, address - base
        if not 0 <= at <= size - 48:
            region, at = region_of(queue, address, 48)
            if region < 0:
                return None
        address, length, flags, following, data, data_bytes, way, last, end, room, tail, _ = (
            _unpack_three(queue.views[region], at)
        )
        if following != 1 or last != 2:
            return None
    else:
        if flags != DESC_NEXT or following > mask:
            return None
        second = _unpack_descriptor(queue.descriptors, following << 4)
        data, data_bytes, way, last = second
        if not way & DESC_NEXT:
            return _flush_chain(queue, first, second)
        if last > mask:
            return None
        third = _unpack_descriptor(queue.descriptors, last << 4)
        end, room, tail, _ = third
        if tail & DESC_NEXT:
            return _direct_chain(queue, mask, [first, second, third])
    if (
        flags != DESC_NEXT
        or length != _HEADER_BYTES
        or tail != DESC_WRITE
        or room != 1
        or not data_bytes
    ):
        return None
    region, at = 0, address - base
    data_region, data_at = 0, data - base
    status_region, status_at = 0, end - base
    if not 0 <= at <= size - _HEADER_BYTES:
        region, at = region_of(queue, address, _HEADER_BYTES)
    if not 0 <= data_at <= size - data_bytes:
        data_region, data_at = region_of(queue, data, data_bytes)
    if not 0 <= status_at < size:
        status_region, status_at = region_of(queue, end, 1)
    if region < 0 or data_region < 0 or status_region < 0:
        return None
    type_, sector = _unpack_header(queue.views[region], at)
    if (type_ == _IN and way == DESC_NEXT | DESC_WRITE) or (type_ == _OUT and way == DESC_NEXT):
        return type_, sector, data_region, data_at, data_bytes, status_region, status_at, _ONE
    return None


_ONE: Final[list[Segment]] = []


def _direct_chain(queue: Queue, mask: int, links: list[_Link]) -> UsualChain | None:
    """See `usual_chain`: one that goes on after the first `links`. One without an end is longer
    than it may be."""
    while links[-1][2] & DESC_NEXT:
        following = links[-1][3]
        if following > mask or len(links) == _MAX_LINKS:
            return None
        links.append(_unpack_descriptor(queue.descriptors, following << 4))
    return _chain_of(queue, links)


def _indirect_chain(queue: Queue, address: int, length: int) -> UsualChain | None:
    """See `usual_chain`: one whose descriptors are those of an indirect table, in their order."""
    count = length // DESCRIPTOR_BYTES
    if length % DESCRIPTOR_BYTES or not 2 <= count <= _MAX_LINKS or not queue.cells[INDIRECT]:
        return None
    region, at = region_of(queue, address, length)
    if region < 0:
        return None
    links = list(DESCRIPTOR.iter_unpack(bytes(queue.views[region][at : at + length])))
    if any(links[index][3] != index + 1 for index in range(count - 1)):
        return None
    return _chain_of(queue, links) if count > 2 else _flush_chain(queue, *links)


def _chain_of(queue: Queue, links: list[_Link]) -> UsualChain | None:
    """See `usual_chain`: of at least three descriptors."""
    address, length, flags, _ = links[0]
    end, room, tail, _ = links[-1]
    if flags != DESC_NEXT or length != _HEADER_BYTES or tail != DESC_WRITE or room != 1:
        return None
    region, at = region_of(queue, address, _HEADER_BYTES)
    status_region, status_at = region_of(queue, end, 1)
    if region < 0 or status_region < 0:
        return None
    type_, sector = _unpack_header(queue.views[region], at)
    if type_ != _IN and type_ != _OUT:
        return None
    way = DESC_NEXT if type_ else DESC_NEXT | DESC_WRITE
    segments: list[Segment] = []
    total_bytes = 0
    for data, data_bytes, flags, _ in links[1:-1]:
        region, at = region_of(queue, data, data_bytes)
        if flags != way or not data_bytes or region < 0:
            return None
        segments.append((region, at, data_bytes))
        total_bytes += data_bytes
    return type_, sector, 0, 0, total_bytes, status_region, status_at, segments


def _flush_chain(queue: Queue, first: _Link, last: _Link) -> UsualChain | None:
    """See `usual_chain`: a FLUSH of two descriptors. The sector in its header means nothing."""
    address, length, flags, _ = first
    end, room, tail, _ = last
    if flags != DESC_NEXT or length != _HEADER_BYTES or tail != DESC_WRITE or room != 1:
        return None
    region, at = region_of(queue, address, _HEADER_BYTES)
    status_region, status_at = region_of(queue, end, 1)
    if region < 0 or status_region < 0 or _unpack_header(queue.views[region], at)[0] != T_FLUSH:
        return None
    return T_FLUSH, 0, 0, 0, 0, status_region, status_at, _ONE


def region_of(queue: Queue, address: int, length: int) -> tuple[int, int]:
    """The region that has all of a guest range, and where in it that is; -1: none has."""
    regions = queue.regions
    for number in range(len(regions) // 2):
        base, size = regions[2 * number], regions[2 * number + 1]
        if address >= base and length <= size and address - base <= size - length:
            return number, address - base
    return -1, 0


def take_hits(queue: Queue, disk: Cells[int], cache: Resident) -> tuple[int, int]:
    """Serve chains from the cache up to the first one that is unusual, or a read that is no hit, or
    a write that has to wait; how many reads and how many writes that were. After TURN_BYTES it
    ends, too, and the rest is left for later."""
    state = queue.cells
    mask = state[SIZE] - 1
    first, used = state[NEXT_AVAIL], state[NEXT_USED]
    count = available(queue, first, used)
    base, size = queue.regions[0], queue.regions[1]
    avail, elements, views = queue.avail, queue.elements, queue.views
    tracked = queue.tracked
    if tracked:
        words, halves, pushed = queue.tracked_words, queue.tracked_halves, queue.pushed
        counter, last_head, n_pushed = state[COUNTER], state[LAST_HEAD], state[PUSHED]
    capacity_bytes, block_mask, may_write = (
        disk[CAPACITY_BYTES],
        disk[BLOCK_MASK],
        disk[MAY_WRITE],
    )
    granule_shift, block_shift, bucket_mask = (
        cache.granule_shift,
        cache.block_shift,
        cache.bucket_mask,
    )
    granule_bytes, block_up = 1 << granule_shift, (1 << block_shift) - 1
    slots, granule_of = cache.head, cache.granule_of
    ready, opened, data = cache.ready, cache.open, cache.data
    touched, up = cache.touched, cache.up
    served = writes = written_bytes = 0
    left_bytes = TURN_BYTES
    while served < count and left_bytes > 0:
        head = avail[2 + (first + served & mask)]
        if head > mask:
            state[STOPPED] = STOP_RING
            break
        chain = usual_chain(queue, head, mask, base, size)
        if chain is None or chain[0] == T_FLUSH:
            state[STOPPED] = STOP_FORM
            break
        type_, sector, data_region, data_at, length, status_region, status_at, segments = chain
        offset = sector << _SECTOR_SHIFT
        if (
            length > WHOLE_BYTES
            or sector > capacity_bytes >> _SECTOR_SHIFT
            or length > capacity_bytes - offset
            or (offset | length) & block_mask
        ):
            state[STOPPED] = STOP_RANGE
            break
        if type_ == _OUT and not may_write:
            state[STOPPED] = STOP_WRITE
            break
        within = offset & granule_bytes - 1
        if segments or within + length > granule_bytes:
            places = places_of(cache, type_, offset, length)
            stored = not places
            if stored and not (type_ and cache.store(offset, length, _data(queue, chain))):
                state[STOPPED] = STOP_MISS
                break
        else:
            granule = offset >> granule_shift
            slot = slots[granule & bucket_mask]
            bits = (1 << (within + length + block_up >> block_shift)) - (
                1 << (within >> block_shift)
            )
            places = _NO_PLACES
            stored = granule_of[slot] != granule or (
                bits & ~ready[slot] != 0
                if type_ == _IN
                else bits & ~opened[slot] != 0
                and (bits & ~ready[slot] != 0 or not cache.open_blocks(slot, bits))
            )
            if not stored:
                at = (slot << granule_shift) + within
                touched[slot] = up[touched[slot]]
            elif not (type_ and cache.store(offset, length, _data(queue, chain))):
                state[STOPPED] = STOP_MISS
                break
        if tracked:
            words[3 + 2 * head] = counter
            counter += 1
            tracked[16 + 16 * head] = 1
        if stored:
            pass
        elif places:
            _copy(queue, cache, chain, places)
        elif type_ == _IN:
            views[data_region][data_at : data_at + length] = data[at : at + length]
        else:
            data[at : at + length] = views[data_region][data_at : data_at + length]
        elements[((used & mask) << 1) + 1] = 1 if type_ else length + 1
        if type_:
            writes += 1
            written_bytes += length
        left_bytes -= length
        views[status_region][status_at] = 0
        if tracked:
            halves[11 + 8 * head] = last_head
            halves[6] = last_head = head
            pushed[n_pushed] = head
            n_pushed += 1
        elements[(used & mask) << 1] = head
        used += 1
        served += 1
    state[NEXT_AVAIL] = first + served & 0xFFFF
    state[NEXT_USED] = used & 0xFFFF
    if tracked:
        state[PUSHED], state[COUNTER], state[LAST_HEAD] = n_pushed, counter, last_head
    disk[WRITTEN_BYTES] += written_bytes
    disk[READ_BYTES] += TURN_BYTES - left_bytes - written_bytes
    return served - writes, writes


Place = tuple[int, int]
"""Of a hit in the data of the cache: where it is, and its length in bytes."""
_NO_PLACES: Final[list[Place]] = []


def places_of(cache: Resident, type_: int, offset: int, length: int) -> list[Place]:
    """Where a request's bytes are in the cache, granule by granule; none: it is no hit.

    A write's blocks are open then. (Those before one that cannot be are so, too: the write that
    waits for that one is to them as well.)
    """
    shift = cache.block_shift
    granule_bytes, block_up = 1 << cache.granule_shift, (1 << shift) - 1
    places: list[Place] = []
    slots: list[int] = []
    while length:
        granule, within = offset >> cache.granule_shift, offset & granule_bytes - 1
        slot = cache.head[granule & cache.bucket_mask]
        if cache.granule_of[slot] != granule or len(places) == _MAX_PLACES:
            return _NO_PLACES
        here = min(length, granule_bytes - within)
        bits = (1 << (within + here + block_up >> shift)) - (1 << (within >> shift))
        if type_ == _IN:
            if bits & ~cache.ready[slot]:
                return _NO_PLACES
        elif bits & ~cache.open[slot] and (
            bits & ~cache.ready[slot] or not cache.open_blocks(slot, bits)
        ):
            return _NO_PLACES
        places.append(((slot << cache.granule_shift) + within, here))
        slots.append(slot)
        offset += here
        length -= here
    for slot in slots:
        cache.touched[slot] = cache.up[cache.touched[slot]]
    return places


def _data(queue: Queue, chain: UsualChain) -> list[memoryview]:
    """Views of the data of a chain."""
    _, _, data_region, data_at, length, _, _, segments = chain
    views = queue.views
    if not segments:
        return [views[data_region][data_at : data_at + length]]
    return [views[region][at : at + n_bytes] for region, at, n_bytes in segments]


def _copy(queue: Queue, cache: Resident, chain: UsualChain, places: list[Place]) -> None:
    """Copy the data of a chain from or to these places."""
    type_, _, data_region, data_at, length, _, _, segments = chain
    inside = iter(places)
    at, here = next(inside)
    for region, start, n_bytes in segments or [(data_region, data_at, length)]:
        view = queue.views[region]
        end = start + n_bytes
        while start < end:
            if not here:
                at, here = next(inside)
            part = min(end - start, here)
            if type_:
                cache.data[at : at + part] = view[start : start + part]
            else:
                view[start : start + part] = cache.data[at : at + part]
            start += part
            at += part
            here -= part


def take_commands(
    queue: Queue, disk: Cells[int], route: Route, channel: Channel, rows: Rows
) -> tuple[int, int]:
    """Make commands of chains up to the first one that is unusual; how many reads and how many
    writes that were. (Flushes are in the channel's cell FLUSHES.)"""
    state, limits = queue.cells, route.cells
    mask = state[SIZE] - 1
    first = state[NEXT_AVAIL]
    count = available(queue, first, state[NEXT_USED])
    base, size = queue.regions[0], queue.regions[1]
    avail, views, table, cookies = queue.avail, queue.views, queue.rows, queue.cookies
    tracked = queue.tracked
    if tracked:
        words, counter = queue.tracked_words, state[COUNTER]
    output, number = channel.output, channel.number
    capacity_bytes, size_bytes = disk[CAPACITY_BYTES], limits[SIZE_BYTES]
    block_mask = disk[BLOCK_MASK] | limits[ALIGN_MASK]
    max_read_bytes = limits[MAX_READ_BYTES]
    max_write_bytes = limits[MAX_WRITE_BYTES] if disk[MAY_WRITE] else 0
    name, most_segments = state[NAME], limits[ROW_SEGMENTS]
    sequence, merged, alone = rows.cells[SEQUENCE], rows.cells[MERGED], rows.cells[ALONE]
    most_bytes = (
        min(limits[WHOLE_READ_BYTES], MERGED_BYTES),
        min(limits[WHOLE_WRITE_BYTES], MERGED_BYTES),
    )
    # The command that may be merged with what comes next: its type (-1: there is none), where it
    # ends, its length, and its last head.
    open_type, until, command_bytes, last = -1, 0, 0, 0
    # Its first head, its cookie, and where in the output its header is.
    leader, leading, place = 0, 0, 0
    many = queue.segments
    taken = writes = pieces = read_bytes = written_bytes = 0
    flat = channel.cells
    in_flight, armed, flushes = flat[SEGMENTS], flat[ARMED], flat[FLUSHES]
    spans = channel.spans
    while taken < count:
        head = avail[2 + (first + taken & mask)]
        if head > mask or cookies[head]:
            state[STOPPED] = STOP_RING  # No such head, or it is in flight already.
            break
        chain = usual_chain(queue, head, mask, base, size)
        if chain is None:
            state[STOPPED] = STOP_FORM
            break
        type_, sector, data_region, data_at, length, status_region, status_at, segments = chain
        if type_ == T_FLUSH:
            pieces += 1
            if stop := _stop_of_flush(disk, flat, pieces):
                state[STOPPED] = stop
                break
        else:
            if type_ == _OUT and not max_write_bytes:
                state[STOPPED] = STOP_WRITE
                break
            offset = sector << _SECTOR_SHIFT
            if (
                length > (max_write_bytes if type_ else max_read_bytes)
                or sector > capacity_bytes >> _SECTOR_SHIFT
                or length > capacity_bytes - offset
                or offset > size_bytes
                or length > size_bytes - offset
                or (offset | length) & block_mask
            ):
                state[STOPPED] = STOP_RANGE
                break
            n_segments = len(segments) or 1
            pieces += 1 + n_segments * type_
            if pieces > BATCH_PIECES or in_flight + len(segments) > most_segments:
                state[STOPPED] = STOP_ROOM
                break
            if spans is not None and type_ and (stop := stop_of_span(spans, offset, length)):
                state[STOPPED] = stop
                break
            in_flight += len(segments)
        cookie = name | sequence << NAME_BITS | head
        sequence += 1
        if tracked:
            words[3 + 2 * head] = counter
            counter += 1
            tracked[16 + 16 * head] = 1
        cookies[head] = cookie
        if type_ == T_FLUSH:
            open_type = -1
            where = 0, 0, status_at, 0, number, 0, status_region, 0, FLUSH, 0, 0
            _pack_row(table, ROW_BYTES * head, *where)
            channel.held.append(_pack_command(0x25609513, 0, CMD_FLUSH, cookie, 0, 0))
            _note_flush(flat, cookie, armed)
            # As `Disk.submit` decides it.
            armed = 1 if armed and (flat[NOT_ROWS] or flat[ROWS] + taken) else 0
            taken += 1
            continue
        joins = (
            offset == until
            and type_ == open_type
            and length < LONG_BYTES
            and command_bytes + length <= most_bytes[type_]
        )
        _pack_row(
            *(table, ROW_BYTES * head, offset, data_at, status_at, length, number),
            *(data_region, status_region, n_segments, type_, 0 if joins else length, 0),
        )
        if joins:
            merged += 1
            command_bytes += length
            _pack_following(table, ROW_BYTES * last + _FOLLOWING_AT, head + 1)
            _pack_length(table, ROW_BYTES * leader + _COMMAND_BYTES_AT, command_bytes)
            began = offset + length - command_bytes
            output[place] = _pack_command(0x25609513, 0, type_, leading, began, command_bytes)
        else:
            open_type, command_bytes = type_, length
            leader, leading, place = head, cookie, len(output)
            output.append(_pack_command(0x25609513, 0, type_, cookie, offset, length))
            if alone or length >= LONG_BYTES:
                open_type = -1
                alone -= alone > 0
        last, until = head, offset + length
        if spans is not None and type_:
            note_span(spans, cookie, offset, offset + length)
        at = SEGMENTS_BYTES * head
        for region, start, n_bytes in segments:
            _pack_segment(many, at, start, n_bytes, region)
            at += SEGMENT_BYTES
        if type_ == _OUT:
            if segments:
                output += [views[region][start : start + n] for region, start, n in segments]
            else:
                output.append(views[data_region][data_at : data_at + length])
            writes += 1
            armed = 1
            written_bytes += length
        else:
            read_bytes += length
        taken += 1
    state[NEXT_AVAIL] = first + taken & 0xFFFF
    state[IN_FLIGHT] += taken
    if tracked:
        state[COUNTER] = counter
    rows.cells[SEQUENCE], rows.cells[MERGED], rows.cells[ALONE] = sequence, merged, alone
    flat[ROWS] += taken
    flat[SEGMENTS] = in_flight
    flat[ARMED] = armed
    disk[READ_BYTES] += read_bytes
    disk[WRITTEN_BYTES] += written_bytes
    if writes:
        channel.has_payload = True
    return taken - writes - (flat[FLUSHES] - flushes), writes


def _stop_of_flush(disk: Cells[int], flat: Cells[int], pieces: int) -> int:
    """Why a flush cannot be a row; 0: it can."""
    if not disk[CAN_FLUSH]:
        return STOP_FORM
    if not flat[MAY_FLUSH] or flat[FLUSH_ROW]:
        return STOP_FLUSH
    return STOP_ROOM if pieces > BATCH_PIECES else 0


def _note_flush(flat: Cells[int], cookie: int, armed: int) -> None:
    """A flush is a row from here on."""
    flat[FLUSH_ROW], flat[FLUSH_ARMED] = cookie, armed
    flat[FLUSH_COVERS], flat[FLUSH_SEEN] = flat[UNFLUSHED], flat[SEEN]
    flat[FLUSHES] += 1


def answers(channel: Channel, rows: Rows, start: int, end: int) -> tuple[int, bool]:
    """Take the replies to rows that stand in the staging buffer between `start` and `end`, up to
    the first one that is unusual: where that is, and whether it is only not all there yet.

    Queues of which something was pushed are added to `rows.touched`.
    """
    staging, structured, number = channel.staging, channel.structured, channel.number
    queue: Queue | None = None
    current = -1
    used = last_head = n_pushed = 0
    answered = total = writes = of_several = 0
    waits = False
    while end - start >= 16:
        magic, error, cookie = _unpack_reply(staging, start)
        if cookie < ROW_COOKIE:
            break
        name = cookie & _NAME_MASK
        if name >> HEAD_BITS != current:
            if queue is not None and answered:
                _pushed(queue, rows, used, answered, last_head, n_pushed)
                total += answered
                answered = 0
            current = name >> HEAD_BITS
            queue = rows.queues[current]
            if queue is None:
                break
            state, table, cookies, views = queue.cells, queue.rows, queue.cookies, queue.views
            elements, mask, used = queue.elements, state[SIZE] - 1, state[NEXT_USED]
            many = queue.segments
            tracked = queue.tracked
            if tracked:
                halves, pushed = queue.tracked_halves, queue.pushed
                last_head, n_pushed = state[LAST_HEAD], state[PUSHED]
        head = name & _HEAD_MASK
        if head > mask or cookies[head] != cookie:
            break
        offset, data_at, status_at, length, sent_on, data_in, status_in, pieces, op, whole, more = (
            _unpack_row(table, ROW_BYTES * head)
        )
        if sent_on != number or (op != FLUSH and not whole):
            break
        if op == _OUT:
            if magic != 0x67446698 or error:
                break
            payload = start = start + 16
        elif op == FLUSH:
            flat = channel.cells
            if magic != 0x67446698 or error or flat[FLUSH_ROW] != cookie:
                break
            payload = start = start + 16
            flat[FLUSH_ROW] = 0
            flat[FLUSHED] += 1
            flat[COVERED] = flat[FLUSH_COVERS]
        else:
            payload = start + 16
            if structured:
                if magic != 0x668E33EF or error != 0x10001:
                    break  # No chunk of type OFFSET_DATA with the flag DONE.
                payload = start + 28
                if payload <= end:
                    chunk_bytes, at = _unpack_chunk(staging, start + 16)
                    if chunk_bytes != whole + 8 or at != offset:
                        break
            elif magic != 0x67446698 or error:
                break
            stop = payload + whole
            if stop > end:
                waits = True
                break
            start = stop
        while True:  # for each request of the command
            used_bytes = 1
            if op == _OUT:
                writes += 1
                if channel.spans is not None:
                    forget_span(channel.spans, cookies[head])
            elif op == _IN:
                used_bytes = length + 1
                if pieces == 1:
                    stop = payload + length
                    views[data_in][data_at : data_at + length] = staging[payload:stop]
                    payload = stop
                else:
                    for region, at, n_bytes in segments_of(many, head, pieces):
                        views[region][at : at + n_bytes] = staging[payload : payload + n_bytes]
                        payload += n_bytes
            if pieces > 1:
                of_several += pieces
            cookies[head] = 0
            views[status_in][status_at] = 0
            if tracked:
                halves[11 + 8 * head] = last_head
                halves[6] = last_head = head
                pushed[n_pushed] = head
                n_pushed += 1
            slot = (used & mask) << 1
            elements[slot] = head
            elements[slot + 1] = used_bytes
            used += 1
            answered += 1
            if not more:
                break
            head = more - 1
            _, data_at, status_at, length, _, data_in, status_in, pieces, _, _, more = _unpack_row(
                table, ROW_BYTES * head
            )
    if queue is not None and answered:
        _pushed(queue, rows, used, answered, last_head, n_pushed)
        total += answered
    state = channel.cells
    state[ROWS] -= total
    state[SEGMENTS] -= of_several
    if writes:
        state[UNFLUSHED] += writes
    return start, waits


def segments_of(table: mmap.mmap, head: int, count: int) -> list[Segment]:
    """Of the row of `head`, which has several, in `Queue.segments`."""
    first = SEGMENTS_BYTES * head
    found: list[Segment] = []
    for place in range(first, first + SEGMENT_BYTES * count, SEGMENT_BYTES):
        at, n_bytes, region = _unpack_segment(table, place)
        found.append((region, at, n_bytes))
    return found


def _pushed(queue: Queue, rows: Rows, used: int, count: int, last_head: int, n_pushed: int) -> None:
    """`count` chains of `queue` were pushed, up to the index `used`."""
    state = queue.cells
    state[NEXT_USED] = used & 0xFFFF
    state[IN_FLIGHT] -= count
    if queue.tracked:
        state[LAST_HEAD], state[PUSHED] = last_head, n_pushed
    if not state[TOUCHED]:
        state[TOUCHED] = 1
        rows.touched.append(queue)


def publish(queue: Queue) -> bool:
    """Show the driver all that was pushed; True if it wants to be called."""
    state = queue.cells
    old, new = state[PUBLISHED], state[NEXT_USED]
    if old == new:
        return False
    state[PUBLISHED] = new
    if WEAK_ORDER:
        fence()  # the elements are in place before the index
    queue.used[1] = new
    fence()  # the index is out before the driver's wish is read
    if state[SIGNAL_ANYWAY]:
        state[SIGNAL_ANYWAY] = 0
        wants_call = True
    elif state[EVENT_IDX]:
        # virtio 1.3 §2.7.7.2: call when used_event is among the entries just published.
        used_event = queue.avail[2 + state[SIZE]]
        wants_call = (new - used_event - 1 & 0xFFFF) < (new - old & 0xFFFF)
    else:
        wants_call = not queue.avail[0] & AVAIL_NO_INTERRUPT
    tracked = queue.tracked
    if tracked:
        pushed = queue.pushed
        for index in range(state[PUSHED]):
            tracked[16 + 16 * pushed[index]] = 0
        state[PUSHED] = 0
        queue.tracked_halves[7] = new
    return wants_call
