"""Other people's front-ends in place of our own: libblkio, and a Linux guest in QEMU.

A program beside them makes the requests that it is told of, a line each, and answers with a line.
Only numbers of writes are passed: content is made, and looked at, over there.

    ready DISCARDS                 first of all, from the program; 1 if the disk can be discarded
    ID KIND FIRST COUNT NUMBER   KIND: a letter; FIRST, COUNT: sectors; NUMBER: of the write
    ID ERRNO NUMBER*COUNT ...    ERRNO: 0 for success; of a read: which writes it found, in order
"""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Protocol

import trio

from bridge.errors import BridgeError, ConnectionLost, RequestError
from bridge.spec.virtio_blk import F_DISCARD, F_WRITE_ZEROES
from bridge.units import SECTOR_BYTES
from tests.sim.oracle import Violation
from tests.torture.content import TORN, numbers_of, sectors_of
from tests.torture.processes import die_with_parent

_NONSENSE = b"\xff" * SECTOR_BYTES
_LINE_BYTES = 65536


class Driver(Protocol):
    """What a guest needs of its front-end: what `BlkDriver` has."""

    @property
    def features(self) -> int: ...
    async def start(self) -> None: ...
    def close(self) -> None: ...
    async def config_changed(self) -> object: ...
    async def reconnect(self) -> None: ...
    async def stop(self) -> object: ...
    async def read(self, offset: int, length: int) -> bytes: ...
    async def write(self, offset: int, data: bytes) -> None: ...
    async def flush(self) -> None: ...
    async def discard(self, ranges: Sequence[tuple[int, int]]) -> None: ...
    async def write_zeroes(
        self, ranges: Sequence[tuple[int, int]], *, unmap: bool = False
    ) -> None: ...


MakeDriver = Callable[[], Driver]


class _Reply:
    """Of one request that is under way."""

    def __init__(self) -> None:
        self.arrived = trio.Event()
        self.words: list[str] = []


class Client:
    """A program that makes requests. Derived classes start it."""

    def __init__(self, disk: int, log: Path) -> None:
        """`disk`: its number, which is in each sector. `log`: of the program."""
        self._disk = disk
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None
        self._stream: trio.SocketStream | None = None
        self.features = 0
        self._buffer = b""
        self._next_id = 0
        self._replies: dict[int, _Reply] = {}

    def _launch(self, fd: int) -> Sequence[str]:
        """The command line of a program that is spoken to over the socket `fd`."""
        raise NotImplementedError

    # What a guest needs of its front-end.

    async def start(self) -> None:
        """Start the program, and wait until it has its disk. Raises ConnectionLost."""
        ours, theirs = socket.socketpair()
        self._stream = trio.SocketStream(trio.socket.from_stdlib_socket(ours))
        with theirs, self._log.open("ab") as log:
            self._process = subprocess.Popen(
                self._launch(theirs.fileno()),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[theirs.fileno()],
                preexec_fn=die_with_parent,
            )
        word, has_discard = (await self._line()).split()
        if word != "ready":
            raise ConnectionLost(f"the client says {word!r}")
        self.features = F_WRITE_ZEROES | (F_DISCARD if int(has_discard) else 0)

    def close(self) -> None:
        """SIGKILL."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        if self._stream is not None:
            self._stream.socket.close()

    async def config_changed(self) -> None:
        """Never returns: hands out the answers. Raises ConnectionLost."""
        while True:
            number, *words = (await self._line()).split()
            reply = self._replies[int(number)]
            reply.words = words
            reply.arrived.set()

    async def reconnect(self) -> None:
        """Nobody reconnects from outside: the program has ended by itself."""
        said = self._log.read_text(errors="replace").strip()[-600:]
        raise Violation(f"disk {self._disk}: the client ended by itself: {said}")

    async def stop(self) -> None:
        """Raises BridgeError: it cannot be paused."""
        raise BridgeError("this client cannot be paused")

    async def read(self, offset: int, length: int) -> bytes:
        """See `BlkDriver`."""
        first = offset // SECTOR_BYTES
        found = []
        for word in await self._ask("r", offset, length):
            number, count = map(int, word.split("*"))
            found += [number] * count
        if len(found) * SECTOR_BYTES != length:
            raise Violation(f"disk {self._disk}: the client read {len(found)} sectors")
        return b"".join(
            _NONSENSE if number == TORN else self._sector(at, number)
            for at, number in enumerate(found, first)
        )

    def _sector(self, at: int, number: int) -> bytes:
        return sectors_of(self._disk, at, 1, number) if number else bytes(SECTOR_BYTES)

    async def write(self, offset: int, data: bytes) -> None:
        """`data` has to be of one write; see `BlkDriver`."""
        (number,) = set(numbers_of(self._disk, offset // SECTOR_BYTES, data))
        await self._ask("w", offset, len(data), number)

    async def flush(self) -> None:
        """See `BlkDriver`."""
        await self._ask("f", 0, 0)

    async def discard(self, ranges: Sequence[tuple[int, int]]) -> None:
        """See `BlkDriver`."""
        for offset, length in ranges:
            await self._ask("d", offset, length)

    async def write_zeroes(self, ranges: Sequence[tuple[int, int]], *, unmap: bool = False) -> None:
        """See `BlkDriver`."""
        for offset, length in ranges:
            await self._ask("u" if unmap else "z", offset, length)

    # Lines.

    async def _ask(self, kind: str, offset: int, length: int, number: int = 0) -> list[str]:
        """What it answers after the errno. Raises RequestError."""
        assert self._stream is not None
        self._next_id += 1
        identity = self._next_id
        reply = self._replies[identity] = _Reply()
        line = f"{identity} {kind} {offset // SECTOR_BYTES} {length // SECTOR_BYTES} {number}\n"
        try:
            # So few of these are under way that the socket takes each at once and whole.
            with suppress(OSError):  # Whoever reads answers knows, too, that it has ended.
                await self._stream.socket.send(line.encode())
            await reply.arrived.wait()
        finally:
            del self._replies[identity]
        errno = int(reply.words[0])
        if errno:
            raise RequestError(errno, "the client's request failed")
        return reply.words[1:]

    async def _line(self) -> str:
        assert self._stream is not None
        while b"\n" not in self._buffer:
            try:
                data = bytes(await self._stream.receive_some(_LINE_BYTES))
            except trio.BrokenResourceError:
                data = b""
            if not data:
                raise ConnectionLost("the client has ended")
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line.decode().strip()
