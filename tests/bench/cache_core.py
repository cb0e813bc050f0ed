"""How fast the cache's core is alone: `./run bench cache_core [DIRECTORY]`.

No loop, no server, no guest: `Cache.submit()` on a real cache file, microseconds per request,
32 to a turn, the best of three rounds. `floor` is the same loop around a function that only
finishes.
"""

from __future__ import annotations

import argparse
import os
import random
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from bridge.cache.cache import Cache
from bridge.cache.cache_options import Options
from bridge.cache.file.layout import Identity, geometry_for
from bridge.cache.file.opening import open_or_create
from bridge.datapath.request import READ, WRITE, Request
from bridge.datapath.turn import Turn

DISK_BYTES = 1 << 30
COUNT = 100_000
SPAN_BYTES = 256 << 20


class NullServer:
    """A server that does everything at once; reads leave the buffers as they are."""

    size_bytes = DISK_BYTES
    min_block_bytes = 1
    can_fua = can_flush = can_trim = can_write_zeroes = True
    gone = False
    generation = 1

    def __init__(self, turn: Turn) -> None:
        self._turn = turn

    def submit(self, request: Request) -> None:
        request.generation = 1
        self._turn.finish(request)


def _done(request: Request) -> None:
    pass


def _requests(op: int, size: int, offsets: list[int]) -> list[Request]:
    buffer = memoryview(bytearray(size))
    return [Request(op, offset, size, [buffer], _done) for offset in offsets]


def _measure(
    name: str,
    submit: Callable[[Request], None],
    requests: list[Request],
    end_turn: Callable[[], object],
) -> float:
    best = 1e9
    for _ in range(3):
        began = time.perf_counter()
        for at in range(0, len(requests), 32):
            for request in requests[at : at + 32]:
                submit(request)
            end_turn()
        best = min(best, time.perf_counter() - began)
    each = best / len(requests) * 1e6
    print(f"{name:44} {each:8.2f} us  {1e6 / each:10,.0f} /s")
    return each


def _measure_once(name: str, submit: Callable[[Request], None], requests: list[Request]) -> None:
    """Requests of which each is what it is called only the first time."""
    began = time.perf_counter()
    for request in requests:
        submit(request)
    took = (time.perf_counter() - began) / len(requests) * 1e6
    print(f"{name:44} {took:8.2f} us")


def directory_of(command: str, description: str | None) -> Path:
    """Where the cache file is to be: the one argument of a benchmark of the cache."""
    parser = argparse.ArgumentParser(prog=f"./run bench {command}", description=description)
    parser.add_argument(
        "directory",
        type=Path,
        nargs="?",
        default=Path(tempfile.gettempdir()),
        help="where the cache file is made, and removed again (%(default)s)",
    )
    directory: Path = parser.parse_args().directory
    if not directory.is_dir():
        parser.error(f"{directory} is not a directory")
    return directory


def _cache_in(directory: Path, turn: Turn) -> Cache:
    path = directory / f"cache-core-{os.getpid()}.cache"
    geometry = geometry_for(disk_bytes=DISK_BYTES, cache_bytes=DISK_BYTES)
    file = open_or_create(str(path), geometry=geometry, identity=Identity("nbd://bench", ""))
    path.unlink()
    options = Options(dirty_background_ratio=0.9, dirty_flush_ratio=0.95, dirty_hard_ratio=1.0)
    cache = Cache(file, NullServer(turn), options, clock=time.monotonic, turn=turn)
    turn.add_stage(cache)
    return cache


def main() -> None:
    """Print the table."""
    directory = directory_of("cache_core", __doc__)
    turn = Turn()
    cache = _cache_in(directory, turn)

    def submit(request: Request) -> None:
        cache.submit(request)
        turn.end()

    rng = random.Random(1)
    offsets = [rng.randrange(SPAN_BYTES // 4096) * 4096 for _ in range(COUNT)]
    _measure("floor", turn.finish, _requests(READ, 4096, offsets), turn.end)
    each = list(range(0, SPAN_BYTES, 4096))
    rng.shuffle(each)
    _measure("4 KiB read, miss (cold), then hits", submit, _requests(READ, 4096, each), turn.end)
    reads = _requests(READ, 4096, offsets)
    _measure("4 KiB read hit, random in 256 MiB", cache.submit, reads, turn.end)
    near = [offset % (4 << 20) for offset in offsets]
    _measure("4 KiB read hit, random in 4 MiB", cache.submit, _requests(READ, 4096, near), turn.end)
    large = _requests(READ, 65536, each[: COUNT // 4][:4096])
    _measure("64 KiB read hit", cache.submit, large, turn.end)
    half = each[: len(each) // 2]
    _measure_once("4 KiB write, clean to dirty", submit, _requests(WRITE, 4096, half))
    fresh = _requests(WRITE, 4096, [offset + (512 << 20) for offset in half])
    _measure_once("4 KiB write, absent to dirty", submit, fresh)
    writes = _requests(WRITE, 4096, half)
    _measure("4 KiB write hit (dirty), random", cache.submit, writes, turn.end)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"peak RSS {peak // 1024} MiB (the map included)")


if __name__ == "__main__":
    main()
