"""The plugin beside what a user would run instead: same client, same machine, alternating runs.

    python -m tests.bench.plugin             the file store beside nbdkit's own file plugin (in C)
    python -m tests.bench.plugin --rbd       the rbd store beside qemu-nbd, on one image
    python -m tests.bench.plugin --threads   one store at several thread counts

`qemu-img bench` over a unix socket is the client of both. Medians of the rounds and their ratio
are printed; exit status 1 when a ratio is below its target.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from tests.ceph.cluster import POOL, Cluster
from tests.plugin.server import HOST, PEERS, Nbdkit
from tests.tools import need

DISK_BYTES = 256 << 20
_IMAGE = "bench"
_STRIDE_BYTES = 20480
"""The step between small requests: not sequential, so that nothing merges them."""

Server = Callable[[], AbstractContextManager[str]]
"""Starts a server and gives its URI."""


@dataclass(frozen=True)
class Workload:
    """One line of the table. `required` is the ratio below which it is a defect."""

    name: str
    block_bytes: int
    count: int
    write: bool
    required: float
    depth: int = 16


FILE = [
    Workload("4 KiB read, depth 16", 4096, 60_000, False, 0.8),
    Workload("4 KiB write, depth 16", 4096, 60_000, True, 0.8),
    Workload("1 MiB read, depth 16", 1 << 20, 4_000, False, 0.9),
    Workload("1 MiB write, depth 16", 1 << 20, 4_000, True, 0.9),
]
RBD = [
    Workload("4 KiB read, depth 16", 4096, 6_000, False, 0.8),
    Workload("4 KiB write, depth 16", 4096, 6_000, True, 0.8),
    Workload("1 MiB read, depth 16", 1 << 20, 400, False, 0.8),
    Workload("1 MiB write, depth 16", 1 << 20, 200, True, 0.8),
]


def measure(uri: str, load: Workload) -> float:
    """Requests per second."""
    stride = _STRIDE_BYTES if load.block_bytes < _STRIDE_BYTES else load.block_bytes
    command = [need("qemu-img"), "bench", "-f", "raw", "-t", "writeback"]
    command += ["-c", str(load.count), "-d", str(load.depth), "-s", str(load.block_bytes)]
    command += ["-S", str(stride), *(["-w"] if load.write else []), uri]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    match = re.search(r"completed in ([0-9.]+) seconds", done.stdout)
    if match is None:
        raise SystemExit(f"{' '.join(command)}: {done.stderr}")
    return load.count / float(match[1])


def compare(servers: dict[str, Server], loads: list[Workload], rounds: int) -> bool:
    """Run every workload on every server in turn; True if the targets are reached.

    The first server is the one to compare with; of the others the better one counts, the choice
    between them being the operator's (README.md says when which).
    """
    found: dict[tuple[str, str], list[float]] = {}
    for number in range(rounds):
        # Whoever comes second finds a warmer machine: change places every round.
        order = list(servers) if number % 2 == 0 else list(reversed(servers))
        for name in order:
            with servers[name]() as uri:
                for load in loads:
                    found.setdefault((name, load.name), []).append(measure(uri, load))
    good = True
    base, *ours = servers
    for load in loads:
        medians = {name: statistics.median(found[name, load.name]) for name in servers}
        shown = "  ".join(
            f"{name} {value:9,.0f}/s ({value / medians[base]:.2f})"
            for name, value in medians.items()
        )
        reached = max(medians[name] for name in ours) >= load.required * medians[base]
        good &= reached
        print(f"{load.name:24} {shown}  {'' if reached else f'BELOW {load.required}'}")
    return good


# --- servers ---------------------------------------------------------------------------------


def nbdkit(*parameters: str, export: str = "", where: str = HOST, threads: int = 0) -> Server:
    @contextlib.contextmanager
    def serve() -> Iterator[str]:
        options = ("-t", str(threads)) if threads else ()
        with Nbdkit(*parameters, options=options, where=where) as server:
            yield server.uri(export)

    return serve


def nbdkit_file(path: Path, *, where: str) -> Server:
    @contextlib.contextmanager
    def serve() -> Iterator[str]:
        with Nbdkit("file", str(path), plugin=None, where=where) as server:
            yield server.uri()

    return serve


def qemu_nbd(cluster: Cluster) -> Server:
    @contextlib.contextmanager
    def serve() -> Iterator[str]:
        directory = Path(tempfile.mkdtemp(prefix="nbp-"))
        image = f"rbd:{POOL}/{_IMAGE}:conf={cluster.conf}"
        command = [need("qemu-nbd"), "-t", "-f", "raw", "--cache=writeback", "-e", "4"]
        process = subprocess.Popen([*command, "-k", str(directory / "s"), image])
        try:
            while not (directory / "s").exists():
                if process.poll() is not None:
                    raise SystemExit("qemu-nbd did not start (is qemu-block-extra installed?)")
                time.sleep(0.02)
            yield f"nbd+unix:///?socket={directory}/s"
        finally:
            process.terminate()
            process.wait()
            shutil.rmtree(directory)

    return serve


# --- the three comparisons -------------------------------------------------------------------


@contextlib.contextmanager
def filled_files() -> Iterator[tuple[Path, Path]]:
    """Two equal files, written once, so that both servers read from the page cache."""
    directory = Path(tempfile.mkdtemp(prefix="nbp-bench-", dir="/tmp"))
    try:
        for name in ("theirs", "ours"):
            with open(directory / name, "wb") as file:
                for _ in range(DISK_BYTES >> 20):
                    file.write(os.urandom(1 << 20))
                os.fsync(file.fileno())
        yield directory / "theirs", directory / "ours"
    finally:
        shutil.rmtree(directory)


def against_file_plugin(rounds: int, where: str) -> bool:
    with filled_files() as (theirs, ours):
        servers = {
            "nbdkit-file-plugin": nbdkit_file(theirs, where=where),
            "one thread": nbdkit(f"file={ours}", where=where),
            "-t 4 parallel=on": nbdkit(f"file={ours}", "parallel=on", where=where, threads=4),
        }
        return compare(servers, FILE, rounds)


def by_threads(rounds: int, where: str) -> bool:
    with filled_files() as (_, ours):
        servers = {"one thread": nbdkit(f"file={ours}", where=where)}
        for threads in (2, 4, 16):
            parameters = (f"file={ours}", "parallel=on")
            servers[f"-t {threads}"] = nbdkit(*parameters, where=where, threads=threads)
        compare(servers, FILE, rounds)
        return True


@contextlib.contextmanager
def cluster_with_image() -> Iterator[Cluster]:
    cluster = Cluster(Path(tempfile.mkdtemp(prefix="nbp-ceph-", dir="/tmp")))
    try:
        cluster.start()
        cluster.rbd("create", _IMAGE, "--size", f"{DISK_BYTES}B")
        cluster.rbd(
            *("bench", _IMAGE, "--io-type", "write", "--io-size", "4M"),
            *("--io-total", str(DISK_BYTES), "--io-threads", "1"),
        )
        yield cluster
    finally:
        cluster.remove()


def against_qemu_nbd(rounds: int, threads: tuple[int, ...] = (16,)) -> bool:
    with cluster_with_image() as cluster:
        parameters = ("store=rbd", f"pool={POOL}", f"conf={cluster.conf}")
        servers = {"qemu-nbd": qemu_nbd(cluster)}
        for count in threads:
            servers[f"nbd_plugin -t {count}"] = nbdkit(*parameters, export=_IMAGE, threads=count)
        return compare(servers, RBD, rounds)


def main() -> None:
    """The command line; see the module's text."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rbd", action="store_true")
    parser.add_argument("--threads", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--where", choices=(HOST, PEERS), default=HOST, help="which nbdkit")
    options = parser.parse_args()
    if options.rbd:
        threads = (4, 8, 16) if options.threads else (16,)
        good = against_qemu_nbd(options.rounds, threads)
    elif options.threads:
        good = by_threads(options.rounds, options.where)
    else:
        good = against_file_plugin(options.rounds, options.where)
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
