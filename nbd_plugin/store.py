"""The seam between nbdkit's callbacks and the stores: a store has volumes, a volume is opened as
a disk."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

EXTENT_HOLE = 1
EXTENT_ZERO = 2
"""Extent types (NBD "base:allocation"): both together for a hole that reads as zeroes."""

MAX_PAYLOAD_BYTES = 4 << 20
"""What clients are asked to keep to in one read or write: nbdkit holds all of it in memory, once
for each thread, and more brings nothing. Its own limit, for those that do not ask, is 64 MiB."""

COMMAND_WAIT_S = 3.0
"""How long resize, remove and snapshot wait for a writer: one that has just hung up is still about
to close."""

Extents = list[tuple[int, int, int]]
"""(offset, length, type), ascending and contiguous."""


@dataclass(frozen=True)
class VolumeState:
    """What is remembered of a volume beside its data; see `session` for the meaning."""

    generation: int = 0
    written: int = 0
    read_only: bool = False
    identity: str = ""
    """32 hexadecimal digits that no other volume has, whatever its name; "" before the first
    writable session."""
    writer: str = ""
    """The client that wrote last, "" if it has no name."""
    losses: int = 0
    """How often a flush failed, so that writes which were acknowledged may be gone."""
    seen: str = ""
    """What would be different if another program had changed the volume; the store's own words.
    The first is `open` while a session writes the volume, and after a kill."""
    grown_from: int = 0
    grown_to: int = 0
    """Between these two values of `written` the volume was only made longer, past this plugin."""

    @property
    def only_grew(self) -> bool:
        """`grown_to` counts: no session has written since."""
        return self.grown_from < self.grown_to == self.written

    @property
    def is_open(self) -> bool:
        """A session writes the volume, or nbdkit was killed while one did."""
        return self.seen.startswith("open ")


ChangeState = Callable[[VolumeState], VolumeState]


@dataclass(frozen=True)
class VolumeInfo:
    """One line of `list`."""

    name: str
    size_bytes: int
    allocated_bytes: int | None
    read_only: bool


class Disk(Protocol):
    """An open volume. Its methods are called from many threads at once.

    `offset` and `length` are bytes and lie inside the volume. Every method raises OSError,
    PluginError or an error with an `errno`.
    """

    size_bytes: int
    read_only: bool
    why_read_only: str
    """For the operator, when the volume was to be opened for writing and could not; else ""."""
    failed: bool
    """A flush failed: acknowledged writes may be gone, and no later flush may say otherwise. Every
    further one fails with ESHUTDOWN, until the client opens the volume anew and is told by
    `instance` that it has to send again what was not flushed."""

    block_sizes: tuple[int, int, int]
    """Minimum, preferred and maximum, as NBD_INFO_BLOCK_SIZE has them."""

    def pread(self, buf: memoryview, offset: int) -> None:
        """Fill the whole buffer."""

    def pwrite(self, buf: memoryview, offset: int, fua: bool) -> None:
        """Write the whole buffer; with `fua` it is durable on return."""

    def flush(self) -> None:
        """Everything that was written before is durable on return."""

    def trim(self, offset: int, length: int, fua: bool) -> None:
        """Give the space back where that is possible. A hint."""

    def zero(self, offset: int, length: int, *, may_trim: bool, fua: bool, fast: bool) -> None:
        """Make the range read as zeroes, allocated unless `may_trim`.

        Raises NotSupported when that would not be faster than writing (`fast`) or cannot be done
        at all other than by writing.
        """

    def extents(self, offset: int, length: int, req_one: bool) -> Extents:
        """What is allocated, beginning at `offset`; at least one extent."""

    def cache(self, offset: int, length: int) -> None:
        """Begin to read the range into memory. A hint."""

    @property
    def state_lasts(self) -> bool:
        """Whether the remembered state outlives the process. If not, it says nothing of the time
        before."""

    def load_state(self) -> VolumeState:
        """The volume's remembered state, fresh from the store."""

    def update_state(self, change: ChangeState) -> VolumeState:
        """Replace the remembered state by what `change` makes of it, durably, and return that.

        One at a time: no other update gets lost.
        """

    def was_changed(self, state: VolumeState) -> bool:
        """Whether another program changed the volume since `state.seen` was remembered."""

    def has_grown(self, state: VolumeState) -> bool:
        """It is the same volume, and longer: that alone makes `was_changed` true."""

    def seen(self, *, writing: bool) -> str:
        """For `VolumeState.seen`. `writing`: a session changes the volume from here on."""

    def instance(self) -> str:
        """A token that changes when acknowledged, unflushed writes may have been lost."""

    def close(self) -> None:
        """Let go of the volume. No other call is running or follows."""


class Store(Protocol):
    """A place with volumes."""

    name: str

    def check(self) -> None:
        """Find out whether `start` will succeed. Called before nbdkit's fork."""

    def start(self) -> None:
        """Connect. Called once, in the process that serves (after nbdkit's fork)."""

    def stop(self) -> None:
        """Disconnect."""

    def default_volume(self) -> str:
        """The volume of an export without a name; "" when there is none."""

    def list_volumes(self) -> list[VolumeInfo]:
        """All volumes, by name."""

    def open(self, name: str, *, read_only: bool, timeout_s: float) -> Disk:
        """Open a volume; for writing only when no other session has it open for writing.

        Waits up to `timeout_s` for the other writer. Raises PluginError (ENOENT, EBUSY).
        """

    def create(self, name: str, size_bytes: int, *, read_only: bool = False) -> None:
        """Make a thin volume that reads as zeroes. Raises PluginError (EEXIST)."""

    def resize(self, name: str, size_bytes: int, *, shrink: bool = False) -> None:
        """Change the size; smaller only with `shrink`."""

    def remove(self, name: str) -> None:
        """Delete a volume that no session writes. Raises PluginError (EBUSY, ENOENT)."""

    def snapshot(self, name: str, snapshot: str) -> None:
        """Keep the present contents as the read-only volume `name@snapshot`."""
