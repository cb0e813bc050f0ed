"""What the write-out costs before any I/O: `./run bench cache_writeout [DIRECTORY]`.

No loop, no server, no guest: blocks become dirty in a real cache file, then one flush sends all of
them to a server that answers once a turn whatever is in flight. Processor time per block, in
microseconds, the best of five rounds.
"""

from __future__ import annotations

import os
import random
import time
from pathlib import Path

from bridge.cache.cache import Cache
from bridge.cache.cache_options import Options
from bridge.cache.file.layout import Identity, geometry_for
from bridge.cache.file.opening import open_or_create
from bridge.datapath.request import FLUSH, WRITE, Request
from bridge.datapath.turn import Turn

from .cache_core import NullServer, directory_of

_DISK_BYTES = 256 << 20
_BLOCK_BYTES = 4096
_ROUNDS = 5


class _LaterServer(NullServer):
    """A server that answers when it is told to."""

    size_bytes = _DISK_BYTES

    def __init__(self, turn: Turn) -> None:
        super().__init__(turn)
        self._pending: list[Request] = []
        self.commands = 0

    def submit(self, request: Request) -> None:
        self._pending.append(request)

    def answer(self) -> None:
        """Whatever is in flight is done."""
        pending, self._pending = self._pending, []
        self.commands += len(pending)
        for request in pending:
            super().submit(request)


def _ignore(request: Request) -> None:
    pass


def _cache_in(directory: Path, turn: Turn, server: _LaterServer, requests: int) -> Cache:
    path = directory / f"cache-writeout-{os.getpid()}.cache"
    geometry = geometry_for(disk_bytes=_DISK_BYTES, cache_bytes=_DISK_BYTES)
    file = open_or_create(str(path), geometry=geometry, identity=Identity("nbd://bench", ""))
    path.unlink()
    options = Options(writeback_requests=requests)
    cache = Cache(file, server, options, clock=time.monotonic, turn=turn)
    turn.add_stage(cache)
    return cache


def _measure(name: str, directory: Path, blocks: list[int], requests: int) -> None:
    turn = Turn()
    server = _LaterServer(turn)
    cache = _cache_in(directory, turn, server, requests)
    data = [memoryview(bytes(_BLOCK_BYTES))]
    best_s = 1e9
    commands = 0
    for _ in range(_ROUNDS):
        for block in blocks:
            cache.submit(Request(WRITE, block * _BLOCK_BYTES, _BLOCK_BYTES, data, _ignore))
            turn.finished.clear()
        turn.end()
        done: list[Request] = []
        server.commands = 0
        began = time.process_time()
        cache.submit(Request(FLUSH, 0, 0, [], done.append))
        turn.end()
        while not done:
            server.answer()
            turn.end()
            while turn.pending:
                turn.end()
        best_s = min(best_s, time.process_time() - began)
        commands = server.commands
    each_us = best_s / len(blocks) * 1e6
    print(f"{name:34} {requests:4} in flight {each_us:8.2f} us  {commands:6} commands", flush=True)


def main() -> None:
    """Print the table."""
    directory = directory_of("cache_writeout", __doc__)
    rng = random.Random(1)
    granules = [each * 16 + rng.randrange(16) for each in range(_DISK_BYTES >> 16)]
    spread = list(range(0, _DISK_BYTES // _BLOCK_BYTES, 5))
    for blocks in (granules, spread):
        rng.shuffle(blocks)
    adjacent = list(range(20_000))
    for requests in (32, 256):
        _measure("one block of each granule", directory, granules, requests)
        _measure("one block in 20 KiB", directory, spread, requests)
        _measure("adjacent blocks", directory, adjacent, requests)


if __name__ == "__main__":
    main()
