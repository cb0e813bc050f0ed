"""Commands without an answer, each sent alone: on which does the server hang up? See `suspects`."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from bridge.datapath.request import FLUSH, READ, Request
from bridge.server.channels import Channels, Phase, without_abandoned
from bridge.server.commands import Commands
from bridge.server.flushes import Flushes
from bridge.server.suspects import Suspects
from bridge.units import SECTOR_BYTES


class Trial:
    """What is tried on the present connection, and what is known from the ones before.

    While it lasts nothing else is sent (`Channels.on_trial`).
    """

    def __init__(self, channels: Channels, commands: Commands, flushes: Flushes) -> None:
        self._channels = channels
        self._commands = commands
        self._flushes = flushes
        self._suspects = Suspects()
        self._is_due = False
        """The next connection begins with a trial."""
        self._left: deque[Request] = deque()
        """Commands that are still to be sent alone."""
        self._tried: Request | None = None
        """The one that is being tried, or the probe before all of them."""
        self._tried_done: Callable[[Request], None] = _ignore

    @property
    def waiting(self) -> int:
        """How many commands are still to be tried."""
        return len(self._left)

    def is_due(self) -> bool:
        """The connection that is there now begins with a trial; asked once."""
        due, self._is_due = self._is_due, False
        return due

    def clear(self) -> None:
        """Nothing is suspected: a connection ended otherwise, or everything was failed."""
        self._suspects.clear()

    def in_order(self, commands: list[Request]) -> list[Request]:
        """`commands` as they are to be sent where there is no trial."""
        return self._suspects.in_order(commands)

    def begin(self, commands: list[Request]) -> None:
        """Try `commands`, one after the other."""
        self._left.extend(commands)
        if self._left and not self._suspects.proven:
            export = self._commands.export
            length = min(max(export.min_block_bytes, SECTOR_BYTES), export.usable_bytes)
            offset = 0 if self._left[0].offset >= length else export.usable_bytes - length
            self._try(Request(READ, offset, length, [memoryview(bytearray(length))], _ignore))
        else:
            self._try_next()

    def _try_next(self) -> None:
        """Send the next command alone; after the last one, all that waited meanwhile."""
        channels = self._channels
        while self._left and channels.phase is Phase.UP:
            command = self._left.popleft()
            if command.op == FLUSH:
                self._flushes.note_sent(command)
            elif not self._commands.fits(command):
                channels.waiting.append(command)
                continue
            else:
                command.progress = self._flushes.durability.sending_epoch
            self._try(command)
            return
        if channels.phase is Phase.UP:
            self._suspects.clear()
            channels.enter(on_trial=False)
            self._commands.send_all(channels.take_waiting())

    def _try(self, command: Request) -> None:
        self._tried, self._tried_done = command, command.done
        command.done = self._answered_alone
        self._channels.present[0].send(command)

    def _answered_alone(self, command: Request) -> None:
        self._suspects.proven = True
        self._end_try()
        command.done(command)
        self._try_next()

    def _end_try(self) -> None:
        if self._tried is not None:
            self._tried.done = self._tried_done
            self._tried, self._tried_done = None, _ignore

    def end(self, unanswered: list[Request]) -> tuple[list[Request], Request | None]:
        """The connection is lost. Returns `unanswered`, without the probe and with the commands
        that were still to be tried; and the command on trial."""
        tried = self._tried
        self._end_try()
        left = [*unanswered, *self._left]
        self._left.clear()
        if tried is not None and tried.done is _ignore:
            left = [command for command in left if command is not tried]
        return left, tried

    def judge(self, now: float, blamed: Request, *, answered: bool, tried: bool) -> bool:
        """The server hung up with `blamed` unanswered; `tried`: when it was sent alone. `answered`:
        something else was. True: it was for this command."""
        if not tried:
            self._is_due = self._suspects.hung_up(blamed, now, answered=answered)
            return False
        if blamed.done is _ignore:
            self._suspects.probe_failed()
            return False
        is_found = self._suspects.hung_up_alone(blamed, now)
        self._is_due = not is_found
        return is_found

    # Commands of abandoned requests.

    def take_abandoned(self) -> list[Request]:
        """Those that are still to be tried, and were sent on an earlier connection."""
        left, abandoned = without_abandoned(list(self._left))
        self._left = deque(left)
        tried = self._tried
        if tried is not None and tried.is_abandoned and tried.done != self._answered_alone:
            # It was abandoned itself: the trial goes on all the same when it is answered.
            self._tried_done, tried.done = tried.done, self._answered_alone
        return abandoned

    def done_of(self, command: Request) -> Callable[[Request], None]:
        """What is told of the end of `command`, which is in flight, perhaps on trial."""
        return self._tried_done if command is self._tried else command.done

    def set_done_of(self, command: Request, done: Callable[[Request], None]) -> None:
        """Tell `done` instead."""
        if command is self._tried:
            self._tried_done = done
        else:
            command.done = done


def _ignore(request: Request) -> None:
    """A probe: no request waits for its end."""
