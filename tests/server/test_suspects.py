"""Which command makes the server hang up."""

from __future__ import annotations

import gc
from weakref import ref

from bridge.datapath.request import WRITE, Request
from bridge.server.suspects import Suspects


def _command() -> Request:
    return Request(WRITE, 0, 512, [memoryview(bytes(512))], lambda _: None)


def _another_at(address: int) -> Request:
    """A new command in the memory of one that is gone."""
    others = []
    for _ in range(10_000):
        others.append(_command())
        if id(others[-1]) == address:
            return others.pop()
    raise AssertionError("that memory was not used again")


def test_command_in_the_memory_of_a_former_suspect_is_another_one() -> None:
    suspects = Suspects()
    first = _command()
    address = id(first)
    assert not suspects.hung_up(first, 0, answered=True)
    assert not suspects.hung_up(first, 0, answered=True)
    del first  # it was answered after all
    assert not suspects.hung_up(_another_at(address), 0, answered=True)


def test_same_command_is_put_on_trial_after_three_losses() -> None:
    suspects = Suspects()
    command = _command()
    losses = [suspects.hung_up(command, 0, answered=True) for _ in range(3)]
    assert losses == [False, False, True]


def test_what_was_answered_before_the_first_loss_proves_nothing() -> None:
    suspects = Suspects()
    command = _command()
    suspects.hung_up(command, 0, answered=True)
    suspects.hung_up(command, 0, answered=False)
    assert not suspects.proven
    suspects.hung_up(command, 0, answered=True)
    assert suspects.proven
    suspects.clear()
    suspects.hung_up(command, 0, answered=True)
    assert not suspects.proven


def test_suspect_keeps_nothing_of_the_guest() -> None:
    suspects = Suspects()
    command = _command()
    suspects.hung_up(command, 0, answered=True)
    kept = ref(command)
    del command
    gc.collect()
    assert kept() is None


def test_server_that_hangs_up_once_on_a_command_alone_may_have_been_killed_just_then() -> None:
    suspects = Suspects()
    command, other = _command(), _command()
    assert not suspects.hung_up_alone(command, 0)
    assert not suspects.hung_up_alone(other, 1)
    assert not suspects.hung_up_alone(command, 2)
    assert suspects.hung_up_alone(command, 3)


def test_trials_between_which_a_connection_ended_otherwise_are_not_in_a_row() -> None:
    for ends in (Suspects.clear, Suspects.probe_failed):
        suspects = Suspects()
        command = _command()
        assert not suspects.hung_up_alone(command, 0)
        ends(suspects)
        assert not suspects.hung_up_alone(command, 1)
        assert suspects.hung_up_alone(command, 2)


def test_after_a_verdict_one_trial_is_enough_for_a_minute() -> None:
    suspects = Suspects()
    commands = [_command() for _ in range(4)]
    assert not suspects.hung_up_alone(commands[0], 0)
    assert suspects.hung_up_alone(commands[0], 0)
    assert suspects.hung_up_alone(commands[1], 59)
    assert suspects.hung_up_alone(commands[2], 118)
    assert not suspects.hung_up_alone(commands[3], 179)
