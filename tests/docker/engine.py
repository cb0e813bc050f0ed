"""A Docker daemon: the one that answers, or one of our own that is stopped again."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.docker.command import Failed, find, install, run

_START_LIMIT_S = 180.0
_STOP_LIMIT_S = 40.0
_PRIVATE_ROOT = Path("/var/tmp/nbd-bridge-docker")
"""Images are kept here from run to run when the default place does not work."""

_ATTEMPTS: Sequence[Sequence[str]] = (
    (),
    ("--data-root", str(_PRIVATE_ROOT / "overlay2"), "--storage-driver", "overlay2"),
    ("--data-root", str(_PRIVATE_ROOT / "vfs"), "--storage-driver", "vfs"),
)


@contextlib.contextmanager
def docker_engine() -> Iterator[str]:
    """The address of a daemon (for DOCKER_HOST). Installs and starts one where there is none.

    Raises Failed when none can be had.
    """
    if find("docker") is None or find("dockerd") is None:
        install(["docker.io"])
    address = os.environ.get("DOCKER_HOST") or "unix:///var/run/docker.sock"
    if answers(address):
        yield address
        return
    if os.geteuid() != 0:
        raise Failed(f"no Docker daemon answers at {address}, and starting one needs root")
    with tempfile.TemporaryDirectory(prefix="nbd-bridge-dockerd-", dir="/run") as folder:
        process, address = _start(Path(folder))
        try:
            yield address
        finally:
            _stop(process)


def answers(address: str) -> bool:
    """Whether a daemon answers at `address`."""
    docker = find("docker")
    if docker is None:
        return False
    done = run(docker, "-H", address, "version", "--format", "{{.Server.Version}}",
               limit_s=100, check=False)  # fmt: skip
    return done.returncode == 0


def _start(folder: Path) -> tuple[subprocess.Popen[bytes], str]:
    said = ""
    for number, options in enumerate(_ATTEMPTS):
        state = folder / str(number)
        state.mkdir()
        address = f"unix://{state}/docker.sock"
        log = state / "log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                [find("dockerd") or "dockerd", "--host", address, "--exec-root", f"{state}/exec",
                 "--pidfile", f"{state}/pid", *options],
                stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True,
                env={**os.environ, "PATH": os.environ.get("PATH", "") + ":/usr/sbin:/sbin"},
            )  # fmt: skip
        deadline = time.monotonic() + _START_LIMIT_S
        while process.poll() is None and time.monotonic() < deadline:
            if answers(address):
                return process, address
            time.sleep(0.3)
        _stop(process)
        said = log.read_text(errors="replace")[-1500:]
    raise Failed(f"dockerd does not start:\n{said}")


def _stop(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    try:
        process.wait(_STOP_LIMIT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
