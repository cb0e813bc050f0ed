"""What a flush vouches for: the marks alone, then the link that lives by them."""

from __future__ import annotations

import errno
import gc
from weakref import ref

import pytest

from bridge.datapath.durability import BEFORE, ReportingDurability, instance_mark
from bridge.datapath.request import (
    DISCARD,
    FLUSH,
    FUA,
    INTERNAL,
    REPEATED,
    WRITE,
    WRITE_ZEROES,
    Request,
)
from bridge.peers.nbd_server_settings import DEFAULT_FLAGS
from bridge.server.client_options import ClientOptions
from bridge.server.link import Link
from bridge.spec.nbd import TransmissionFlags
from tests.server.test_link import BLOCK, World, export
from tests.turns import deliver, forget, submit, turn

NO_FUA = DEFAULT_FLAGS & ~TransmissionFlags.SEND_FUA
EIO = errno.EIO


# The marks alone.


def connected(instance: str = "") -> ReportingDurability:
    durability = ReportingDurability()
    assert not durability.connected(instance, BEFORE)
    return durability


def test_what_was_before_the_process_may_be_lost_until_a_flush_has_succeeded() -> None:
    durability = connected()
    assert durability.unflushed(BEFORE)
    assert durability.connected("", BEFORE)
    assert durability.unreported


def test_flush_that_succeeded_leaves_nothing_to_lose() -> None:
    durability = connected()
    assert durability.flushed(BEFORE, durability.epoch)
    assert not durability.unflushed(BEFORE)
    assert not durability.connected("", BEFORE)
    assert not durability.unreported


def test_flush_covers_only_what_was_answered_when_it_was_sent() -> None:
    durability = connected()
    durability.flushed(5, durability.epoch)
    assert durability.unflushed(6)
    assert durability.failed(6)
    assert durability.unreported


def test_flush_of_an_older_epoch_vouches_for_nothing() -> None:
    durability = connected()
    epoch = durability.epoch
    durability.failed(3)
    assert not durability.flushed(3, epoch)


def test_failure_without_anything_unflushed_loses_nothing_and_ends_the_epoch() -> None:
    durability = connected()
    durability.flushed(4, durability.epoch)
    epoch = durability.epoch
    assert not durability.failed(4)
    assert not durability.unreported
    assert durability.epoch != epoch


def test_loss_is_told_by_a_flush_that_was_submitted_after_all_of_it() -> None:
    durability = connected()
    durability.failed(7)
    durability.reported(6)
    assert durability.unreported
    durability.reported(7)
    assert not durability.unreported


def test_guest_has_seen_what_was_answered_when_the_turn_is_over() -> None:
    durability = connected()
    assert durability.settled(BEFORE + 1)
    assert not durability.settled(BEFORE + 2)  # The end of the turn is waited for already.
    assert durability.seen == BEFORE
    durability.guests_have_seen()
    assert durability.seen == BEFORE + 2
    assert not durability.settled(BEFORE + 2)


def test_guest_knows_the_unflushed_changes_of_the_process_before_and_the_answers_since() -> None:
    durability = connected()
    durability.one_more_before()
    assert durability.seen == BEFORE + 1
    assert durability.settled(BEFORE + 2)
    durability.guests_have_seen()
    assert durability.seen == BEFORE + 2


def test_nothing_that_was_answered_in_the_turn_of_a_failure_is_of_the_epoch_after_it() -> None:
    durability = connected()
    before = durability.epoch
    durability.flush_failed(3)
    within, sending = durability.epoch, durability.sending_epoch
    durability.settled(3)
    assert len({before, within, sending}) == 3
    assert durability.epoch == durability.sending_epoch == sending


def test_layer_that_keeps_unflushed_changes_needs_no_epoch_within_a_turn() -> None:
    durability = connected()
    durability.keeps_unflushed = True
    durability.flush_failed(3)
    assert durability.sending_epoch == durability.epoch


def test_same_instance_has_lost_nothing_another_or_none_may_have() -> None:
    durability = connected("a")
    epoch = durability.epoch
    assert not durability.connected("a", 9)
    assert durability.epoch == epoch
    assert durability.connected("b", 9)
    durability = connected("")
    assert durability.connected("", 9)


def test_layer_that_keeps_unflushed_changes_has_no_loss_to_report() -> None:
    durability = connected()
    durability.keeps_unflushed = True
    epoch = durability.epoch
    assert not durability.failed(5)
    assert not durability.unreported
    assert durability.epoch != epoch


def test_disk_that_is_only_read_has_nothing_to_lose() -> None:
    durability = connected()
    durability.nothing_before()
    assert not durability.connected("", BEFORE)


def test_mark_of_an_instance_fits_56_bits_and_no_instance_has_none() -> None:
    marks = {instance_mark(f"{number}") for number in range(100)}
    assert len(marks) == 100
    assert all(0 < mark < 1 << 56 for mark in marks)
    assert instance_mark("") == 0


def test_mark_of_another_instance_means_a_loss_and_no_mark_means_nothing() -> None:
    durability = connected("a")
    assert not durability.is_lost(instance_mark("a"))
    assert durability.is_lost(instance_mark("b"))
    assert not durability.is_lost(0)


# A process that follows another one.


def fresh(description: str = "", flags: TransmissionFlags = DEFAULT_FLAGS) -> World:
    """A world whose past is unknown."""
    world = World(description=description, flags=flags)
    forget()
    world.link = Link(ClientOptions(), turn())
    turn().add_stage(world.link)
    world.up()
    return world


def test_first_flush_fails_when_the_server_went_away_before_it() -> None:
    """A process before this one was killed; what it had acknowledged died with the server."""
    world = fresh()
    world.down()
    world.up()
    assert world.ask(FLUSH).error == EIO
    assert world.ask(FLUSH).error == -1


def test_first_flush_of_a_server_that_stayed_succeeds() -> None:
    world = fresh()
    flush = world.ask(FLUSH)
    world.channels[0].answer_all()
    assert flush.error == 0
    world.down()
    world.up()
    assert world.ask(FLUSH).error == -1


def test_first_flush_after_a_reconnect_to_the_same_instance_succeeds() -> None:
    world = fresh("instance=a")
    world.down()
    world.up()
    assert world.ask(FLUSH).error == -1


def test_read_only_disk_never_fails_a_flush() -> None:
    world = fresh(flags=DEFAULT_FLAGS | TransmissionFlags.READ_ONLY)
    world.down()
    world.up()
    assert world.ask(FLUSH).error == -1


def test_guest_that_has_not_run_before_loses_nothing() -> None:
    world = fresh()
    world.down()
    world.up()
    world.link.durability.nothing_before()
    assert world.ask(FLUSH).error == -1


def test_guest_that_comes_from_another_process_may_have_left_something_unflushed() -> None:
    world = World()
    world.link.expect_unflushed()
    world.down()
    world.up()
    assert world.ask(FLUSH).error == EIO


# A server that fails to flush has dropped what it had.


def ended(world: World, request: Request) -> bool:
    """`request` was finished. (Its `error` alone does not say so while it is sent again.)"""
    return any(request is each for each in world.finished)


@pytest.mark.parametrize("op", [WRITE, WRITE_ZEROES])
def test_change_in_flight_when_a_flush_fails_is_sent_again_when_it_is_answered(op: int) -> None:
    """The server may have executed it before, and dropped it."""
    world = World()
    (channel,) = world.channels
    change = world.ask(op, 3)
    flush = world.ask(FLUSH)
    channel.answer(channel.pending[1], EIO)
    assert flush.error == EIO
    channel.answer(channel.pending[0])
    assert not ended(world, change)
    assert world.sent == [(op, 3)]
    channel.answer_all()
    assert (ended(world, change), change.error) == (True, 0)
    later = world.ask(FLUSH)
    channel.answer_all()
    assert later.error == 0


def test_change_in_flight_through_two_failures_is_sent_again_once() -> None:
    world = World()
    (channel,) = world.channels
    write = world.ask(WRITE, 3)
    for _ in range(2):
        world.ask(FLUSH)
        channel.answer(channel.pending[1], EIO)
    channel.answer(channel.pending[0])
    assert not ended(world, write)
    channel.answer(channel.pending[0])
    assert (write.error, world.sent) == (0, [])


def test_change_in_flight_on_another_connection_is_sent_again_too() -> None:
    world = World()
    world.down()
    world.up(count=2)
    write = world.ask(WRITE, 3)
    world.ask(FLUSH)
    wrote, flushed = sorted(
        (channel for channel in world.channels), key=lambda channel: channel.pending[0].op
    )
    flushed.answer(flushed.pending[0], EIO)
    wrote.answer(wrote.pending[0])
    assert not ended(world, write)
    assert world.sent == [(WRITE, 3)]


def test_change_that_fails_when_it_is_answered_is_not_sent_again() -> None:
    world = World()
    (channel,) = world.channels
    write = world.ask(WRITE, 3)
    world.ask(FLUSH)
    channel.answer(channel.pending[1], EIO)
    channel.answer(channel.pending[0], errno.ENOSPC)
    assert (write.error, world.sent) == (errno.ENOSPC, [])


def test_change_in_flight_when_a_flush_fails_is_sent_again_once_if_the_connection_is_lost() -> None:
    world = World()
    write = world.ask(WRITE, 3)
    world.ask(FLUSH)
    world.channels[0].answer(world.channels[0].pending[1], EIO)
    world.down()
    world.up()
    assert world.sent == [(WRITE, 3)]
    world.channels[0].answer_all()
    assert (write.error, world.sent) == (0, [])


def test_write_answered_while_a_flush_was_in_flight_that_fails_makes_the_next_one_fail() -> None:
    """The guest was told of what was complete before it submitted that flush, not of this."""
    world = World()
    (channel,) = world.channels
    world.ask(WRITE, 3)
    first = world.ask(FLUSH)
    channel.answer(channel.pending[0])
    channel.answer(channel.pending[0], EIO)
    assert first.error == EIO
    assert world.ask(FLUSH).error == EIO
    third = world.ask(FLUSH)
    channel.answer_all()
    assert third.error == 0


def test_flush_that_was_submitted_before_another_one_failed_fails_too() -> None:
    world = World()
    (channel,) = world.channels
    world.ask(WRITE, 3)
    channel.answer_all()
    first, second = world.ask(FLUSH), world.ask(FLUSH)
    assert world.sent == [(FLUSH, 0)]  # One at a time.
    channel.answer(channel.pending[0], EIO)
    assert (first.error, second.error) == (EIO, EIO)
    third = world.ask(FLUSH)
    channel.answer_all()
    assert third.error == 0


def test_flush_waits_for_the_one_in_flight_on_another_connection() -> None:
    """Its success, read first, must not hide that the other one failed and dropped everything."""
    world = World()
    world.down()
    world.up(count=2)
    world.ask(WRITE, 3)
    for channel in world.channels:
        channel.answer_all()
    timed = world.ask(FLUSH, flags=INTERNAL)
    guests = world.ask(FLUSH)
    assert world.sent == [(FLUSH, 0)]
    for channel in world.channels:
        while channel.pending:
            channel.answer(channel.pending[0], EIO)
    assert (timed.error, guests.error) == (EIO, EIO)


def test_flushes_that_wait_share_the_next_command() -> None:
    world = World()
    (channel,) = world.channels
    flushes = [world.ask(FLUSH) for _ in range(100)]
    assert world.sent == [(FLUSH, 0)]
    channel.answer(channel.pending[0])
    assert [flush.error for flush in flushes] == [0] + [-1] * 99
    assert world.sent == [(FLUSH, 0)]
    channel.answer(channel.pending[0])
    assert [flush.error for flush in flushes] == [0] * 100
    assert world.link.in_flight == 0


def test_flush_that_the_guest_did_not_send_tells_it_nothing() -> None:
    world = World()
    (channel,) = world.channels
    world.ask(WRITE, 3)
    channel.answer_all()
    world.ask(FLUSH, flags=INTERNAL)
    channel.answer(channel.pending[0], EIO)
    unasked = world.ask(FLUSH, flags=INTERNAL)
    channel.answer_all()
    assert unasked.error == 0  # It has no loss to hear of, and flushes what there is.
    assert world.ask(FLUSH).error == EIO
    assert world.ask(FLUSH).error == -1


def test_durable_write_whose_server_dropped_it_for_anothers_flush_is_written_again() -> None:
    """Write cache off, server without FUA: each write is WRITE and FLUSH."""
    world = World(flags=NO_FUA)
    (channel,) = world.channels
    first = world.ask(WRITE, 1, flags=FUA)
    second = world.ask(WRITE, 2, flags=FUA)
    channel.answer(channel.pending[0])
    channel.answer(channel.pending[0])
    assert world.sent == [(FLUSH, 0)]
    channel.answer(channel.pending[0], EIO)
    assert first.error == EIO
    channel.answer(channel.pending[0])
    assert not ended(world, second)
    assert world.sent == [(WRITE, 2)]
    channel.answer_all()
    assert (second.error, world.sent) == (0, [])
    assert world.log == [(WRITE, EIO), (WRITE, 0)]


@pytest.mark.parametrize("op", [DISCARD, WRITE_ZEROES])
def test_durable_change_is_done_again_after_anothers_failed_flush(op: int) -> None:
    world = World(flags=NO_FUA)
    (channel,) = world.channels
    change = world.ask(op, 1, flags=FUA)
    channel.answer(channel.pending[0])
    flush = world.ask(FLUSH)
    channel.answer(channel.pending[0], EIO)  # The one that stands for FUA.
    assert (change.error, flush.error) == (EIO, EIO if op == WRITE_ZEROES else -1)
    world.ask(op, 1, flags=FUA)
    assert (op, 1) in world.sent


def test_write_of_several_parts_is_sent_again_whole_when_a_flush_failed_in_between() -> None:
    world = World(max_payload_bytes=BLOCK)
    (channel,) = world.channels
    write = world.ask(WRITE, 0, count=2)
    channel.answer(channel.pending[0])
    world.ask(FLUSH)
    channel.answer(channel.pending[1], EIO)
    assert world.sent == [(WRITE, 1)]
    channel.answer(channel.pending[0])
    channel.answer(channel.pending[0])
    assert not ended(world, write)
    assert world.sent == [(WRITE, 0), (WRITE, 1)]
    channel.answer_all()
    assert (ended(world, write), write.error) == (True, 0)


def test_write_of_sectors_in_large_blocks_is_sent_again_when_a_flush_failed_in_between() -> None:
    world = World(min_block_bytes=4096)
    (channel,) = world.channels
    write = world.ask(WRITE, 3)
    world.ask(FLUSH)
    channel.answer(channel.pending[0])  # The block is read, its write goes out.
    channel.answer(channel.pending[0], EIO)
    channel.answer(channel.pending[0])
    assert not ended(world, write)
    channel.answer_all()
    assert (write.error, world.sent) == (0, [])


@pytest.mark.parametrize("min_block_bytes", [1, 4096])
def test_epoch_shows_whether_a_flush_failed_between_changes_of_one_guests_request(
    min_block_bytes: int,
) -> None:
    world = World(min_block_bytes=min_block_bytes)
    (channel,) = world.channels
    epochs = []
    for error in (0, EIO, 0):
        world.ask(WRITE_ZEROES, 8, count=8)
        channel.answer_all()
        epochs.append(world.link.durability.epoch)
        world.ask(FLUSH)
        channel.answer(channel.pending[0], error)
    assert epochs[0] == epochs[1] < epochs[2]


def test_change_with_fua_that_fails_ends_the_epoch_like_a_flush() -> None:
    """The server's fsync failed for it, and dropped what others had only been acknowledged."""
    world = World()
    (channel,) = world.channels
    world.ask(WRITE, 1)
    channel.answer_all()
    in_flight = world.ask(WRITE, 2)
    failing = world.ask(WRITE, 3, flags=FUA)
    flush = world.ask(FLUSH)
    channel.answer(channel.pending[1], EIO)
    assert (failing.error, flush.error) == (EIO, EIO)
    channel.answer(channel.pending[0])
    assert not ended(world, in_flight)
    channel.answer_all()
    assert (ended(world, in_flight), in_flight.error) == (True, 0)


def test_change_with_fua_that_fails_makes_the_next_flush_fail() -> None:
    world = World()
    (channel,) = world.channels
    world.ask(WRITE, 1)
    channel.answer_all()
    world.ask(WRITE, 3, flags=FUA)
    channel.answer(channel.pending[0], EIO)
    assert world.ask(FLUSH).error == EIO
    assert world.ask(FLUSH).error == -1


@pytest.mark.parametrize("error", [errno.EINVAL, errno.EPERM])
def test_change_with_fua_that_is_refused_has_cost_nothing(error: int) -> None:
    world = World()
    (channel,) = world.channels
    world.ask(WRITE, 1)
    channel.answer_all()
    world.ask(WRITE, 3, flags=FUA)
    channel.answer(channel.pending[0], error)
    assert world.ask(FLUSH).error == -1


def test_failed_flush_is_told_although_the_connection_is_lost_before_the_next() -> None:
    """Our plugin proves its instance; it is the same one, and what it dropped is gone."""
    world = World(description="instance=a")
    world.ask(WRITE, 1)
    world.channels[0].answer_all()
    world.ask(WRITE, 3, flags=FUA)
    flush = world.ask(FLUSH)
    world.channels[0].answer(world.channels[0].pending[0], EIO)
    assert flush.error == EIO
    world.down()
    world.up()
    assert world.ask(FLUSH).error == -1
    assert world.link.in_flight == 1


def test_flush_that_we_fail_ourselves_ends_no_epoch() -> None:
    """The server has not failed: nothing was dropped, and the same instance proves it."""
    world = World(ClientOptions(reconnect_timeout_s=1), description="instance=a")
    world.ask(WRITE, 1)
    world.channels[0].answer_all()
    flush, waits = world.ask(FLUSH), world.ask(FLUSH)
    world.down()
    world.tick(2)
    assert (flush.error, waits.error) == (EIO, EIO)
    world.up()
    later = world.ask(FLUSH)
    world.channels[0].answer_all()
    assert later.error == 0


def test_layer_that_keeps_unflushed_changes_hears_only_of_the_failure() -> None:
    world = World()
    world.link.keeps_unflushed = True
    (channel,) = world.channels
    write = world.ask(WRITE, 1)
    flush = world.ask(FLUSH)
    channel.answer(channel.pending[1], EIO)
    channel.answer(channel.pending[0])
    assert (flush.error, write.error, world.sent) == (EIO, 0, [])
    assert world.ask(FLUSH).error == -1


def test_closed_link_fails_the_flushes_that_wait() -> None:
    world = World()
    flushes = [world.ask(FLUSH), world.ask(FLUSH)]
    world.closed(world.pending)
    assert [flush.error for flush in flushes] == [EIO, EIO]
    assert world.ask(FLUSH).error == EIO
    assert world.link.in_flight == 0


def test_flush_submitted_by_one_that_is_refused_is_sent() -> None:
    world = World()
    world.ask(WRITE, 1)
    world.channels[0].answer_all()
    world.down()
    world.up()
    again: list[Request] = []
    refused = Request(FLUSH, 0, 0, [], lambda _: again.append(world.submit(FLUSH)))
    submit(world.link, refused)
    assert [flush.error for flush in again] == [-1]
    assert world.sent == [(FLUSH, 0)]


# Several things in one turn, before anybody is told of any of them.


def test_change_answered_in_the_turn_of_a_failed_flush_makes_the_next_one_fail() -> None:
    """Perhaps it was executed, and dropped, before: only the replies are in order."""
    world = World()
    (channel,) = world.channels
    write, flush = world.ask(WRITE, 3), world.ask(FLUSH)
    channel.reply(channel.pending[1], EIO)
    channel.reply(channel.pending[0])
    deliver()
    assert (flush.error, write.error) == (EIO, 0)
    assert world.ask(FLUSH).error == EIO
    third = world.ask(FLUSH)
    channel.answer_all()
    assert third.error == 0


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("op", [WRITE, DISCARD, WRITE_ZEROES])
def test_durable_change_answered_in_the_turn_of_a_failed_flush_is_done_again(
    op: int, count: int
) -> None:
    """A failure is told of once: the change's own sync, after it, succeeds without the data."""
    world = World()
    world.down()
    world.up(count=count)
    change, flush = world.ask(op, 3, flags=FUA), world.ask(FLUSH)
    flushed = next(channel for channel in world.channels if channel.pending[-1].op == FLUSH)
    flushed.reply(flushed.pending[-1], EIO)
    changed = next(channel for channel in world.channels if channel.pending)
    changed.reply(changed.pending[0])
    deliver()
    assert flush.error == EIO
    assert not ended(world, change)
    assert world.sent == [(op, 3)]
    while world.sent:
        for channel in world.channels:
            channel.answer_all()
    assert (ended(world, change), change.error) == (True, 0)


def test_durable_change_answered_in_the_turn_of_anothers_failure_is_done_again() -> None:
    world = World()
    (channel,) = world.channels
    failed, other = world.ask(WRITE, 3, flags=FUA), world.ask(WRITE, 5, flags=FUA)
    channel.reply(channel.pending[0], EIO)
    channel.reply(channel.pending[0])
    deliver()
    assert failed.error == EIO
    assert not ended(world, other)
    channel.answer_all()
    assert (ended(world, other), other.error) == (True, 0)


@pytest.mark.parametrize("op", [WRITE, DISCARD, WRITE_ZEROES])
@pytest.mark.parametrize("together", [False, True])
def test_flush_that_succeeds_beside_a_durable_change_that_fails_is_not_believed(
    op: int, together: bool
) -> None:
    """The server executed the change first: it dropped what it had, and said so. That answer may be
    read last."""
    world = World()
    (channel,) = world.channels
    world.ask(WRITE, 1)
    channel.answer_all()
    change, flush = world.ask(op, 3, flags=FUA), world.ask(FLUSH)
    channel.reply(channel.pending[1])
    if not together:
        deliver()
        assert not ended(world, flush)
        assert world.link.in_flight == 2
    channel.reply(channel.pending[0], EIO)
    deliver()
    assert (change.error, flush.error) == (EIO, EIO)
    assert world.ask(FLUSH).error == -1
    channel.answer_all()


def test_flush_of_ours_beside_a_durable_change_that_fails_leaves_the_loss_to_be_told() -> None:
    """It succeeds, as if it had been sent after the loss, which is told all the same."""
    world = World()
    (channel,) = world.channels
    world.ask(WRITE, 1)
    channel.answer_all()
    world.ask(WRITE, 3, flags=FUA)
    ours = world.ask(FLUSH, flags=INTERNAL)
    channel.answer(channel.pending[1])
    channel.answer(channel.pending[0], EIO)
    assert (ended(world, ours), ours.error) == (True, 0)
    assert world.link.durability.unreported
    assert world.ask(FLUSH).error == EIO
    assert not world.link.durability.unreported
    assert world.ask(FLUSH).error == -1
    channel.answer_all()


def test_flush_that_succeeds_beside_a_durable_change_that_succeeds_is_told_of_then() -> None:
    world = World()
    (channel,) = world.channels
    change, flush = world.ask(WRITE, 3, flags=FUA), world.ask(FLUSH)
    channel.answer(channel.pending[1])
    later = world.ask(WRITE, 4, flags=FUA)  # It was sent after the server had flushed.
    assert not ended(world, flush)
    channel.answer(channel.pending[0])
    assert (change.error, ended(world, flush), flush.error) == (0, True, 0)
    assert not ended(world, later)
    channel.answer_all()


def test_flush_in_doubt_is_asked_again_when_the_connection_is_lost() -> None:
    """The change may have failed."""
    world = World()
    (channel,) = world.channels
    world.ask(WRITE, 3, flags=FUA)
    flush = world.ask(FLUSH)
    channel.answer(channel.pending[1])
    world.down()
    assert not ended(world, flush)
    world.up()
    assert [op for op, _ in world.sent].count(FLUSH) == 1
    world.channels[0].answer_all()
    assert ended(world, flush)


@pytest.mark.parametrize("in_doubt", [False, True])
@pytest.mark.parametrize("lost", [False, True])
def test_durable_change_that_has_ended_is_kept_by_no_flush(in_doubt: bool, lost: bool) -> None:
    """It knows its chain: the guest's memory could not be let go of."""
    world = World()
    change = world.ask(WRITE, 3, flags=FUA)
    if in_doubt:
        world.ask(FLUSH)
        world.channels[0].answer(world.pending[1])
    if lost:
        world.down()
        world.up()
    world.channels[0].answer_all()
    ended, kept = [each.error for each in world.finished], ref(change)
    del change
    world.finished.clear()
    gc.collect()

    assert (set(ended), kept()) == ({0}, None)


def test_flush_in_doubt_fails_with_everything_when_the_server_is_given_up() -> None:
    world = World()
    (channel,) = world.channels
    world.ask(WRITE, 3, flags=FUA)
    flush = world.ask(FLUSH)
    channel.answer(channel.pending[1])
    world.down()
    world.link.fail_pending(world.now, [], EIO)
    deliver()
    assert (ended(world, flush), flush.error) == (True, EIO)
    assert world.link.in_flight == 0


def test_durable_change_that_is_sent_again_on_a_new_connection_is_sent_once_there() -> None:
    """The epoch in which it counts is the one in which it was sent last."""
    world = World()
    world.ask(WRITE, 1)
    world.channels[0].answer_all()
    change = world.ask(WRITE, 3, flags=FUA)
    world.down()
    waiting = world.ask(WRITE, 4, flags=FUA)
    world.up()
    world.channels[0].answer_all()
    assert (change.error, waiting.error, world.link.resent_total) == (0, 0, 1)


def test_part_answered_in_the_turn_of_a_failed_flush_belongs_to_no_epoch_that_lasts() -> None:
    """A layer that splits one guest request into several changes has to do it again."""
    world = World()
    (channel,) = world.channels
    epochs: list[int] = []

    def note(part: Request) -> None:
        epochs.append(world.link.durability.epoch)

    before = world.link.durability.epoch
    submit(world.link, Request(WRITE, 0, BLOCK, [memoryview(bytearray(BLOCK))], note))
    world.ask(FLUSH)
    channel.reply(channel.pending[1], EIO)
    channel.reply(channel.pending[0])
    deliver()
    assert len(epochs) == 1
    assert world.link.durability.epoch not in (before, *epochs)


def test_write_in_parts_whose_last_is_answered_in_the_turn_of_a_failed_flush_is_done_again() -> (
    None
):
    world = World(max_payload_bytes=BLOCK)
    (channel,) = world.channels
    write = world.ask(WRITE, 0, count=2)
    world.ask(FLUSH)
    channel.answer(channel.pending[0])
    channel.reply(channel.pending[1], EIO)
    channel.reply(channel.pending[0])
    deliver()
    assert not ended(world, write)
    assert world.sent == [(WRITE, 0), (WRITE, 1)]
    channel.answer_all()
    assert (ended(world, write), write.error, world.sent) == (True, 0, [])


@pytest.mark.parametrize("when", ["before anybody is told", "when the first is told"])
def test_flush_submitted_in_the_turn_in_which_a_write_is_answered_does_not_tell_of_it(
    when: str,
) -> None:
    """The guest submitted it without knowing that the write was complete."""
    world = World()
    (channel,) = world.channels
    flushes: list[Request] = []

    def told(request: Request) -> None:
        if when == "when the first is told":
            flushes.append(world.submit(FLUSH))

    submit(world.link, Request(WRITE, 0, BLOCK, [memoryview(bytearray(BLOCK))], told))
    channel.reply(channel.pending[0])
    if when == "before anybody is told":
        flushes.append(world.submit(FLUSH))
    deliver()
    channel.answer(channel.pending[0], EIO)
    assert [flush.error for flush in flushes] == [EIO]
    assert world.ask(FLUSH).error == EIO
    assert world.ask(FLUSH).error == -1


def test_flush_submitted_in_the_turn_after_a_write_was_answered_tells_of_it() -> None:
    world = World()
    (channel,) = world.channels
    world.ask(WRITE, 3)
    channel.answer_all()
    flush = world.ask(FLUSH)
    channel.answer(channel.pending[0], EIO)
    assert flush.error == EIO
    assert world.ask(FLUSH).error == -1


def test_flush_submitted_before_a_write_was_shown_and_taken_after_that_tells_nothing() -> None:
    """The rings were looked at before the turn in which the write was answered ended; the guest
    submitted the flush in between."""
    world = World()
    (channel,) = world.channels
    write = world.submit(WRITE, 3)
    deliver()
    channel.reply(channel.pending[0])
    turn().end()
    assert ended(world, write)
    flush = world.submit(FLUSH)
    turn().looked()
    deliver()
    channel.answer(channel.pending[0], EIO)
    assert flush.error == EIO
    assert world.ask(FLUSH).error == EIO
    assert world.ask(FLUSH).error == -1


def test_flushes_submitted_in_one_turn_after_a_loss_all_fail() -> None:
    """Those of a guest that runs on after a pause: it had submitted them at different times, and
    the first failure may be that of one which was submitted before the write was complete."""
    world = World()
    world.ask(WRITE, 3)
    world.channels[0].answer_all()
    world.down()
    world.up()
    flushes = [world.submit(FLUSH), world.submit(FLUSH)]
    deliver()
    assert [flush.error for flush in flushes] == [EIO, EIO]
    assert world.ask(FLUSH).error == -1


def test_write_answered_in_the_turn_of_the_loss_is_complete_and_the_next_flush_fails() -> None:
    world = World()
    (channel,) = world.channels
    write = world.ask(WRITE, 3)
    channel.reply(channel.pending[0])
    world.lose()
    deliver()
    assert [each for each in world.finished if each is write] == [write]
    assert write.error == 0
    world.up()
    assert world.sent == []
    assert world.ask(FLUSH).error == EIO


@pytest.mark.parametrize("error", [0, EIO])
def test_flush_answered_in_the_turn_of_the_loss_keeps_its_answer(error: int) -> None:
    world = World(description="instance=a")
    (channel,) = world.channels
    world.ask(WRITE, 3)
    channel.answer_all()
    flush = world.ask(FLUSH)
    channel.reply(channel.pending[0], error)
    world.lose()
    deliver()
    assert (ended(world, flush), flush.error) == (True, error)
    world.up(export(description="instance=b"))
    assert world.ask(FLUSH).error == -1  # Durable, or told of.


def test_failed_flush_and_the_loss_in_one_turn_make_the_flush_fail_that_came_later() -> None:
    """What was answered while that flush was in flight is not told of by it."""
    world = World(description="instance=a")
    (channel,) = world.channels
    world.ask(FLUSH)
    world.ask(WRITE, 3)
    channel.answer(channel.pending[1])
    channel.reply(channel.pending[0], EIO)
    world.lose()
    deliver()
    world.up()
    assert world.ask(FLUSH).error == EIO


@pytest.mark.parametrize("error", [0, EIO])
def test_answer_to_a_flush_loss_and_new_connection_in_one_turn_leave_one_flush_in_flight(
    error: int,
) -> None:
    world = World()
    (channel,) = world.channels
    world.ask(WRITE, 3)
    channel.answer_all()
    world.ask(FLUSH)
    channel.reply(channel.pending[0], error)
    world.lose()
    world.connect()
    world.submit(FLUSH)
    deliver()
    world.ask(FLUSH)
    world.ask(FLUSH)
    assert len(world.sent) == 1
    (channel,) = world.channels
    while channel.pending:
        assert len(channel.pending) == 1
        channel.answer(channel.pending[0])
    assert world.link.in_flight == 0
    assert len({id(each) for each in world.finished}) == len(world.finished) == 6


def test_change_to_be_sent_again_that_is_answered_in_the_turn_of_the_loss_is_sent_again() -> None:
    """It was in flight when a flush failed; its answer says nothing about what was dropped."""
    world = World()
    (channel,) = world.channels
    write = world.ask(WRITE, 3)
    world.ask(FLUSH)
    channel.answer(channel.pending[1], EIO)
    channel.reply(channel.pending[0])
    world.lose()
    deliver()
    assert not ended(world, write)
    world.up()
    assert world.sent == [(WRITE, 3)]
    world.channels[0].answer_all()
    assert (ended(world, write), write.error) == (True, 0)


def test_write_abandoned_between_its_answer_and_being_told_of_it_still_counts() -> None:
    world = World()
    (channel,) = world.channels
    write = world.ask(WRITE, 3)
    channel.reply(channel.pending[0])
    ends: list[Request] = []
    write.abandon(ends.append, memoryview(bytearray(BLOCK)))
    world.link.abandon()
    deliver()
    assert (ends, ended(world, write), world.link.in_flight) == ([write], False, 0)
    world.down()
    world.up()
    assert world.sent == []
    assert world.ask(FLUSH).error == EIO


def test_flush_that_is_submitted_by_a_task_while_the_loop_sleeps_wakes_it() -> None:
    """It is sent by a stage, with all that the turn brings."""
    world = World()
    world.submit(FLUSH)
    assert turn().pending
    deliver()
    assert world.sent == [(FLUSH, 0)]


def test_flush_that_is_executed_again_reports_no_loss() -> None:
    """The guest may have sent it before a write that was complete when it paused."""
    world = World()
    world.ask(WRITE, 3)
    world.channels[0].answer_all()
    again = world.ask(FLUSH, flags=REPEATED)
    world.channels[0].answer(world.channels[0].pending[0], EIO)
    assert again.error == EIO
    assert world.ask(FLUSH).error == EIO
    assert world.ask(FLUSH).error == -1


def test_flush_that_is_executed_again_after_a_loss_fails_and_so_does_the_next() -> None:
    world = World()
    world.ask(WRITE, 3)
    world.channels[0].answer_all()
    world.down()
    world.up()
    assert world.ask(FLUSH, flags=REPEATED).error == EIO
    assert world.ask(FLUSH).error == EIO
    assert world.ask(FLUSH).error == -1
