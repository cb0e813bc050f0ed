"""Do cold parts of a cache file hold up hot hits? `./run bench cache_cold [DIRECTORY]`.

A cache file of 1 GiB of which 64 MiB are in the page cache. One reader hits the hot part; up to
eight reads of cold blocks are outstanding beside it. Prints how long a hot read takes from submit
to done while a cold one may be in its way: with the cache as it is (threads), and as it would be
with page faults in the loop.
"""

from __future__ import annotations

import mmap
import os
import random
import time

from bridge.cache.cache import Cache
from bridge.cache.cache_options import Options
from bridge.cache.cold import ThreadedCold
from bridge.cache.file.cache_file import CacheFile
from bridge.cache.file.layout import Identity, geometry_for
from bridge.cache.file.opening import open_or_create
from bridge.datapath.request import PREFETCH, READ, Request
from bridge.datapath.turn import Turn

from .cache_core import DISK_BYTES, NullServer, directory_of

HOT_BYTES = 64 << 20
COUNT = 3000
COLD_READS = 8


def _chill(file: CacheFile) -> None:
    """Everything leaves the page cache."""
    file.sync()
    file._map.madvise(mmap.MADV_DONTNEED)
    os.posix_fadvise(file.fd, 0, 0, os.POSIX_FADV_DONTNEED)


def _run(cache: Cache, cold: ThreadedCold, turn: Turn) -> tuple[list[float], int]:
    rng = random.Random(2)
    buffer = memoryview(bytearray(4096))
    outstanding = 0
    served = 0

    def cold_done(request: Request) -> None:
        nonlocal outstanding, served
        outstanding -= 1
        served += 1

    times = []
    for _ in range(COUNT):
        began = time.perf_counter()
        if outstanding < COLD_READS:
            outstanding += 1
            at = HOT_BYTES + rng.randrange((DISK_BYTES - HOT_BYTES) // 4096) * 4096
            view = memoryview(bytearray(4096))
            cache.submit(Request(READ, at, 4096, [view], cold_done))
        cache.submit(
            Request(READ, rng.randrange(HOT_BYTES // 4096) * 4096, 4096, [buffer], _ignore)
        )
        turn.end()
        times.append(time.perf_counter() - began)
        cold.collect()
    while outstanding:
        cold.collect()
        turn.end()
    return times, served


def _ignore(request: Request) -> None:
    pass


def main() -> None:
    """Print a line for each of the two."""
    directory = directory_of("cache_cold", __doc__)
    path = str(directory / f"cache-cold-{os.getpid()}.cache")
    geometry = geometry_for(disk_bytes=DISK_BYTES, cache_bytes=DISK_BYTES)
    file = open_or_create(path, geometry=geometry, identity=Identity("nbd://bench", ""))
    os.unlink(path)
    turn = Turn()
    cold = ThreadedCold(turn)
    cache = Cache(
        file,
        NullServer(turn),
        Options(readahead_bytes=0),
        clock=time.monotonic,
        turn=turn,
        cold=cold,
    )
    turn.add_stage(cache)
    for at in range(0, DISK_BYTES, 1 << 20):
        cache.submit(Request(PREFETCH, at, 1 << 20, [], _ignore))
        turn.end()
    for name in ("threads", "page faults in the loop"):
        _chill(file)
        cache.index.forget_residency()
        for at in range(0, HOT_BYTES, 4096):
            view = memoryview(bytearray(4096))
            file.read_wait([view], (cache.index.find(at >> 16) << 16) + (at & 0xFFFF))
        if name != "threads":
            for slot in range(1, cache.index.slots + 1):
                cache.index.ready[slot] = 0xFFFF
        else:
            for at in range(0, HOT_BYTES, 4096):
                cache.submit(Request(READ, at, 4096, [memoryview(bytearray(4096))], _ignore))
                turn.end()
        times, served = _run(cache, cold, turn)
        times.sort()
        shown = ", ".join(
            f"p{share} {times[int(len(times) * share / 100)] * 1e6:.0f}" for share in (50, 90, 99)
        )
        print(f"{name:26} {shown}, max {times[-1] * 1e6:.0f} us; {served} cold reads")
    cold.close()


if __name__ == "__main__":
    main()
