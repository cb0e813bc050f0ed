"""What a front-end session asks of the device behind it.

The session owns the conversation: it checks messages, keeps each ring's set-up, replies, and
owns **every file descriptor** that the front-end sent. A descriptor for kick, call or error stays
open until the session has handed the device its replacement (`set_kick`, `set_call`, `set_error`).
One for memory, log or in-flight region stays open until the call that brought it returns: the
device maps the file and does not keep the descriptor. The device never closes a descriptor that it
did not make.

Life of a ring, as the device sees it::

    (nothing) ── start_ring ──▶ running ⇄ suspended ── stop_ring ──▶ (nothing)
                                  suspend_ring / resume_ring

A method raises `ProtocolError` for input that the front-end must not send. The session then
refuses the message if the front-end asked for a reply, and ends the conversation otherwise. Calls
come one at a time: the session awaits each before the next, `disconnected()` last.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class MemoryRegion:
    """One piece of the guest's memory: a range of a shared file and its two addresses.

    The session has checked: no overlap with other regions in either address space, sizes above
    zero, no sum above 2^64, at most 8 regions at once in `replace_memory`. The device checks the
    file's size (a mapping past its end is a SIGBUS) and maps it.
    """

    guest_address: int
    """Guest-physical: the addresses in descriptors."""
    size_bytes: int
    user_address: int
    """In the front-end's own address space: the addresses of rings."""
    mmap_offset_bytes: int
    """Where the region starts in the file; need not be page aligned."""
    fd: int
    """Open until the call that hands it over returns."""


@dataclass(frozen=True, slots=True)
class RingSetup:
    """Everything about a virtqueue that is about to run."""

    size: int
    """Number of descriptors, 1 … `max_queue_size`; a power of two unless rings are packed."""
    desc_user_address: int
    """Front-end addresses; packed: descriptor ring, driver and device event suppression areas."""
    avail_user_address: int
    used_user_address: int
    log_guest_address: int | None
    """Where writes to the used ring are logged; None when the ring is not logged."""
    base: int
    """Split: the next avail index (u16); the used index is the one in guest memory. Packed: the
    raw u32: avail index, avail wrap counter (bit 15), used index << 16, used wrap counter."""
    kick_fd: int | None
    """Eventfd to wait for; None: the driver does not kick, look at the ring all the time."""
    call_fd: int | None
    """Eventfd to signal; None: the driver polls, never signal."""
    error_fd: int | None
    """Eventfd to signal when the ring is broken; None: the front-end gave none."""


class ConfigListener(Protocol):
    """Who has to know of the config space: a session."""

    def config_changed(self) -> None:
        """The config space changed by itself. Never raises."""


class VhostUserDevice(Protocol):
    """The device of one back-end. The module's text says who owns descriptors, and how long."""

    max_queues: int
    """Number of virtqueues, 1 … 256; indexes 0 … max_queues - 1 are used."""
    max_queue_size: int
    """Largest `RingSetup.size`, at most 32768."""
    supports_inflight: bool
    """`create_inflight` and `set_inflight` work (protocol feature INFLIGHT_SHMFD is offered)."""
    supports_dirty_log: bool
    """`set_log` and `set_logging` work (LOG_SHMFD and VHOST_F_LOG_ALL are offered)."""
    listener: ConfigListener | None
    """Set by the session, to itself: the device calls it whenever the config space changed by
    itself (a resize). None: no front-end is connected."""

    def offered_features(self) -> int:
        """The virtio feature bits, without 26 (LOG_ALL) and 30, which are the session's own."""

    def set_features(self, features: int) -> None:
        """The driver accepted `features`, a subset of those offered (without 26 and 30).

        Called only while no ring runs; possibly several times.
        """

    def read_config(self, offset: int, size: int) -> bytes:
        """Exactly `size` bytes of the config space from `offset`, zero past its end."""

    def write_config(self, offset: int, data: bytes, *, migration: bool) -> None:
        """Write to the config space, for the guest or (`migration`) to restore it.

        Raises ProtocolError when these bytes are not writable or the values not valid.
        """

    # Memory. Async because the device quiesces running rings first and resumes them afterwards.

    async def replace_memory(self, regions: list[MemoryRegion]) -> None:
        """Forget all regions, map these. After a ProtocolError no region is mapped."""

    async def add_memory(self, region: MemoryRegion) -> None:
        """Map one region more, or map a known one again: from another file only while no ring
        runs. After a ProtocolError everything is as before."""

    async def remove_memory(
        self, *, guest_address: int, user_address: int, size_bytes: int
    ) -> None:
        """Unmap exactly this region. Raises ProtocolError when it is not mapped."""

    # Rings.

    def start_ring(self, index: int, ring: RingSetup) -> None:
        """Serve a ring that the front-end has started and enabled.

        The device looks at the avail ring at once (a former back-end may have consumed the kick)
        and signals the first completion, or once right away, whatever the suppression fields say.
        Raises ProtocolError for addresses outside the memory, misaligned or overlapping; the ring
        does not exist then.
        """

    async def stop_ring(self, index: int) -> int:
        """Pop no more, wait until every popped request is complete and published; return the base.

        The device bounds the time. When it has passed, unanswered requests stay in the in-flight
        region, or fail if there is none. Afterwards the device does not touch the ring, its memory
        or its descriptors. The base is the `RingSetup.base` with which the ring would go on from
        here. Also called for a ring that is broken or suspended.

        Raises LeftBehind, with the ring stopped, when it was the last one and some of the guest's
        writes are not on the server, where another host would look for them. The session must not
        answer such a stop with success.
        """

    def suspend_ring(self, index: int) -> None:
        """Pop nothing until `resume_ring`; popped requests complete. Idempotent."""

    def resume_ring(self, index: int) -> None:
        """Serve again, looking at the ring at once. Idempotent."""

    def set_kick(self, index: int, fd: int | None) -> None:
        """Wait for this eventfd from now on, for a ring that was started. Looks at the ring."""

    def set_call(self, index: int, fd: int | None) -> None:
        """Signal this eventfd from now on, and once right away: a call may have been lost."""

    def set_error(self, index: int, fd: int | None) -> None:
        """Signal this eventfd from now on when the ring breaks; at once if it is broken."""

    def set_ring_log(self, index: int, log_guest_address: int | None) -> None:
        """Log writes to the used ring there from now on (SET_VRING_ADDR of a running ring)."""

    # In-flight region (vhost-user "Inflight I/O tracking").

    def create_inflight(self, num_queues: int, queue_size: int) -> tuple[int, int]:
        """Make and map a zeroed, sealed region; return (fd, size_bytes). The caller closes the fd.

        Replaces the previous region. Raises ProtocolError for numbers out of range.
        """

    def set_inflight(
        self, fd: int, offset: int, size: int, num_queues: int, queue_size: int
    ) -> None:
        """Map the region that a former back-end left; rings started from now on recover from it.

        Raises ProtocolError when the file, the range or the region's header do not fit.
        """

    # Dirty log (vhost-user "Migration").

    def set_log(self, fd: int, offset: int, size: int) -> None:
        """Map the dirty bitmap in place of the previous one."""

    def set_logging(self, enabled: bool) -> None:
        """Mark every page written to in the bitmap from now on (LOG_ALL), or stop doing it."""

    # The end.

    async def reset(self) -> None:
        """RESET_DEVICE: back to the state after `disconnected()`, but keep the memory.

        Raises LeftBehind as `stop_ring` does, after the reset is complete.
        """

    async def disconnected(self) -> None:
        """The front-end has disconnected: stop every ring (bounded in time), forget memory, log and
        in-flight region.

        The device uses nothing that the front-end sent afterwards. Idempotent. Also called after a
        conversation without a message.
        """
