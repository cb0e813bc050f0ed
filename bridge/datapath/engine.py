"""Which code does the usual case of a turn: `usual` itself, or the same compiled.

There are two engines. `pure` is `usual`, the specification. `compiled` is `_native`, an extension
that an installation has if there was a compiler when it was made; it does the same to the same
state, and what it leaves alone is exactly what `usual` leaves alone. Which one is taken is decided
once, when a loop is made:

    auto        compiled, or pure where that is not there
    pure        as it says
    compiled    as it says, or a ConfigError

`serve --engine` says which, elsewhere the environment variable NBD_BRIDGE_SERVE_ENGINE; `auto` is
the default.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, NamedTuple

from bridge.datapath import cells, usual
from bridge.datapath.cells import ABI, Cells, Channel, Queue, Resident, Route
from bridge.datapath.engine_names import AUTO, COMPILED, ENGINES, PURE
from bridge.errors import ConfigError

if TYPE_CHECKING:
    from bridge.datapath.rows import Rows

_VARIABLE: Final = "NBD_BRIDGE_SERVE_ENGINE"


class Engine(NamedTuple):
    """The functions of `usual`, by one engine."""

    name: str
    take_hits: Callable[[Queue, Cells[int], Resident], tuple[int, int]]
    take_commands: Callable[[Queue, Cells[int], Route, Channel, Rows], tuple[int, int]]
    answers: Callable[[Channel, Rows, int, int], tuple[int, bool]]
    publish: Callable[[Queue], bool]
    has_turns: bool = False
    """Whole turns, too: see `compiled`."""


PURE_ENGINE: Final = Engine(
    PURE, usual.take_hits, usual.take_commands, usual.answers, usual.publish
)


def choose(wanted: str = "") -> Engine:
    """The engine of that name; without one, what the environment says. Raises ConfigError, of one
    line, if there is no such engine or if it is not there."""
    name = wanted or os.environ.get(_VARIABLE, "") or AUTO
    if name not in ENGINES:
        raise ConfigError(f"engine {name!r}: it is one of {', '.join(ENGINES)}")
    if name == PURE:
        return PURE_ENGINE
    problem = _problem()
    if not problem:
        return _compiled()
    if name == COMPILED:
        raise ConfigError(f"engine {COMPILED}: {problem}; --engine pure does without it")
    return PURE_ENGINE


def _problem() -> str:
    """Why the compiled engine cannot be had; "" if it can."""
    try:
        # (`from bridge.datapath import` would not tell one that is missing from a broken one.)
        import bridge.datapath._native as _native
    except ModuleNotFoundError:
        return "this installation has none, as it was made without a C compiler"
    except ImportError as error:
        return f"it cannot be loaded: {error}".splitlines()[0]
    places = _native.PLACES.items()
    if ABI != _native.ABI or any(vars(cells).get(name) != at for name, at in places):
        return "it is of another version than the code around it: install anew"
    return ""


def _compiled() -> Engine:
    from bridge.datapath import _native

    return Engine(
        *(COMPILED, _native.take_hits, _native.take_commands, _native.answers, _native.publish),
        has_turns=True,
    )


def description() -> str:
    """Which engine `auto` is here, and why it is not the compiled one."""
    problem = _problem()
    return f"{PURE} ({COMPILED}: {problem})" if problem else COMPILED


if __name__ == "__main__":
    print(description())
