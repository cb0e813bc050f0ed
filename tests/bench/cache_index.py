"""What the index of a large cache costs: `./run bench cache_index [DIRECTORY]`.

A 100 GiB cache for a 1 TiB disk, every slot in use at a random granule, in a sparse file.
Prints how long a warm start takes and how much memory the index keeps resident.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time

from bridge.cache.cache import Cache
from bridge.cache.cache_options import Options
from bridge.cache.file.cache_file import CacheFile
from bridge.cache.file.layout import Identity, geometry_for, new_header, state_word
from bridge.datapath.turn import Turn
from bridge.host import boot_id

from .cache_core import NullServer, directory_of


def _resident_mib() -> dict[str, int]:
    with open("/proc/self/status", encoding="ascii") as file:
        fields = dict(line.split(":", 1) for line in file)
    return {name: int(fields[name].split()[0]) // 1024 for name in ("RssAnon", "RssFile", "VmRSS")}


def main() -> None:
    """Make the file, and have a process of its own measure it."""
    directory = directory_of("cache_index", __doc__)
    geometry = geometry_for(disk_bytes=1 << 40, cache_bytes=100 << 30)
    path = str(directory / f"cache-index-{os.getpid()}.cache")
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    os.ftruncate(fd, geometry.file_bytes)
    header = new_header(geometry, Identity("nbd://bench", ""), boot_id(), 0)
    file = CacheFile(path, fd, header)
    granules = random.Random(1).sample(range(geometry.granules), geometry.slots)
    for slot, granule in enumerate(granules, 1):
        file.granule_of[slot] = granule
        file.state[slot] = state_word(granule, 0xFFFF, 0)
    del granules
    file.close(clean=False)
    print(
        f"{geometry.slots:,} slots, index {geometry.data_offset >> 20} MiB in the file", flush=True
    )
    try:
        # A fresh process: nothing of the filling in its memory.
        subprocess.run([sys.executable, "-m", __spec__.name, str(directory), path], check=True)
    finally:
        os.unlink(path)


def measure(path: str) -> None:
    before = _resident_mib()
    fd = os.open(path, os.O_RDWR)
    geometry = geometry_for(disk_bytes=1 << 40, cache_bytes=100 << 30)
    header = new_header(geometry, Identity("nbd://bench", ""), boot_id(), 0)
    began, began_cpu = time.perf_counter(), time.process_time()
    file = CacheFile(path, fd, header)
    turn = Turn()
    server = NullServer(turn)
    server.size_bytes = 1 << 40
    cache = Cache(file, server, Options(), clock=time.monotonic, turn=turn)
    took = time.perf_counter() - began
    cpu = time.process_time() - began_cpu
    after = _resident_mib()
    print(f"warm start {took:.2f} s ({cpu:.2f} s of CPU), {cache.index.used:,} slots in use")
    print({name: after[name] - before[name] for name in after}, "MiB more than before")


if __name__ == "__main__":
    if len(sys.argv) > 2:
        measure(sys.argv[2])
    else:
        main()
