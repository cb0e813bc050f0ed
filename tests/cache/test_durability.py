"""What the cache counts of the server's promises: epochs, and what an answer is worth."""

from __future__ import annotations

from bridge.datapath.durability import ReplayingDurability


class _Connections:
    """As many as there have been."""

    generation = 1


def kept() -> tuple[ReplayingDurability, _Connections]:
    """With all of the first epoch flushed."""
    connections = _Connections()
    durability = ReplayingDurability(connections)
    assert durability.flushed(durability.answered, durability.epoch)
    assert durability.all_flushed
    return durability, connections


def reconnect(durability: ReplayingDurability, connections: _Connections) -> None:
    connections.generation += 1
    durability.reconnected()


def test_what_was_before_the_process_is_not_flushed() -> None:
    assert not ReplayingDurability(_Connections()).all_flushed


def test_acknowledged_change_is_not_flushed_until_a_flush_that_was_sent_later() -> None:
    durability, _ = kept()
    durability.acknowledged()
    sent = durability.answered
    durability.acknowledged()
    assert durability.flushed(sent, durability.epoch)
    assert not durability.all_flushed
    assert durability.flushed(durability.answered, durability.epoch)
    assert durability.all_flushed


def test_epoch_ends_with_each_failure_and_each_reconnect_and_never_comes_again() -> None:
    durability, connections = kept()
    epochs = [durability.epoch]
    for _ in range(3):
        durability.failed()
        epochs.append(durability.epoch)
        reconnect(durability, connections)
        epochs.append(durability.epoch)
    assert len(set(epochs)) == len(epochs)


def test_epoch_has_ended_before_the_client_reports_that_the_connection_was_replaced() -> None:
    durability, connections = kept()
    durability.acknowledged()
    epoch, answered = durability.epoch, durability.answered
    connections.generation += 1
    assert durability.epoch != epoch
    assert not durability.flushed(answered, epoch)


def test_flush_of_an_epoch_that_has_ended_vouches_for_nothing() -> None:
    durability, connections = kept()
    epoch, answered = durability.epoch, durability.answered
    durability.failed()
    assert not durability.flushed(durability.answered, epoch)
    epoch = durability.epoch
    reconnect(durability, connections)
    assert not durability.flushed(durability.answered, epoch)
    assert durability.answered > answered
    assert not durability.all_flushed


def test_what_the_server_has_of_an_epoch_that_has_ended_is_not_flushed() -> None:
    durability, connections = kept()
    durability.failed()
    assert not durability.all_flushed
    durability, connections = kept()
    reconnect(durability, connections)
    assert not durability.all_flushed


def test_change_that_was_sent_again_on_a_new_connection_was_done_there() -> None:
    durability, connections = kept()
    sent = durability.epoch
    durability.failed()
    reconnect(durability, connections)
    assert durability.done_in(sent_in=sent, generation=connections.generation) == durability.epoch


def test_change_that_the_lost_connection_answered_was_not_done_in_the_new_epoch() -> None:
    durability, connections = kept()
    sent, generation = durability.epoch, connections.generation
    reconnect(durability, connections)
    assert durability.done_in(sent_in=sent, generation=generation) != durability.epoch
    durability.failed()
    reconnect(durability, connections)
    assert durability.done_in(sent_in=sent, generation=generation) != durability.epoch


def test_change_that_was_sent_again_before_a_flush_failed_was_done_in_the_epoch_before() -> None:
    durability, connections = kept()
    sent = durability.epoch
    reconnect(durability, connections)
    durability.failed()
    assert durability.done_in(sent_in=sent, generation=connections.generation) != durability.epoch


def test_change_that_was_sent_after_a_failure_was_done_after_it() -> None:
    durability, connections = kept()
    reconnect(durability, connections)
    durability.failed()
    sent = durability.epoch
    assert durability.done_in(sent_in=sent, generation=connections.generation) == durability.epoch


def test_new_connection_not_yet_reported_has_done_nothing_that_failed_meanwhile() -> None:
    durability, connections = kept()
    sent = durability.epoch
    durability.failed()
    connections.generation += 1
    assert durability.done_in(sent_in=sent, generation=connections.generation) != durability.epoch
