"""The Debian package in systems that have nothing else: installed, used, upgraded, removed."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from bridge import __version__
from tests.packaging.builds import ROOT
from tests.peers import minimal_system
from tests.processes import short_directory
from tests.tools import require

pytestmark = pytest.mark.timeout(1800)

_INSIDE = (
    "mount -t proc proc {root}/proc && mount --rbind /dev {root}/dev && "
    "exec chroot {root} {command}"
)
"""In a mount namespace of its own, so that nothing stays mounted."""


class System:
    """A small Debian in a directory."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def run(self, command: str, *, status: int = 0) -> str:
        """What a shell's `command` prints there, errors included."""
        inner = f"sh -c {shlex.quote(command)}"
        script = _INSIDE.format(root=shlex.quote(str(self.root)), command=inner)
        done = subprocess.run(
            ["unshare", "--mount", "sh", "-c", script],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            env={
                "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
                "LC_ALL": "C",
                "DEBIAN_FRONTEND": "noninteractive",
                **{
                    key: value
                    for key, value in os.environ.items()
                    if key.endswith(("proxy", "PROXY"))
                },
            },
        )
        assert done.returncode == status, done.stdout[-3000:]
        return done.stdout


@pytest.fixture(scope="module")
def package() -> Iterator[Path]:
    with short_directory() as folder:
        argv = [sys.executable, str(ROOT / "deb" / "build.py"), str(folder)]
        done = subprocess.run(argv, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        yield Path(done.stdout.strip())


@pytest.fixture(params=["bookworm", "trixie"])
def system(request: pytest.FixtureRequest) -> Iterator[System]:
    require("peers")
    root = Path(f"/var/tmp/nbd-bridge-deb-{os.getpid()}-{request.param}")
    try:
        minimal_system(root, request.param)
        yield System(root)
    finally:
        # Nothing is mounted there any more: the namespaces have ended with their commands.
        shutil.rmtree(root, ignore_errors=True)


def test_package_is_all_that_a_host_needs(package: Path, system: System) -> None:
    shutil.copy(package, system.root / package.name)
    system.run("apt-get update -q")
    system.run(
        f"apt-get install -qy --no-install-recommends ./{package.name} nbdkit nbdkit-plugin-python"
    )

    assert f"nbd-bridge, version {__version__}, engine compiled" in system.run(
        "nbd-bridge --version"
    )
    assert "kvm" in system.run("id -nG nbd-bridge").split()
    # Services could not write what Python compiles.
    assert list((system.root / "usr/lib/nbd-bridge/trio").glob("__pycache__/*.pyc"))
    # As the service's user, with the distribution's own nbdkit and Python.
    as_user = "setpriv --reuid=nbd-bridge --regid=nbd-bridge --init-groups env HOME=/tmp"
    assert "PASS" in system.run(f"{as_user} nbd-bridge demo --no-guest")
    system.run(
        "cd /etc/nbd-bridge && cp /usr/share/doc/nbd-bridge/examples/vm0.toml.example vm0.toml"
        " && nbd-bridge config check"
    )
    plugin = system.run("nbdkit python $(nbd-bridge plugin-path) --dump-plugin")
    assert "name=" in plugin
    assert (system.root / "usr/share/man/man1/nbd-bridge-serve.1.gz").is_file()
    units = "/usr/lib/systemd/system/nbd-bridge@.service /usr/lib/systemd/system/nbd-bridge@.socket"
    system.run(f"systemd-analyze verify --man=no {units}")

    # Over itself, as an upgrade; then away.
    system.run(f"dpkg -i /{package.name}")
    assert "PASS" in system.run(f"{as_user} nbd-bridge demo --no-guest")
    system.run("apt-get purge -qy nbd-bridge")
    assert not (system.root / "usr/lib/nbd-bridge").exists()
    assert (system.root / "etc/nbd-bridge/vm0.toml").is_file()  # The administrator's.
