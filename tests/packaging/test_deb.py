"""The Debian package in systems that have nothing else: installed, used, upgraded, removed."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from bridge import __version__
from tests.packaging.builds import ROOT
from tests.peers import minimal_system
from tests.ports import free_port
from tests.processes import short_directory
from tests.tools import HUNG_S, require

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

    @contextmanager
    def booted(self) -> Iterator[Callable[[str], str]]:
        """The same with its systemd as process 1 of a namespace; yields what runs a command there:
        what that prints, errors included. Its exit status is `status: N` at the end."""
        (self.root / "boot.sh").write_text(_BOOT)
        root = shlex.quote(str(self.root))
        # The sandboxes of services need a root that is a mount.
        inner = f"mount --make-rprivate / && mount --bind {root} {root} && cd {root}"
        inner += f" && exec chroot {root} sh /boot.sh"
        namespaces = ["--mount", "--pid", "--uts", "--ipc", "--cgroup"]
        argv = ["unshare", "--fork", "--kill-child", *namespaces, "sh", "-c", inner]
        outer = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        children = Path(f"/proc/{outer.pid}/task/{outer.pid}/children")

        def run(command: str) -> str:
            process = children.read_text().strip()
            enter = ["nsenter", f"--target={process}", "-m", "-p", "-u", "-i", "-C", "-r", "-w"]
            done = subprocess.run(
                [*enter, "sh", "-c", f"{command}; echo status: $?"],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                check=False,
                env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C"},
            )
            return done.stdout

        try:
            deadline = time.monotonic() + 2 * HUNG_S
            # "degraded": one of the system's own units does not like it here. Ours are looked at.
            while not re.search("running|degraded", said := run("systemctl is-system-running")):
                assert time.monotonic() < deadline, said
                time.sleep(0.2)
            yield run
        finally:
            outer.kill()
            outer.wait()


_BOOT = """
mount -t proc proc /proc && mount -t sysfs sysfs /sys && mount -t cgroup2 cgroup2 /sys/fs/cgroup
mount -t tmpfs tmpfs /run && mount -t tmpfs tmpfs /tmp
container=test exec /lib/systemd/systemd --unit=basic.target --log-target=null
"""


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
    documents = system.root / "usr/share/doc/nbd-bridge"
    for each in (documents / "README.md", *documents.glob("docs/*.md")):
        for link in re.findall(r"\]\(([\w./-]+)[)#]", each.read_text()):
            assert (each.parent / link).exists(), f"{each.name}: {link}"
    units = "/usr/lib/systemd/system/nbd-bridge@.service /usr/lib/systemd/system/nbd-bridge@.socket"
    system.run(f"systemd-analyze verify --man=no {units}")

    with system.booted() as run:
        check_services(run, package.name)

    # Over itself, as an upgrade; then away.
    system.run(f"dpkg -i /{package.name}")
    assert "PASS" in system.run(f"{as_user} nbd-bridge demo --no-guest")
    system.run("apt-get purge -qy nbd-bridge")
    assert not (system.root / "usr/lib/nbd-bridge").exists()
    assert (system.root / "etc/nbd-bridge/vm0.toml").is_file()  # The administrator's.


def check_services(run: Callable[[str], str], package: str) -> None:
    """What the units do under a real systemd."""

    def good(command: str) -> str:
        said = run(command)
        assert said.endswith("status: 0\n"), f"{command}: {said}"
        return said.removesuffix("status: 0\n").strip()

    def process() -> str:
        return good("systemctl show -P MainPID nbd-bridge@vm0")

    good("cp /usr/share/doc/nbd-bridge/examples/vm0.nbdkit.example /etc/nbd-bridge/vm0.nbdkit")
    good("echo 'cache-size = \"64M\"' >>/etc/nbd-bridge/vm0.toml")
    # In the wrong order: the bridge waits for its server.
    good("systemctl start --no-block nbd-bridge@vm0")
    good("systemctl start nbd-bridge-nbdkit@vm0")
    good("systemctl start nbd-bridge@vm0")
    assert good("systemctl show -P StatusText nbd-bridge@vm0") == "guest none, server connected"
    assert good("stat -c '%a %U %G' /run/nbd-bridge/vm0.sock") == "660 nbd-bridge kvm"
    good("ls /var/cache/nbd-bridge/*.cache")
    good("nbd-bridge status vm0")
    as_nobody = "setpriv --reuid=nobody --regid=nogroup --clear-groups"
    assert "no permission" in run(f"{as_nobody} nbd-bridge status vm0")

    port = free_port()  # The network is that of the host.
    listen = f"NBD_BRIDGE_EXPORTER_LISTEN=127.0.0.1:{port}"
    good(f"echo {listen} >/etc/nbd-bridge/exporter.env && systemctl start nbd-bridge-exporter")
    ask = f"from urllib.request import urlopen as u; print(u('http://127.0.0.1:{port}/metrics').read())"
    assert 'nbd_bridge_up{disk="vm0"} 1' in good(f'python3 -c "{ask}"')

    before = process()
    good("systemctl reload nbd-bridge@vm0")
    # A newer package: disks in use go on with it.
    good(f"dpkg -i /{package}")
    assert process() == before
    assert 'nbd_bridge_up{disk="vm0"} 1' in good(f'python3 -c "{ask}"')
    good("systemctl is-active nbd-bridge-exporter && systemctl stop nbd-bridge-exporter")
    log = good("journalctl --no-pager -o cat -u nbd-bridge@vm0")
    assert log.count("another program takes over") == 2
    good("cp /etc/nbd-bridge/vm0.toml /tmp/good && echo 'serial = 5' >>/etc/nbd-bridge/vm0.toml")
    assert "status: 1" in run("systemctl reload nbd-bridge@vm0")
    assert process() == before
    good("cp /tmp/good /etc/nbd-bridge/vm0.toml")

    good("systemctl restart nbd-bridge@vm0")
    good("kill -9 $(systemctl show -P MainPID nbd-bridge@vm0)")
    good("timeout 60 sh -c 'until systemctl is-active nbd-bridge@vm0 && nbd-bridge status vm0; do"
         " sleep 0.2; done'")  # fmt: skip
    good("systemctl stop nbd-bridge@vm0")
    assert "status: 2" in run("ls /run/nbd-bridge/vm0.sock")

    # The socket's unit: the first front-end starts the bridge, which leaves the socket there.
    good("systemctl start nbd-bridge@vm0.socket")
    connect = (
        "import socket; s = socket.socket(socket.AF_UNIX); s.connect('/run/nbd-bridge/vm0.sock')"
    )
    good(f'python3 -c "{connect}"')
    good("systemctl start nbd-bridge@vm0")
    good("systemctl reload nbd-bridge@vm0")
    good("systemctl restart nbd-bridge@vm0.service")
    good(f'python3 -c "{connect}"')
    good("systemctl stop nbd-bridge@vm0.socket nbd-bridge@vm0.service nbd-bridge-nbdkit@vm0")
