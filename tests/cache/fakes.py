"""A plain server and a rig around one cache, for tests of one behaviour each."""

from __future__ import annotations

import errno
import mmap
from collections.abc import Callable

from bridge.cache.cache import Cache
from bridge.cache.cache_options import Options
from bridge.cache.cold import Cold
from bridge.cache.file.cache_file import MappedImage
from bridge.cache.file.layout import Geometry, Identity, new_header
from bridge.datapath.request import (
    DISCARD,
    FLUSH,
    PREFETCH,
    READ,
    WRITE,
    WRITE_ZEROES,
    Request,
)
from bridge.datapath.turn import Outcome
from tests.turns import deliver, finish, forget, turn

BLOCK = 4096
GRANULE = 65536


def execute(request: Request, image: mmap.mmap | bytearray) -> None:
    """Do what `request` asks of a server that holds `image`."""
    at, length = request.offset, request.length
    if request.op == READ:
        for buffer in request.buffers:
            buffer[:] = image[at : at + len(buffer)]
            at += len(buffer)
    elif request.op == WRITE:
        image[at : at + length] = b"".join(bytes(each) for each in request.buffers)
    elif request.op in (DISCARD, WRITE_ZEROES):
        image[at : at + length] = bytes(length)


class FakeServer:
    """Keeps requests in `pending` until told; `image` is what it holds."""

    def __init__(self, size_bytes: int) -> None:
        self.size_bytes = size_bytes
        self.min_block_bytes = 1
        self.can_fua = True
        self.can_flush = True
        self.can_trim = True
        self.can_write_zeroes = True
        self.generation = 1
        self.gone = False
        # Nearly all of a large disk is never touched.
        self.image = mmap.mmap(-1, size_bytes)
        self.fails = 0
        """An errno: there is no connection, everything fails at once."""
        self.pending: list[Request] = []
        self.seen: list[tuple[int, int, int, int]] = []
        """(op, offset, length, flags) of everything submitted."""

    def grow(self, content: bytes) -> None:
        """The disk ends with `content`, behind what it held."""
        old, self.image = self.image, mmap.mmap(-1, self.size_bytes + len(content))
        self.image[: self.size_bytes] = old[:]
        self.image[self.size_bytes :] = content
        self.size_bytes += len(content)

    def submit(self, request: Request) -> None:
        if self.fails:
            turn().finish(request, self.fails)
            return
        self.pending.append(request)
        self.seen.append((request.op, request.offset, request.length, request.flags))

    def answer(self, index: int = 0, error: int = 0) -> None:
        """Execute and answer one request."""
        request = self.pending.pop(index)
        if not error:
            execute(request, self.image)
        request.generation = self.generation
        finish(request, error)

    def ops(self, op: int) -> list[tuple[int, int]]:
        """(offset, length) of all requests of one kind."""
        return [(offset, length) for each, offset, length, _ in self.seen if each == op]


class Rig:
    """One cache in memory over a `FakeServer`, and a guest's view of it."""

    def __init__(
        self,
        *,
        granules: int = 64,
        slots: int = 64,
        size: int = 0,
        image: MappedImage | None = None,
        server: FakeServer | None = None,
        cold: Cold | None = None,
        **options: object,
    ) -> None:
        size = size or granules * GRANULE
        geometry = Geometry(size, BLOCK, GRANULE, slots)
        if image is None:
            header = new_header(geometry, Identity("nbd://test", "x"), bytes(16), 0)
            image = MappedImage(bytearray(geometry.file_bytes), header)
        self.image = image
        self.now = 0.0
        self.turn = forget()
        self.server = server or FakeServer(size)
        self.options = Options(**{"readahead_bytes": 0, **options})
        self.cache = Cache(
            image,
            self.server,
            self.options,
            clock=lambda: self.now,
            turn=self.turn,
            cold=cold,
        )
        self.turn.add_stage(self.cache)

    def end_turn(self) -> None:
        deliver()

    def start(self, op: int, offset: int = 0, length: int = 0, data: bytes = b"", flags: int = 0):
        """Submit; the result's `error` is None until it is done."""
        buffers = []
        if op == WRITE:
            buffers, length = [memoryview(bytearray(data))], len(data)
        elif op == READ:
            buffers = [memoryview(bytearray(length))]
        request = Request(op, offset, length, buffers, lambda _: None, flags)
        result = Result(request)
        request.done = result.finished
        self.cache.submit(request)
        self.end_turn()
        return result

    # What others than the guest and the server do. Each is a turn of its own.

    def reconnected(self) -> None:
        self.cache.upstream_reconnected()
        deliver()

    def refuse(self, errno: int) -> None:
        self.cache.refuse(errno)
        deliver()

    def resize(self, size_bytes: int, done: Callable[[int], None]) -> None:
        self.cache.resize(size_bytes, Outcome(lambda outcome: done(outcome.error)))
        deliver()

    def check_sample(self, done: Callable[[int], None]) -> None:
        self.cache.foreign.check_sample(done)
        deliver()

    def check_before_writing(self, done: Callable[[int], None]) -> None:
        self.cache.foreign.check_before_writing(done)
        deliver()

    def serve(self) -> None:
        """The server answers everything, in order, however many turns it takes."""
        while self.server.pending:
            self.server.answer()

    def tick(self, now: float) -> None:
        self.now = now
        self.cache.tick(now)
        self.end_turn()

    def write(self, offset: int, data: bytes, flags: int = 0) -> int:
        result = self.start(WRITE, offset, data=data, flags=flags)
        self.serve()
        return result.value

    def read(self, offset: int, length: int) -> bytes:
        result = self.start(READ, offset, length)
        self.serve()
        assert result.value == 0
        return bytes(result.request.buffers[0])

    def flush(self) -> int:
        result = self.start(FLUSH)
        self.serve()
        return result.value

    def prefetch(self, offset: int, length: int) -> int:
        result = self.start(PREFETCH, offset, length)
        self.serve()
        return result.value


class Result:
    """How a request ended."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.error: int | None = None

    def finished(self, request: Request) -> None:
        assert self.error is None, "finished twice"
        self.error = request.error

    @property
    def value(self) -> int:
        assert self.error is not None, "not finished"
        return self.error


class LaterCold:
    """Cold reads that end when told."""

    def __init__(self) -> None:
        self.jobs: list[tuple[Callable[[], None], Outcome]] = []

    def run(self, job: Callable[[], None], outcome: Outcome) -> None:
        self.jobs.append((job, outcome))

    def finish(self, error: int = 0) -> None:
        job, outcome = self.jobs.pop(0)
        if not error:
            job()
        turn().finish(outcome, error)
        deliver()


EIO = errno.EIO
