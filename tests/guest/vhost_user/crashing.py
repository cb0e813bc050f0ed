"""A back-end process that is killed between any two lines of the data path.

`python -m tests.guest.vhost_user.crashing DIR` is a process that has everything imported and forks
a back-end for every line that it reads. Each child serves DIR/disk.sock from DIR/image, and counts
the lines of Python that it executes in the files of the data path once DIR/control says so; at
the line that DIR/control names it kills itself (SIGKILL): whatever was stored by then is stored,
nothing else is. So a test can stop a back-end at every single step of the in-flight protocol.

`Zygote` is the test's side of it.
"""

from __future__ import annotations

import mmap
import os
import select
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import structlog
import trio

from bridge.datapath.loop import Loop
from bridge.datapath.request import Request, Target
from bridge.datapath.rows import Usual
from bridge.datapath.turn import Turn
from bridge.guest.device import BlkDevice
from bridge.guest.vhost_user.backend import serve
from bridge.guest.vhost_user.listener import Listener
from bridge.guest.virtio.blk_config import DiskGeometry
from tests.datapath.loopback import Loopback, hits_of
from tests.guest.memory_target import MemoryTarget

IMAGE_BYTES = 1 << 20
TRACED = (
    "bridge/datapath/rows.py",
    "bridge/datapath/usual.py",
    "bridge/guest/ring.py",
    "bridge/guest/virtio/blk.py",
    "bridge/guest/virtio/blk_ranges.py",
    "bridge/guest/virtio/blk_request.py",
    "bridge/guest/virtio/inflight.py",
    "bridge/guest/virtio/inflight_packed.py",
    "bridge/guest/virtio/packed_queue.py",
    "bridge/guest/virtio/split_queue.py",
)
_WORDS = struct.Struct("=III")


class Control:
    """Three words in a shared file: counting is on, the line to die at, the lines so far."""

    def __init__(self, path: Path) -> None:
        with path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), 4096)
        self.words = memoryview(self._map).cast("I")

    def reset(self, kill_at: int) -> None:
        """Count from 0, once `arm` is called; 0: never kill."""
        self.words[0] = self.words[2] = 0
        self.words[1] = kill_at

    def arm(self) -> None:
        """Count from now on."""
        self.words[0] = 1

    @property
    def lines(self) -> int:
        """Lines executed since `arm`."""
        return self.words[2]


class LateTarget(MemoryTarget):
    """Executes at once, but answers later and in another order: half now, half a turn later."""

    def __init__(self, turn: Turn, data: mmap.mmap) -> None:
        super().__init__(turn, len(data), data)
        self._executed: list[Request] = []

    def submit(self, request: Request) -> None:
        """See `Target`."""
        op, offset, length = request.op, request.offset, request.length
        self.execute(Request(op, offset, length, request.buffers, lambda done: None))
        if not self._executed:
            self.turn.at_end(self._answer)
        self._executed.append(request)

    def _answer(self) -> None:
        half = -(-len(self._executed) // 2)
        executed, self._executed = self._executed, []
        for request in reversed(executed[:half]):
            self.turn.finish(request)
        self._executed = executed[half:]
        if self._executed:
            self.turn.at_end(self._answer)


def _trace(control: Control) -> Callable[[FrameType, str, Any], Any]:
    words = control.words

    def line(frame: FrameType, event: str, argument: Any) -> Any:
        if event == "line" and words[0]:
            words[2] += 1
            if words[2] == words[1]:
                os.kill(os.getpid(), signal.SIGKILL)
        return line

    def call(frame: FrameType, event: str, argument: Any) -> Any:
        return line if frame.f_code.co_filename.endswith(TRACED) else None

    return call


def _target(loop: Loop, image: Any, words: set[str]) -> tuple[Target, Usual | None]:
    """The disk below, and what serves the usual requests."""
    late = "late" in words
    if "sent" in words:
        loopback = Loopback(loop.turn, image, late=late)
        return loopback, loopback.usual
    target = LateTarget(loop.turn, image) if late else MemoryTarget(loop.turn, IMAGE_BYTES, image)
    return target, hits_of(image) if "hits" in words else None


async def _serve(directory: Path, words: set[str]) -> None:
    with (directory / "image").open("r+b") as file:
        image = mmap.mmap(file.fileno(), IMAGE_BYTES)
    loop = Loop(poll_us=0)
    target, usual = _target(loop, image, words)
    geometry = DiskGeometry(IMAGE_BYTES)
    device = BlkDevice(loop, target, geometry, serial="crash", max_queues=2, usual=usual)
    with Listener.at_path(directory / "disk.sock") as listener:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(loop.run)
            nursery.start_soon(device.run)
            os.write(1, f"{os.getpid()}\n".encode())
            await serve(device, listener)


def _child(directory: Path, words: set[str]) -> None:
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger("critical"))
    sys.settrace(_trace(Control(directory / "control")))
    trio.run(_serve, directory, words)


def main() -> None:
    """Fork a back-end for each line on standard input; end with it."""
    directory = Path(sys.argv[1])
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps the children
    children = []
    for line in sys.stdin:
        pid = os.fork()
        if not pid:
            try:
                _child(directory, set(line.split()))
            finally:
                os._exit(1)
        children.append(pid)


class Zygote:
    """Back-ends to be killed: `start` one, `wait_dead` for it or `kill` it."""

    def __init__(self, directory: Path) -> None:
        (directory / "image").write_bytes(bytes(IMAGE_BYTES))
        (directory / "control").write_bytes(bytes(4096))
        self.path = directory / "disk.sock"
        self.control = Control(directory / "control")
        with (directory / "image").open("r+b") as file:
            self.image = mmap.mmap(file.fileno(), IMAGE_BYTES)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.guest.vhost_user.crashing", str(directory)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=Path(__file__).parents[3],
        )
        self._pidfd = -1

    def start(self, *, how: str, kill_at: int) -> None:
        """Start a back-end; it listens when this returns. `how`: "late" if it answers late, "sent"
        if usual requests go to a server, "hits" if they are hits of a cache."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self.control.reset(kill_at)
        self._process.stdin.write(how.encode() + b"\n")
        self._process.stdin.flush()
        pid = int(self._process.stdout.readline())
        self._pidfd = os.pidfd_open(pid)

    @property
    def is_dead(self) -> bool:
        """The back-end is no more."""
        return bool(select.select([self._pidfd], [], [], 0)[0])

    def kill(self) -> None:
        """End the back-end, if it has not ended by itself."""
        if self._pidfd >= 0:
            if not self.is_dead:
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
                select.select([self._pidfd], [], [])
            os.close(self._pidfd)
            self._pidfd = -1

    def close(self) -> None:
        """End everything."""
        self.kill()
        self._process.__exit__(None, None, None)


if __name__ == "__main__":
    assert threading.active_count() == 1
    main()
