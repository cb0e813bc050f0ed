"""A process of the host: what it maps, opens and connects is gone with it.

**A kill.** The process is gone between two lines of Python. Whatever its tasks still do (`finally`
blocks, a stop in order) must have no effect: their sockets are closed, their memory maps become
private copies, their descriptors of files lead nowhere. They unwind somewhere aside.
"""

from __future__ import annotations

import ctypes
import fcntl
import inspect
import mmap
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from types import CodeType
from typing import TYPE_CHECKING, Any

import trio

from bridge.errors import BridgeError
from tests.sim.loop import SimLoop
from tests.sim.oracle import Violation

if TYPE_CHECKING:
    from tests.sim.world import World

CURRENT: ContextVar[Process] = ContextVar("process")
_CODE = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))) + "/bridge/"

_OTHERS = (_CODE + "datapath/fence.py", _CODE + "peers/")
"""What is not of this process, or has a lock that the guest's driver takes as well: only here they
are in the same one. A guest publishes while its device is about to sleep, in the device's task."""


def _copies(code: CodeType) -> bool:
    """Data is copied piece by piece there: a kill between two may tear a sector."""
    file = code.co_filename.removeprefix(_CODE)
    return file == "datapath/buffers.py" or (file, code.co_name) == ("datapath/usual.py", "_copy")


_OUTER_TRACE = sys.gettrace()
"""Of a debugger, or of what measures coverage: it goes on after a kill."""

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (
    *(ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long),
)
_MAP_FIXED = 0x10
_WAITS = inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR | inspect.CO_GENERATOR
"""Code that can be suspended ends at its next wait: an error out of the blue could leave a nursery
open."""


_is_ours: dict[CodeType, bool] = {}
"""Is it code of the product, at whose lines a process may be killed?"""


class Killed(BaseException):
    """This process is gone."""


_is_observed = False
"""Whoever watches a program runs code of the product, too: to print what it is told."""


@contextmanager
def observing() -> Iterator[None]:
    """Lines that run within are of no process: a program is the same with and without them."""
    global _is_observed
    before, _is_observed = _is_observed, True
    try:
        yield
    finally:
        _is_observed = before


class _Maps:
    """The `mmap` module of the product's modules: what a bridge maps can be taken from it."""

    def __getattr__(self, name: str) -> Any:
        return getattr(mmap, name)

    @staticmethod
    def mmap(fd: int, length: int, *args: Any, **named: Any) -> mmap.mmap:
        made = mmap.mmap(fd, length, *args, **named)
        process = CURRENT.get(None)
        if process is not None and fd >= 0:
            offset = named.get("offset", 0)
            process.maps.append((made, os.dup(fd), offset))
        return made


MAPS = _Maps()


class Process:
    """See the module's text. `main` is what it does."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.directory = world.directory
        """Where it may have files."""
        self.dead = False
        """Killed: nothing that its tasks do counts."""
        self.died_amid_copy = False
        """It was killed while it copied data."""
        self.maps: list[tuple[mmap.mmap, int, int]] = []
        """What it has mapped, with a descriptor of the file and the offset in it."""
        self.terminated = trio.Event()
        self.loop: SimLoop | None = None
        self.began_to_stop = False
        self.problem: BridgeError | None = None
        """Why it ended, if not as it was told to."""
        self._scope = trio.CancelScope()
        self.gone = trio.Event()
        """Dead, or its tasks have ended."""
        self.ended = trio.Event()

    async def main(self) -> None:
        """What the process does."""

    async def run(self) -> None:
        """The process, until it ends; for a killed one its remains."""
        CURRENT.set(self)
        try:
            with self._scope:
                await self.main()
        except BaseException as error:
            if not self.dead:
                self._judge_end(error)
            elif isinstance(error, (trio.Cancelled, KeyboardInterrupt)):
                raise
        finally:
            self.gone.set()
            self._gone()
            self.ended.set()
            self.world.network.process_died(self)
            self._give_back()

    def _judge_end(self, error: BaseException) -> None:
        """It ended with an error of its own."""
        for kind in (Violation, AssertionError, KeyboardInterrupt):
            found = within(error, kind)
            if found is not None:
                raise found
        problem = within(error, BridgeError)
        if not isinstance(problem, BridgeError):
            raise error
        self.problem = problem
        self.world.note("process ends", reason=str(problem))

    def _give_back(self) -> None:
        for made, fd, _ in self.maps:
            with suppress(BufferError, ValueError):
                made.close()
            os.close(fd)
        self.maps.clear()

    def terminate(self) -> None:
        """SIGTERM."""
        self.began_to_stop = True
        self.terminated.set()

    def _died(self) -> None:
        """It was killed."""

    def _gone(self) -> None:
        """It does nothing any more."""

    # Death.

    def kill(self) -> None:
        """kill -9, now."""
        if not self.gone.is_set():
            self._die()
            self._scope.cancel()

    def kill_after_lines(self, lines: int) -> None:
        """kill -9 after so many lines of its code, within whatever it does then."""
        left = lines
        world, current, is_ours = self.world, CURRENT.get, _is_ours

        def at_line(frame: Any, event: str, _: Any) -> Any:
            nonlocal left
            if event == "line":
                left -= 1
                if left <= 0 or world.is_calm:
                    sys.settrace(_OUTER_TRACE)
                    if not self.dead and not world.is_calm and not self.gone.is_set():
                        self._die_at(frame)
            return at_line

        def at_call(frame: Any, event: str, _: Any) -> Any:
            if _is_observed:
                return None
            code = frame.f_code
            inside = is_ours.get(code)
            if inside is None:
                name = code.co_filename
                inside = is_ours[code] = name.startswith(_CODE) and not name.startswith(_OTHERS)
            return at_line if inside and current(None) is self else None

        sys.settrace(at_call)

    def _die_at(self, frame: Any) -> None:
        """Killed at a line of its code."""
        name = frame.f_code.co_filename.removeprefix(_CODE)
        self.world.note("killed", at=f"{name}:{frame.f_lineno}")
        self.died_amid_copy = _copies(frame.f_code)
        self._die()
        self._scope.cancel()
        if not frame.f_code.co_flags & _WAITS:
            raise Killed

    def _die(self) -> None:
        self.dead = True
        sys.settrace(_OUTER_TRACE)
        for made, fd, offset in self.maps:
            _detach(made, fd, offset)
        self._detach_files()
        if self.loop is not None:
            # Killed amid a change, the parts may be at odds with one another: they do no more.
            turn = self.loop.turn
            turn._stages, turn.finished, turn._ends, turn._next = (), [], [], []
        self.world.network.process_died(self)
        self.gone.set()
        self._gone()
        self._died()

    def _detach_files(self) -> None:
        """What it has open of files leads nowhere, and their locks are free."""
        nowhere = os.open("/dev/null", os.O_RDWR)
        device = os.stat(self.directory).st_dev
        for name in os.listdir("/proc/self/fd"):
            fd = int(name)
            with suppress(OSError):
                if os.fstat(fd).st_dev != device:
                    continue  # Cheaper than its name.
                if os.readlink(f"/proc/self/fd/{name}").startswith(self.directory + "/"):
                    fcntl.flock(fd, fcntl.LOCK_UN)  # Maps hold the file, too.
                    os.dup2(nowhere, fd, inheritable=False)
        os.close(nowhere)


def within(error: BaseException, kind: type[BaseException]) -> BaseException | None:
    """An error of that kind, if `error` is one or is a group that has one."""
    if isinstance(error, kind):
        return error
    if isinstance(error, BaseExceptionGroup):
        for each in error.exceptions:
            found = within(each, kind)
            if found is not None:
                return found
    return None


def _detach(made: mmap.mmap, fd: int, offset: int) -> None:
    """The map becomes a private copy of the file."""
    try:
        anchor = (ctypes.c_char * len(made)).from_buffer(made)
    except ValueError:
        return  # It is closed.
    address = ctypes.addressof(anchor)
    flags = mmap.MAP_PRIVATE | _MAP_FIXED
    found = _libc.mmap(address, len(made), mmap.PROT_READ | mmap.PROT_WRITE, flags, fd, offset)
    assert found == address, "cannot take a map away"
    del anchor
    # A private page shows what others store in the file until it was stored to itself.
    there = max(0, min(len(made), os.fstat(fd).st_size - offset))
    with memoryview(made) as view, view[: there : mmap.PAGESIZE] as of_each_page:
        of_each_page[:] = bytes(of_each_page)
