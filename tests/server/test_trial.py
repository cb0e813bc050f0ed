"""A command that is sent alone, and who else is told of its end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bridge.datapath.request import READ, Request
from bridge.server.channels import Channels
from bridge.server.trial import Trial
from tests.turns import turn


class TakesAll:
    def send(self, request: Request) -> None: ...


def test_observer_of_the_end_of_a_command_on_trial_does_not_show_that_it_was_abandoned() -> None:
    """Its guest pauses another ring meanwhile."""
    ended: list[str] = []
    channels = Channels(turn())
    one: Any = TakesAll()
    channels.present = [one]
    nothing: Any = None
    trial = Trial(channels, nothing, nothing)
    command = Request(READ, 0, 512, [memoryview(bytearray(512))], lambda _: ended.append("done"))
    trial._try(command)

    def observed(then: Callable[[Request], None]) -> Callable[[Request], None]:
        def seen(request: Request) -> None:
            ended.append("seen")
            request.done = then
            then(request)

        return seen

    command.done = observed(command.done)
    assert trial.take_abandoned() == []
    command.done(command)
    assert ended == ["seen", "done"]
