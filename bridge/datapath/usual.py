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

Usual is: a split ring, with an in-flight region or without; a chain of three descriptors, direct
or in an indirect table, header, data and status each in one piece in one region; IN or OUT inside
the disk; a hit in the cache, or one command on the one connection there is; a reply without an
error, all of it received, a READ's in one piece. What cannot be true is not found out here: a
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
    BLOCK_MASK,
    CAPACITY_BYTES,
    COUNTER,
    EVENT_IDX,
    HEAD_BITS,
    IN_FLIGHT,
    INDIRECT,
    LAST_HEAD,
    MAX_HEADS,
    MAX_READ_BYTES,
    MAX_WRITE_BYTES,
    MAY_WRITE,
    NAME,
    NAME_BITS,
    NEXT_AVAIL,
    NEXT_USED,
    PUBLISHED,
    PUSHED,
    ROW,
    ROW_BYTES,
    ROW_COOKIE,
    ROWS,
    SIGNAL_ANYWAY,
    SIZE,
    SIZE_BYTES,
    STOPPED,
    TOUCHED,
    UNFLUSHED,
    Cells,
    Channel,
    Queue,
    Resident,
    Route,
)
from bridge.datapath.fence import WEAK_ORDER, fence
from bridge.datapath.lanes import SMALL_BYTES
from bridge.spec.virtqueue import (
    AVAIL_NO_INTERRUPT,
    DESC_INDIRECT,
    DESC_NEXT,
    DESC_WRITE,
    DESCRIPTOR,
)

if TYPE_CHECKING:
    from bridge.datapath.rows import Rows

_unpack_descriptor = DESCRIPTOR.unpack_from
_unpack_three = Struct("=QIHHQIHHQIHH").unpack_from
_unpack_header = Struct("<I4xQ").unpack_from
_pack_row = ROW.pack_into
_unpack_row = ROW.unpack_from
_pack_command = Struct(">IHHQQI").pack
_unpack_reply = Struct(">IIQ").unpack_from
_unpack_chunk = Struct(">IQ").unpack_from

_HEADER_BYTES: Final = 16
_SECTOR_SHIFT: Final = 9
_IN: Final = 0
_OUT: Final = 1
_NAME_MASK: Final = (1 << NAME_BITS) - 1
_HEAD_MASK: Final = MAX_HEADS - 1

UsualChain = tuple[int, int, int, int, int, int, int]
"""Type, sector, region of the data, where in it, bytes of data, region of the status, where in it.
"""


def available(queue: Queue, first: int, used: int) -> int:
    """How many chains the driver has made available; 0, and STOPPED, if that breaks the ring.

    What the driver cannot know to be used is in flight, too (see `split_queue.SplitQueue.pop`).
    """
    state = queue.cells
    count = queue.avail[1] - first & 0xFFFF
    if count + state[IN_FLIGHT] + (used - state[PUBLISHED] & 0xFFFF) > state[SIZE]:
        state[STOPPED] = 1
        return 0
    if WEAK_ORDER:
        fence()  # the ring's entries are read after its index
    return count


def usual_chain(queue: Queue, head: int, mask: int, base: int, size: int) -> UsualChain | None:
    """The chain at `head`, if it is the usual one: header of 16 bytes, data, status of one byte, in
    three descriptors of the table or of an indirect one; None: it is something else.

    `mask`: of heads. `base` and `size` are of region 0, the largest, which has most of them.
    """
    address, length, flags, following = _unpack_descriptor(queue.descriptors, head << 4)
    if flags == DESC_INDIRECT:
        if length != 48 or not queue.cells[INDIRECT]:
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
        data, data_bytes, way, last = _unpack_descriptor(queue.descriptors, following << 4)
        if last > mask:
            return None
        end, room, tail, _ = _unpack_descriptor(queue.descriptors, last << 4)
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
        return type_, sector, data_region, data_at, data_bytes, status_region, status_at
    return None


def region_of(queue: Queue, address: int, length: int) -> tuple[int, int]:
    """The region that has all of a guest range, and where in it that is; -1: none has."""
    regions = queue.regions
    for number in range(len(regions) // 2):
        base, size = regions[2 * number], regions[2 * number + 1]
        if address >= base and length <= size and address - base <= size - length:
            return number, address - base
    return -1, 0


def take_hits(queue: Queue, disk: Cells[int], cache: Resident) -> tuple[int, int]:
    """Serve chains from the cache up to the first one that is unusual or no hit; how many reads and
    how many writes that were."""
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
    served = writes = 0
    while served < count:
        head = avail[2 + (first + served & mask)]
        if head > mask:
            break
        chain = usual_chain(queue, head, mask, base, size)
        if chain is None:
            break
        type_, sector, data_region, data_at, length, status_region, status_at = chain
        if length > SMALL_BYTES or sector > capacity_bytes >> _SECTOR_SHIFT:
            break
        offset = sector << _SECTOR_SHIFT
        within = offset & granule_bytes - 1
        granule = offset >> granule_shift
        slot = slots[granule & bucket_mask]
        if (
            length > capacity_bytes - offset
            or (offset | length) & block_mask
            or granule_of[slot] != granule
            or within + length > granule_bytes
        ):
            break
        bits = (1 << (within + length + block_up >> block_shift)) - (1 << (within >> block_shift))
        at = (slot << granule_shift) + within
        if type_ == _IN:
            if bits & ~ready[slot]:
                break
            if tracked:
                words[3 + 2 * head] = counter
                counter += 1
                tracked[16 + 16 * head] = 1
            views[data_region][data_at : data_at + length] = data[at : at + length]
            elements[((used & mask) << 1) + 1] = length + 1
        else:
            if not may_write or (bits & ~opened[slot] and not cache.open_blocks(slot, bits)):
                break
            if tracked:
                words[3 + 2 * head] = counter
                counter += 1
                tracked[16 + 16 * head] = 1
            data[at : at + length] = views[data_region][data_at : data_at + length]
            elements[((used & mask) << 1) + 1] = 1
            writes += 1
        touched[slot] = up[touched[slot]]
        views[status_region][status_at] = 0
        if tracked:
            halves[11 + 8 * head] = last_head
            halves[6] = last_head = head
            pushed[n_pushed] = head
            n_pushed += 1
        elements[(used & mask) << 1] = head
        used += 1
        served += 1
    if served < count:
        state[STOPPED] = 1
    state[NEXT_AVAIL] = first + served & 0xFFFF
    state[NEXT_USED] = used & 0xFFFF
    if tracked:
        state[PUSHED], state[COUNTER], state[LAST_HEAD] = n_pushed, counter, last_head
    return served - writes, writes


def take_commands(
    queue: Queue, disk: Cells[int], route: Route, channel: Channel, rows: Rows
) -> tuple[int, int]:
    """Make commands of chains up to the first one that is unusual; how many reads and how many
    writes that were."""
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
    name = state[NAME]
    sequence = rows.cells[0]
    taken = writes = 0
    while taken < count:
        head = avail[2 + (first + taken & mask)]
        if head > mask or cookies[head]:
            break  # No such head, or it is in flight already.
        chain = usual_chain(queue, head, mask, base, size)
        if chain is None:
            break
        type_, sector, data_region, data_at, length, status_region, status_at = chain
        if sector > capacity_bytes >> _SECTOR_SHIFT:
            break
        offset = sector << _SECTOR_SHIFT
        if (
            length > (max_write_bytes if type_ else max_read_bytes)
            or length > capacity_bytes - offset
            or offset > size_bytes
            or length > size_bytes - offset
            or (offset | length) & block_mask
        ):
            break
        cookie = name | sequence << NAME_BITS | head
        sequence += 1
        if tracked:
            words[3 + 2 * head] = counter
            counter += 1
            tracked[16 + 16 * head] = 1
        cookies[head] = cookie
        at = ROW_BYTES * head
        _pack_row(
            table, at, offset, data_at, status_at, length, number, data_region, status_region, type_
        )
        output.append(_pack_command(0x25609513, 0, type_, cookie, offset, length))
        if type_ == _OUT:
            output.append(views[data_region][data_at : data_at + length])
            writes += 1
        taken += 1
    if taken < count:
        state[STOPPED] = 1
    state[NEXT_AVAIL] = first + taken & 0xFFFF
    state[IN_FLIGHT] += taken
    if tracked:
        state[COUNTER] = counter
    rows.cells[0] = sequence
    channel.cells[ROWS] += taken
    if writes:
        channel.has_payload = True
    return taken - writes, writes


def answers(channel: Channel, rows: Rows, start: int, end: int) -> tuple[int, bool]:
    """Take the replies to rows that stand in the staging buffer between `start` and `end`, up to
    the first one that is unusual: where that is, and whether it is only not all there yet.

    Queues of which something was pushed are added to `rows.touched`.
    """
    staging, structured, number = channel.staging, channel.structured, channel.number
    queue: Queue | None = None
    current = -1
    used = last_head = n_pushed = 0
    answered = total = writes = 0
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
            tracked = queue.tracked
            if tracked:
                halves, pushed = queue.tracked_halves, queue.pushed
                last_head, n_pushed = state[LAST_HEAD], state[PUSHED]
        head = name & _HEAD_MASK
        if head > mask or cookies[head] != cookie:
            break
        offset, data_at, status_at, length, sent_on, data_region, status_region, op = _unpack_row(
            table, ROW_BYTES * head
        )
        if sent_on != number:
            break
        if op == _OUT:
            if magic != 0x67446698 or error:
                break
            start += 16
            writes += 1
            used_bytes = 1
        else:
            payload = start + 16
            if structured:
                if magic != 0x668E33EF or error != 0x10001:
                    break  # No chunk of type OFFSET_DATA with the flag DONE.
                payload = start + 28
                if payload <= end:
                    chunk_bytes, at = _unpack_chunk(staging, start + 16)
                    if chunk_bytes != length + 8 or at != offset:
                        break
            elif magic != 0x67446698 or error:
                break
            stop = payload + length
            if stop > end:
                waits = True
                break
            views[data_region][data_at : data_at + length] = staging[payload:stop]
            start = stop
            used_bytes = length + 1
        cookies[head] = 0
        views[status_region][status_at] = 0
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
    if queue is not None and answered:
        _pushed(queue, rows, used, answered, last_head, n_pushed)
        total += answered
    state = channel.cells
    state[ROWS] -= total
    if writes:
        state[UNFLUSHED] += writes
    return start, waits


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
