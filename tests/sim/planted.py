"""Bugs put into the product on purpose, each of which some storage software has had.

A simulator that finds nothing proves nothing: each of these has to be found within `PROGRAMS`.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Final

import pytest
import trio

from bridge.app import cache_ownership
from bridge.app.departure import Departure
from bridge.app.serve import _GuestsSide, _Serving
from bridge.app.storage import Storage
from bridge.cache.cache import Cache
from bridge.cache.file.cache_file import CacheFile
from bridge.cache.foreign import ForeignChanges
from bridge.cache.writes import Writes
from bridge.datapath.disk import Disk
from bridge.datapath.durability import ReportingDurability
from bridge.datapath.merged import Merged
from bridge.datapath.rows import Rows
from bridge.guest.remembered import Remembered
from bridge.guest.ring import RunningRing
from bridge.guest.virtio.blk import BlkEngine
from bridge.guest.virtio.inflight import InflightRegion, TrackedSplitQueue
from bridge.server.changes import Changes
from bridge.server.commands import Commands
from bridge.server.flushes import Flushes
from bridge.server.link import Link
from bridge.server.overlaps import Overlaps
from bridge.server.split import Split
from bridge.server.suspects import Suspects
from nbd_plugin.file_disk import FileDisk
from nbd_plugin.service import Service
from nbd_plugin.session import Fence, Session
from tests.cache import test_oracle as cache_bugs
from tests.sim import campaign
from tests.sim.config import Seed

PROGRAMS: Final = 2000

Patch = pytest.MonkeyPatch
Bug = Callable[[Patch], None]


def _nothing(*_: Any, **__: Any) -> None:
    return None


async def _nothing_checked(*_: Any, **__: Any) -> None:
    return None


# The usual case.


def failed_merged_command_succeeds(patch: Patch) -> None:
    """The error of a command for several requests is none of theirs."""

    def end(self: Merged) -> None:
        for each in self.members:
            each.generation = self.generation
            self._member_owner.finish(each, 0)

    patch.setattr(Merged, "end", end)


def merged_data_in_another_order(patch: Patch) -> None:
    """What one member reads is the data of another."""
    real = Rows._command_of

    def command_of(self: Rows, requests: list[Any]) -> Any:
        command = real(self, requests)
        if len(requests) > 1:
            command.buffers.reverse()
        return command

    patch.setattr(Rows, "_command_of", command_of)


# The guest's side.


def lost_kick(patch: Patch) -> None:
    """The ring is not looked at again after kicks were asked for."""
    real = RunningRing.arm

    def arm(self: RunningRing) -> bool:
        real(self)
        return False

    patch.setattr(RunningRing, "arm", arm)


def lost_call(patch: Patch) -> None:
    """The driver is not called."""
    patch.setattr(RunningRing, "call", _nothing)
    patch.setattr("bridge.guest.ring._signal", lambda fd: True)


def write_through_answers_at_once(patch: Patch) -> None:
    """A cache that is to write through answers a write before the server has it."""
    real = Writes.__init__

    def init(self: Writes, *args: Any) -> None:
        real(self, *args)
        self._through = False

    patch.setattr(Writes, "__init__", init)


def recovered_out_of_order(patch: Patch) -> None:
    """What a dead process had in flight is executed again, the newest first."""
    real = TrackedSplitQueue.recovered
    patch.setattr(TrackedSplitQueue, "recovered", lambda self: list(reversed(real(self))))


def recovered_forgotten(patch: Patch) -> None:
    """What a dead process had in flight is not executed again."""
    patch.setattr(TrackedSplitQueue, "recovered", lambda self: [])


def write_cache_ignored(patch: Patch) -> None:
    """A guest that turns its write cache off still has one."""
    patch.setattr(BlkEngine, "writeback_changed", _nothing)


def write_cache_forgotten(patch: Patch) -> None:
    """It has one again after the bridge has died."""
    patch.setattr(InflightRegion, "write_through", property(lambda self: False))


def use_of_region_forgotten(patch: Patch) -> None:
    """What a paused guest left is not inherited with packed rings."""
    patch.setattr(InflightRegion, "note_use", _nothing)


def nothing_inherited(patch: Patch) -> None:
    """What the process before left unflushed is not asked about."""
    patch.setattr(_GuestsSide, "inherited", _nothing)


def instance_not_remembered(patch: Patch) -> None:
    """Which server instance has what is unflushed is not in the region."""
    real = Remembered.remember

    def remember(self: Remembered) -> None:
        self.unflushed_on = 0
        real(self)

    patch.setattr(Remembered, "remember", remember)


def outage_not_remembered(patch: Patch) -> None:
    """A lost connection leaves no word for the next process."""
    patch.setattr(_Serving, "disconnected", _nothing)


def told_before_it_is_seen(patch: Patch) -> None:
    """A flush fails for a loss: the next process is not told of it any more, before the guest can
    see that flush."""
    never = property(lambda self: False, lambda self, value: None)
    patch.setattr(Disk, "is_telling", never, raising=False)


def stop_without_flush(patch: Patch) -> None:
    """The last ring stops, and nothing is brought to the server first."""

    async def hand_over(self: Departure, flush: object) -> None:
        return None

    patch.setattr(Departure, "hand_over", hand_over)


def frozen_data_is_sent(patch: Patch) -> None:
    """A stop that failed does not keep the cache from sending."""
    patch.setattr(Cache, "freeze", _nothing)

    async def stop_sending(self: Departure) -> None:
        return None

    patch.setattr(Departure, "stop_sending", stop_sending)


def migration_ignores_its_last_flush(patch: Patch) -> None:
    """The stop of the last ring is answered in time, whatever became of the last flush and of what
    is dirty still, which goes to the server later."""

    async def hand_over(self: Departure, flush: Callable[[], Awaitable[int]]) -> None:
        with trio.move_on_after(2):
            await flush()
        self.may_be_written_elsewhere()

    patch.setattr(Departure, "hand_over", hand_over)


def source_believes_its_cache(patch: Patch) -> None:
    """The bridge that a guest has left keeps its clean blocks, for when it comes back: the other
    one has written in the same session. (The comparison of a sample would hide that, see
    `generation_not_stored`.)"""
    patch.setattr(Departure, "may_be_written_elsewhere", _nothing)
    patch.setattr("bridge.app.storage.check_content", _nothing_checked)


def dirty_cache_over_anothers_data(patch: Patch) -> None:
    """What only the cache has is written, whoever has written since."""
    real = cache_ownership.check_content

    async def check_content(*args: Any, **options: Any) -> None:
        await real(*args, **{**options, "force": True})

    patch.setattr("bridge.app.storage.check_export", _nothing)
    patch.setattr("bridge.app.storage.check_content", check_content)


# The session with the server.


def replay_out_of_order(patch: Patch) -> None:
    """What had no answer is sent again in the other order."""
    real = Link._resume

    def resume(self: Link, *args: Any) -> None:
        self._unanswered.reverse()
        real(self, *args)

    patch.setattr(Link, "_resume", resume)


def replay_forgotten(patch: Patch) -> None:
    """It is not sent again, and counts as done."""

    def resume(self: Link, *args: Any) -> None:
        for command in self._unanswered:
            self._turn.finish(command)
        self._unanswered = []
        real(self, *args)

    real = Link._resume
    patch.setattr(Link, "_resume", resume)


def instance_believed(patch: Patch) -> None:
    """Whatever server there is has what the last one had."""

    def connected(self: ReportingDurability, instance: str, answered: int) -> bool:
        self._instance = instance
        return False

    patch.setattr(ReportingDurability, "connected", connected)


def failed_flush_is_no_loss(patch: Patch) -> None:
    """A flush failed: what the server has dropped is vouched for by the next one."""
    patch.setattr(Flushes, "server_failed", _nothing)


def failed_flush_spares_what_is_in_flight(patch: Patch) -> None:
    """A change that is answered after a failed flush is not sent again."""

    def server_failed(self: Flushes) -> None:
        lost = self.durability.flush_failed(self._channels.answered)
        if lost and not self.durability.keeps_unflushed:
            self._refuse(self._take_guests())

    patch.setattr(Flushes, "server_failed", server_failed)


def durable_write_trusts_any_flush(patch: Patch) -> None:
    """A write that has to be durable was written to one server, flushed on another, or after a
    flush that failed."""

    def flushed(self: Split, flush: Any) -> None:
        self._finish(self._request, flush.error)

    patch.setattr(Split, "_flushed", flushed)
    patch.setattr(Commands, "_whole", lambda self, request: request)


def durable_write_trusts_any_epoch(patch: Patch) -> None:
    """A write with FUA is answered whatever flush failed meanwhile, and is not sent as one."""
    patch.setattr(Commands, "_issue", lambda self, request: self._channels.send(_plain(request)))


def flush_believed_when_sent(patch: Patch) -> None:
    """A guest's flush that is a row makes things durable before the server has answered it."""

    def row_taken(self: Flushes) -> None:
        self.durability.flushed(self._channels.answered, self.durability.epoch)
        self._row_is_new = True
        self._turn.want()

    patch.setattr(Flushes, "row_taken", row_taken)


def flush_covers_what_came_later(patch: Patch) -> None:
    """A guest's flush that is a row makes durable what was answered after it had been sent."""

    def row_succeeded(self: Flushes, covers: int) -> None:
        self.durability.flushed(self._channels.answered, self._flushing_epoch)
        self._turn.want()

    patch.setattr(Flushes, "row_succeeded", row_succeeded)


def flush_hides_a_loss(patch: Patch) -> None:
    """A guest's flush is a row whatever has to be told by it."""

    def may_be_row(self: Flushes) -> bool:
        self._flushing_epoch = self.durability.epoch
        return not self._asked and self._flushing is None

    patch.setattr(Flushes, "may_be_row", may_be_row)


def flush_passes_durable_changes(patch: Patch) -> None:
    """A guest's flush that is a row is believed whatever durable changes are in flight."""
    patch.setattr(Flushes, "durable_change_begins", _nothing)
    patch.setattr(Flushes, "durable_change_ends", _nothing)


def _plain(request: Any) -> Any:
    request.flags = 0
    return request


def connections_of_two_sessions(patch: Patch) -> None:
    """Only the first connection's counters are looked at."""
    patch.setattr("bridge.server.opening._difference", lambda exports: "")


def no_grace(patch: Patch) -> None:
    """A new write does not wait for the old one of a lost connection."""
    patch.setattr(Changes, "_hold", _nothing)


def stale_writes_not_expected(patch: Patch) -> None:
    """It does not wait for those of a dead process."""
    patch.setattr(Changes, "expect_stale", _nothing)


def overlapping_changes_at_once(patch: Patch) -> None:
    """Changes of the same blocks pass one another."""

    def enter(self: Overlaps, claim: Any) -> bool:
        return True

    patch.setattr(Overlaps, "enter", enter)
    patch.setattr(Overlaps, "release", _nothing)


def half_frame_again(patch: Patch) -> None:
    """What a socket took of the output is sent again."""
    patch.setattr("bridge.server.connection.rest_after", lambda output, sent: output)


def loss_is_never_told(patch: Patch) -> None:
    """No flush of the guest's fails for a loss."""
    patch.setattr(ReportingDurability, "unreported", property(lambda self: False))
    patch.setattr(Storage, "loss_unreported", property(lambda self: False))


# The cache file on its disk.


def clean_mark_before_sync(patch: Patch) -> None:
    """The file is marked as closed in order before its content is on the disk."""

    def mark(self: CacheFile) -> None:
        self.save_header(clean=True, index_crc=self.index_crc())

    patch.setattr(CacheFile, "_sync_and_mark", mark)


def torn_cache_believed(patch: Patch) -> None:
    """Nobody asks whether the host has lost power."""
    patch.setattr("bridge.cache.file.opening.has_survived", lambda image: True)


# The plugin.


def fence_admits(patch: Patch) -> None:
    """The next session does not wait for what the last one has in flight."""
    patch.setattr(Fence, "_revoke", _nothing)


def shared_session_admits(patch: Patch) -> None:
    """In a session for migrations nothing keeps what a lost connection has left there from going
    over a newer write."""
    patch.setattr(Session, "_clients_before", lambda self, handle: [])


def failed_session_is_kept(patch: Patch) -> None:
    """A session whose flush has failed does not end before its idle members have left."""

    def is_replaced_by(self: Session, name: Any) -> bool:
        return self.is_open and name.client is not None and name.client == self.client

    patch.setattr(Session, "is_replaced_by", is_replaced_by)


def generation_not_stored(patch: Patch) -> None:
    """The plugin does not remember who wrote. (The comparison of a sample, which is all of so small
    a cache, would hide that.)"""

    def note_write(self: Session, handle: Any) -> None:
        self.writer = handle.client

    patch.setattr(Session, "note_write", note_write)
    patch.setattr("bridge.app.storage.check_content", _nothing_checked)


def generation_ignored(patch: Patch) -> None:
    """The bridge keeps its clean blocks, whoever wrote."""
    patch.setattr("bridge.cache.foreign.ForeignChanges.drop_clean", lambda self: 0)


def samples_come_first(patch: Patch) -> None:
    """After a reconnect each new comparison is sent before what had no answer: it takes the blame
    for a command on which the server hangs up."""

    def check(self: ForeignChanges, done: Callable[[int], None]) -> None:
        self._sample_asked.append(done)
        self._begin_sample()

    patch.setattr(ForeignChanges, "check_sample", check)


def old_answers_prove(patch: Patch) -> None:
    """A server that answered before it hung up for the first time is believed to be well since."""
    real = Suspects.hung_up

    def hung_up(self: Suspects, blamed: Any, now: float, *, answered: bool) -> bool:
        result = real(self, blamed, now, answered=answered)
        self.proven |= answered
        return result

    patch.setattr(Suspects, "hung_up", hung_up)


def loss_is_told_without_end(patch: Patch) -> None:
    """A flush that has failed for a loss does not count as having told of it."""
    patch.setattr(ReportingDurability, "reported", _nothing)


def evicted_writes_race(patch: Patch) -> None:
    """Writes whose fetched blocks were evicted all fetch them again at once."""
    patch.setattr(Writes, "_fetch_again", Writes.go_on)


def failed_flush_forgotten_by_the_plugin(patch: Patch) -> None:
    """A second flush after a failed one succeeds, as the kernel's does."""
    patch.setattr(FileDisk, "_note_failure", _nothing)


def failed_flush_keeps_the_instance(patch: Patch) -> None:
    """The plugin does not tell that a failed flush may have lost something."""
    patch.setattr("tests.sim.volume.SimDisk.note_loss", _nothing)


def filter_believed(patch: Patch) -> None:
    """The plugin vouches for what a filter above it has acknowledged."""
    real = Service.__init__

    def init(self: Service, settings: Any, *, is_filtered: bool = False) -> None:
        real(self, settings)

    patch.setattr(Service, "__init__", init)


def _named(*bugs: Bug) -> dict[str, Bug]:
    return {bug.__name__: bug for bug in bugs}


LOSSES: Final[dict[str, dict[str, Bug]]] = {
    "a session without a cache believes flushes": _named(
        nothing_inherited, failed_flush_spares_what_is_in_flight, failed_flush_is_no_loss
    ),
    "a session without a cache lets stale writes in": _named(no_grace),
    "a write and its flush are split": _named(durable_write_trusts_any_flush),
    "a migration's last flush": _named(migration_ignores_its_last_flush),
    "two bridges on one volume": _named(source_believes_its_cache, dirty_cache_over_anothers_data),
    "a filter above the plugin": _named(filter_believed),
}
"""The losses that were found outside of the cache once: all of them silent."""

BUGS: Final[dict[str, Bug]] = {
    bug.__name__: bug
    for bug in (
        *(lost_kick, lost_call, recovered_forgotten),
        *(write_cache_ignored, write_cache_forgotten, nothing_inherited),
        *(instance_not_remembered, stop_without_flush, frozen_data_is_sent, replay_forgotten),
        *(instance_believed, failed_flush_is_no_loss, failed_flush_spares_what_is_in_flight),
        *(durable_write_trusts_any_epoch, overlapping_changes_at_once, half_frame_again),
        *(loss_is_never_told, torn_cache_believed, generation_not_stored, generation_ignored),
        *(flush_believed_when_sent, flush_hides_a_loss),
        *(failed_merged_command_succeeds, merged_data_in_another_order),
        write_through_answers_at_once,
    )
} | {
    f"cache{bug.__name__}": bug
    for bug in (
        cache_bugs._reconnect_ignores_written,
        cache_bugs._rewritten_block_counts_as_sent,
        cache_bugs._flush_does_not_wait_for_what_is_in_flight,
        cache_bugs._evicts_dirty,
        cache_bugs._clean_by_any_reply,
    )
}
"""By name: what to do to the product. Each has to be found."""

RARE: Final[dict[str, Bug]] = {
    bug.__name__: bug
    for bug in (
        *(recovered_out_of_order, use_of_region_forgotten, told_before_it_is_seen),
        *(outage_not_remembered, replay_out_of_order),
        *(stale_writes_not_expected, clean_mark_before_sync, fence_admits),
        *(failed_flush_forgotten_by_the_plugin, failed_flush_keeps_the_instance),
        *(flush_covers_what_came_later, flush_passes_durable_changes),
        *(shared_session_admits, failed_session_is_kept, connections_of_two_sessions),
        *(samples_come_first, old_answers_prove, loss_is_told_without_end, evicted_writes_race),
    )
} | {
    f"cache{bug.__name__}": bug
    for bug in (
        cache_bugs._fill_ignores_writes,
        cache_bugs._failed_flush_loses_nothing,
        cache_bugs._state_before_data,
        cache_bugs._data_before_dirty_mark,
        cache_bugs._growth_keeps_what_was_behind_the_end,
    )
}
"""Not found in the first few hundred programs: to be looked for by name, with luck. Other tests
find them, or a program of their own (`_FOUND_BY` in `test_sim`)."""


def asserted() -> dict[str, Bug]:
    """All that have to be found: those that cost somebody data come first."""
    lost = {name: bug for bugs in LOSSES.values() for name, bug in bugs.items()}
    return lost | BUGS


def loss_of(bug: str) -> str:
    """Which of the losses it is; "" for none of them."""
    return next((loss for loss, bugs in LOSSES.items() if bug in bugs), "")


@dataclass
class Found:
    """How a hunt for one bug went."""

    bug: str
    programs: int
    seed: str
    """"" if nothing was found."""
    error: str

    def __str__(self) -> str:
        name = f"{self.bug} ({loss})" if (loss := loss_of(self.bug)) else self.bug
        if not self.seed:
            return f"{name}: NOT found in {self.programs} programs"
        return f"{name}: {self.programs} programs, {self.seed}: {self.error[:150]}"


def hunt_one(bug: str) -> Found:
    """Look for one planted bug."""
    with pytest.MonkeyPatch.context() as patch:
        found = campaign.run_some(
            range(PROGRAMS),
            until=lambda result: bool(result.failures),
            plant=lambda: (asserted() | RARE)[bug](patch),
        )
    seed, error = found.failures[0] if found.failures else ("", "")
    if seed and campaign.run_some([Seed.parse(seed).number]).failures:
        raise AssertionError(f"{seed} fails without any planted bug")
    return Found(bug, found.programs, seed, error)


def hunt(bugs: Iterable[str], *, jobs: int = 0) -> Iterator[Found]:
    """Look for each of them, several at a time."""
    with multiprocessing.get_context("fork").Pool(jobs or os.cpu_count()) as pool:
        yield from pool.imap(hunt_one, bugs)
