"""Newer peers than this host has: a Debian trixie chroot with QEMU 10, nbdkit 1.42, libnbd 1.22.

    python -m tests.peers setup            build it (about a minute, once; needs root)
    python -m tests.peers run CMD ARG...   run a command inside
    python -m tests.peers remove           unmount and delete it

The host's /tmp is the chroot's /tmp, so unix sockets under /tmp are reachable from both sides.
Building and mounting take a lock: any number of processes may ask at once.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(os.environ.get("NBD_BRIDGE_PEERS", "/var/tmp/nbd-bridge-peers")).resolve()
RELEASE = "trixie"
PACKAGES = (
    "qemu-utils",
    "qemu-block-extra",
    "nbdkit",
    "nbdkit-plugin-python",
    "libnbd-bin",
    "python3-libnbd",
    "nbd-server",
    "libblkio1",
)
_MOUNTS = ("proc", "sys", "dev", "tmp")
_READY = ".nbd-bridge-ready"


class PeersMissing(Exception):
    """The chroot is not there and cannot be built here; the text says why."""


def peer_command(*argv: str) -> list[str]:
    """The command line that runs `argv` inside; builds the chroot first where need be.

    A path in `argv` is one of the chroot; only /tmp is shared. Raises PeersMissing.
    """
    setup()
    return [_tool("chroot"), str(ROOT), *argv]


def setup() -> None:
    """Build the chroot unless it is there, and mount what it needs. Raises PeersMissing."""
    if os.geteuid() != 0:
        raise PeersMissing("the chroot with newer peers needs root")
    with _locked():
        if not (ROOT / _READY).exists():
            _remove()  # what an interrupted build left
            _build()
        _mount()


def remove() -> None:
    """Unmount and delete the chroot."""
    with _locked():
        _remove()


def _build() -> None:
    if shutil.which("debootstrap", path=_path()) is None:
        _run("apt-get", "update", "-q")
        _run("apt-get", "install", "-qy", "--no-install-recommends", "debootstrap")
    minimal_system(ROOT, RELEASE)
    _mount()
    _run("chroot", str(ROOT), "apt-get", "update", "-q")
    _run("chroot", str(ROOT), "apt-get", "install", "-qy", "--no-install-recommends", *PACKAGES)
    (ROOT / _READY).touch()


def minimal_system(root: Path, release: str) -> None:
    """A Debian with nothing but apt in `root`. Raises PeersMissing."""
    mirror = _debian_mirror()
    _run(
        "debootstrap",
        "--variant=minbase",
        "--include=ca-certificates",
        release,
        str(root),
        *([mirror] if mirror else []),
    )
    # No service is started by its installation.
    policy = root / "usr/sbin/policy-rc.d"
    policy.write_text("#!/bin/sh\nexit 101\n")
    policy.chmod(0o755)


def _mount() -> None:
    for name in _MOUNTS:
        target = ROOT / name
        target.mkdir(exist_ok=True)
        if not _mount_count(target):
            _run("mount", "--bind", f"/{name}", str(target))


def _mount_count(target: Path) -> int:
    """How many mounts sit on `target`.

    From the kernel's list: os.path.ismount takes a bind mount within one file system for none.
    """
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    return sum(line.split()[4] == str(target) for line in lines)


def _remove() -> None:
    for name in reversed(_MOUNTS):
        for _ in range(_mount_count(ROOT / name)):
            _run("umount", str(ROOT / name))
    for name in _MOUNTS:
        # Asked of the files themselves: deleting through a bind mount would empty the host's /tmp.
        if (ROOT / name).exists() and os.path.samefile(ROOT / name, f"/{name}"):
            raise PeersMissing(f"/{name} is still mounted at {ROOT / name}")
    if ROOT.exists():
        _run("rm", "-rf", "--one-file-system", str(ROOT))


def _debian_mirror() -> str | None:
    """The Debian mirror that this machine's apt uses; None leaves the choice to debootstrap."""
    apt = Path("/etc/apt")
    candidates = [*sorted(apt.glob("sources.list.d/*.sources")), apt / "sources.list"]
    candidates += sorted(apt.glob("sources.list.d/*.list"))
    for path in candidates:
        with contextlib.suppress(OSError):
            for line in path.read_text().splitlines():
                match = re.search(r"https?://\S*/debian/?(?=\s|$)", line)
                if match and not line.lstrip().startswith("#"):
                    return match[0]
    return None


@contextlib.contextmanager
def _locked() -> Iterator[None]:
    with open(f"{ROOT}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _run(name: str, *arguments: str) -> None:
    """Run one step of the building. Raises PeersMissing with the end of its output."""
    environment = {
        "PATH": _path(),
        "LC_ALL": "C",
        "DEBIAN_FRONTEND": "noninteractive",
        **{key: value for key, value in os.environ.items() if key.lower().endswith("_proxy")},
    }
    done = subprocess.run(
        [_tool(name), *arguments],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )
    if done.returncode != 0:
        tail = done.stdout.decode(errors="replace")[-1500:]
        raise PeersMissing(f"{name} {' '.join(arguments)[:200]} failed:\n{tail}")


def _tool(name: str) -> str:
    path = shutil.which(name, path=_path())
    if path is None:
        raise PeersMissing(f"{name} is not installed")
    return path


def _path() -> str:
    return os.environ.get("PATH", "/usr/bin:/bin") + ":/usr/local/sbin:/usr/sbin:/sbin"


def main(arguments: list[str]) -> int:
    """The command line; see the module's text."""
    try:
        match arguments:
            case ["setup"]:
                setup()
            case ["run", *command] if command:
                argv = peer_command(*command)
                os.execv(argv[0], argv)
            case ["remove"]:
                remove()
            case _:
                print(__doc__, file=sys.stderr)
                return 2
    except PeersMissing as error:
        print(f"peers: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
