"""A command for several requests of a guest, once its rows are requests (see `cells.ROW`).

A `Merged` is pending on its connection until it is answered, and nowhere else. A success is that of
each member. When the server answers with an error, each is done by itself: only that one fails
which the server cannot do. (Not before: two copies of one write in flight at once could bring back
old data.) Whatever else ends the command, a lost connection above all, leaves the members to those
who go on with them (`each_of`).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from bridge.datapath.cells import Changes, RowOwner
from bridge.datapath.request import Request

FIRST_PAUSE: Final = 1 << 12
LAST_PAUSE: Final = 1 << 20
"""So many commands are sent without merging after a merged one that had no usual answer: at first,
and at most. (An unusual answer has all rows adopted, which costs as much as some hundred usual
commands. Merging comes back in seconds even so.)"""


class Merged(Request):
    """See the module's text. Its members are of one ring, and are abandoned together."""

    __slots__ = ("_changes", "_member_owner", "members")

    def __init__(
        self, members: list[Request], member_owner: RowOwner, changes: Changes | None = None
    ) -> None:
        """`members`: requests that `member_owner` has adopted, or commands that `changes` has made
        for them."""
        first = members[0]
        super().__init__(
            *(first.op, first.offset, sum(each.length for each in members)),
            [view for each in members for view in each.buffers],
            *(_answered, first.flags, first),
        )
        self.members = members
        self._member_owner = member_owner
        self._changes = changes

    def end(self) -> None:
        """Tell the members."""
        owner = self._member_owner
        # (Without a generation it was not the server that said so.)
        alone = self.error and self.generation and not self.is_abandoned
        for each in self.members:
            if not alone:
                each.generation = self.generation
                owner.finish(each, self.error)
            elif self._changes is not None and isinstance(each.owner, tuple):
                owner.submit_alone(self._changes.give_up(each))
            else:
                owner.submit_alone(each)


def _answered(merged: Merged) -> None:
    merged.end()


def each_of(commands: Iterable[Request]) -> list[Request]:
    """`commands` with the members of merged ones in their places; those of abandoned requests stay
    as they are, as nobody goes on with them."""
    found: list[Request] = []
    for command in commands:
        found += members_of(command) if not command.is_abandoned else [command]
    return found


def members_of(command: Request) -> list[Request]:
    """The requests that `command` is for, if it is a merged one; else itself."""
    return command.members if isinstance(command, Merged) else [command]
