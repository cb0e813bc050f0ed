"""The bridge beside qemu-storage-daemon: same NBD server, same client, alternating runs.

Both serve the same `nbdkit memory` export (unix socket) as a vhost-user-blk device; `qemu-img
bench` with libblkio plays the guest. Each workload is run on one and the other in turn, and the
medians and their ratio are printed. The machine's other load hits both alike.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

from tests.peers import peer_command

_DISK_BYTES = 1 << 30


@dataclass(frozen=True)
class Workload:
    """One line of the table. `required` is the ratio below which it is a defect."""

    name: str
    block_bytes: int
    depth: int
    count: int
    write: bool
    required: float
    step_blocks: int = 5
    """Distance from one request to the next: 1 is sequential."""
    flush_every: int = 0
    """A flush after this many writes; 0: none."""


WORKLOADS = [
    Workload("4 KiB read, depth 1", 4096, 1, 30_000, False, 1.2),
    Workload("4 KiB read, depth 32", 4096, 32, 150_000, False, 1.3),
    Workload("4 KiB write, depth 1", 4096, 1, 30_000, True, 1.2),
    Workload("4 KiB write, depth 32", 4096, 32, 150_000, True, 1.1),
    Workload("1 MiB read, depth 8", 1 << 20, 8, 4_000, False, 0.95),
    Workload("1 MiB write, depth 8", 1 << 20, 8, 4_000, True, 0.95),
]


@contextlib.contextmanager
def running(
    *argv: str, ready: Path | None = None, output: IO[bytes] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """A process that lives for the block; `ready` is the socket that appears when it is up."""
    process = subprocess.Popen(argv, stdout=output, stderr=output)
    try:
        deadline_s = time.monotonic() + 30
        while ready is not None and not ready.exists():
            if process.poll() is not None or time.monotonic() > deadline_s:
                raise SystemExit(f"{argv[0]} did not come up")
            time.sleep(0.02)
        yield process
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def memory_server(socket: Path) -> contextlib.AbstractContextManager[subprocess.Popen[bytes]]:
    """nbdkit's own memory plugin: as fast a server as there is."""
    return running("nbdkit", "-f", "-U", str(socket), "memory", str(_DISK_BYTES), ready=socket)


def bridge(
    nbd: Path, socket: Path, *options: str
) -> contextlib.AbstractContextManager[subprocess.Popen[bytes]]:
    """The bridge on the server at `nbd`."""
    return running(
        sys.executable,
        "-m",
        "bridge",
        "serve",
        f"nbd+unix:///?socket={nbd}",
        "--socket-path",
        str(socket),
        "--log-level",
        "warning",
        *(options or ("--cache-mode", "off")),
        ready=socket,
    )


def storage_daemon(
    nbd: Path | None, socket: Path
) -> contextlib.AbstractContextManager[subprocess.Popen[bytes]]:
    """qemu-storage-daemon on the server at `nbd`, or (None) on no storage at all."""
    node = (
        f"driver=nbd,node-name=disk,server.type=unix,server.path={nbd},discard=unmap"
        if nbd is not None
        else f"driver=null-co,node-name=disk,size={_DISK_BYTES}"
    )
    return running(
        *peer_command(
            "qemu-storage-daemon",
            "--object",
            "iothread,id=io",
            "--blockdev",
            node,
            "--export",
            "type=vhost-user-blk,id=export,node-name=disk,addr.type=unix,"
            f"addr.path={socket},writable=on,num-queues=1,iothread=io",
        ),
        ready=socket,
    )


def measure(socket: Path, workload: Workload) -> float:
    """Requests per second of one run of `workload`."""
    argv = peer_command(
        "qemu-img",
        "bench",
        *("-t", "none"),
        *("-c", str(workload.count)),
        *("-d", str(workload.depth)),
        *("-s", str(workload.block_bytes)),
        *("-S", str(workload.block_bytes * workload.step_blocks)),
        *(("-w",) if workload.write else ()),
        *((f"--flush-interval={workload.flush_every}",) if workload.flush_every else ()),
        "--image-opts",
        f"driver=virtio-blk-vhost-user,path={socket},cache.direct=on",
    )
    output = subprocess.run(argv, check=True, capture_output=True, text=True).stdout
    seconds = next(
        float(line.split()[3]) for line in output.splitlines() if line.startswith("Run completed")
    )
    return workload.count / seconds


def main() -> None:
    """Run the table and print it."""
    parser = argparse.ArgumentParser(prog="./run bench peer", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="alternating runs of each workload")
    parser.add_argument("--only", default="", help="workloads whose name has this in it")
    parser.add_argument("--scale", type=float, default=1.0, help="factor on the request counts")
    arguments = parser.parse_args()
    with (
        tempfile.TemporaryDirectory(prefix="bench-", dir="/tmp") as name,
        contextlib.ExitStack() as up,
    ):
        directory = Path(name)
        nbd, ours, theirs = directory / "nbd", directory / "bridge", directory / "qsd"
        up.enter_context(memory_server(nbd))
        up.enter_context(bridge(nbd, ours))
        up.enter_context(storage_daemon(nbd, theirs))
        print(f"{'':24}{'nbd-bridge':>12}{'qemu-s-d':>12}{'ratio':>8}{'required':>10}")
        for workload in WORKLOADS:
            if arguments.only not in workload.name:
                continue
            scaled = replace(workload, count=int(workload.count * arguments.scale))
            results: dict[Path, list[float]] = {ours: [], theirs: []}
            for _ in range(arguments.rounds):
                for socket, rates in results.items():
                    rates.append(measure(socket, scaled))
            ours_median, theirs_median = (statistics.median(rates) for rates in results.values())
            ratio = ours_median / theirs_median
            mark = "" if ratio >= workload.required else "  below"
            print(
                f"{workload.name:24}{ours_median:12,.0f}{theirs_median:12,.0f}"
                f"{ratio:8.2f}{workload.required:10.2f}{mark}",
                flush=True,
            )


if __name__ == "__main__":
    main()
