"""A Ceph of one node for a demo and for tests: mon and osd (and mgr) as plain processes.

    python3 -m tests.ceph.cluster install            Debian's packages, those that are missing
    python3 -m tests.ceph.cluster start DIR [--mgr]  a new cluster, or the one in DIR again
    python3 -m tests.ceph.cluster stop DIR           stop its processes; the data stays in DIR
    python3 -m tests.ceph.cluster remove DIR         stop, and delete DIR

Everything is in DIR and on the loopback interface, on a free port; no systemd, no authentication,
one copy of the data. `start` returns when an image can be created: about ten seconds. Afterwards
`DIR/ceph.conf` is all that a client needs, and the pool is called `rbd`. The standard library is
enough for this file.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

from tests.ports import free_port

PACKAGES = ("ceph-mon", "ceph-mgr", "ceph-osd", "ceph-common", "python3-rbd", "python3-rados")
POOL = "rbd"

_COMMAND_TIMEOUT_S = 60
"""For one step of the start. By themselves Ceph's tools wait for a lost daemon without limit."""

_STOP_TIMEOUT_S = 15
_MAX_DIR_CHARS = 70
"""The admin sockets are in DIR/run, and a socket's path has at most 107 bytes."""

# What each setting is for: one copy of the data on one disk; no second port (msgr1); pools at
# work without a manager; a dead client's locks free after 5 s instead of 30.
_CONF = """\
[global]
fsid = {fsid}
mon host = [v2:127.0.0.1:{port}]
public addr = 127.0.0.1
ms bind msgr1 = false
auth cluster required = none
auth service required = none
auth client required = none
auth allow insecure global id reclaim = false
run dir = {dir}/run
admin socket = {dir}/run/$name.$pid.asok
pid file = {dir}/run/$name.pid
log file = {dir}/log/$name.log
crash dir = {dir}/run
mon cluster log file = {dir}/log/cluster.log
mon data = {dir}/mon
mgr data = {dir}/mgr
osd data = {dir}/osd
mon data avail warn = 1
mon data avail crit = 1
mon allow pool size one = true
mon warn on pool no redundancy = false
osd pool default size = 1
osd pool default min size = 1
osd pool default pg autoscale mode = off
osd crush chooseleaf type = 0
osd objectstore = bluestore
bluestore block size = 4294967296
bluestore cache autotune = false
bluestore cache size = 67108864
osd client watch timeout = 5

[client]
admin socket =
log file =
"""


class ClusterError(Exception):
    """A step failed; the text holds what the tool said."""


class Cluster:
    """A cluster in `directory`, there already or to be made by `start`."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory.absolute()
        self.conf = self.directory / "ceph.conf"
        if len(str(self.directory)) > _MAX_DIR_CHARS:
            raise ClusterError(f"{directory}: the path is too long for the daemons' sockets")

    def start(self, *, mgr: bool = False) -> None:
        """Start every daemon and wait until an image can be created. Raises ClusterError."""
        try:
            if self.conf.exists():
                self.start_mon()
                self.start_osd()
            else:
                self._make()
            if mgr:
                self._tool("ceph-mgr", "-i", "x")
            probe = f"{POOL}/probe-{os.getpid()}"
            self.rbd("create", probe, "--size", "4M")
            self.rbd("rm", "--no-progress", probe)
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End every daemon of this directory: TERM, after a while KILL."""
        pids = [pid for path in (self.directory / "run").glob("*.pid") if (pid := _pid_in(path))]
        _end(pids, signal.SIGTERM)
        if not _wait_gone(pids, _STOP_TIMEOUT_S):
            _end(pids, signal.SIGKILL)
            _wait_gone(pids, _STOP_TIMEOUT_S)

    def remove(self) -> None:
        """Stop, and delete the directory if it is a cluster's."""
        self.stop()
        if self.conf.exists():
            shutil.rmtree(self.directory)

    def start_mon(self) -> None:
        self._tool("ceph-mon", "-i", "a")

    def start_osd(self) -> None:
        self._tool("ceph-osd", "-i", "0")

    def kill_osd(self) -> None:
        """End the osd as a power cut would (SIGKILL) and wait until it is gone."""
        pid = _pid_in(self.directory / "run" / "osd.0.pid")
        if pid is None:
            raise ClusterError("the osd does not run")
        _end([pid], signal.SIGKILL)
        _wait_gone([pid], _STOP_TIMEOUT_S)

    def rbd(self, *arguments: str) -> str:
        """Run the rbd tool; returns its output."""
        return self._tool("rbd", *arguments)

    def ceph(self, *arguments: str) -> str:
        """Run the ceph tool; returns its output."""
        return self._tool("ceph", "--connect-timeout", "20", *arguments)

    def _make(self) -> None:
        fsid = str(uuid.uuid4())
        port = free_port()
        for name in ("mon", "mgr", "osd", "run", "log"):
            (self.directory / name).mkdir(parents=True)
        monmap = str(self.directory / "monmap")
        address = f"[v2:127.0.0.1:{port}]"
        _run("monmaptool", "--create", "--fsid", fsid, "--addv", "a", address, monmap)
        self.conf.write_text(_CONF.format(fsid=fsid, port=port, dir=self.directory))
        self._tool("ceph-mon", "-i", "a", "--mkfs", "--monmap", monmap)
        self.start_mon()
        osd_uuid = str(uuid.uuid4())
        self.ceph("osd", "new", osd_uuid)
        self._tool("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", osd_uuid)
        self.start_osd()
        self.ceph("osd", "pool", "create", POOL, "8", "8")
        self.ceph("osd", "pool", "application", "enable", POOL, "rbd")

    def _tool(self, name: str, *arguments: str) -> str:
        return _run(name, "-c", str(self.conf), *arguments)


def install() -> None:
    """Install the Debian packages that are missing; needs root then. Raises ClusterError."""
    missing = [package for package in PACKAGES if not _installed(package)]
    if missing:
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        _run("apt-get", "update", "-q", timeout_s=600, env=environment)
        options = ("install", "-qy", "--no-install-recommends")
        _run("apt-get", *options, *missing, timeout_s=600, env=environment)


def missing_tool() -> str | None:
    """The name of a tool that is not installed, if any."""
    for name in ("ceph-mon", "ceph-osd", "ceph", "rbd", "monmaptool"):
        if shutil.which(name) is None:
            return name
    return None


def _installed(package: str) -> bool:
    query = ["dpkg-query", "-W", "-f", "${db:Status-Status}", package]
    done = subprocess.run(query, capture_output=True, text=True, check=False)
    return done.stdout == "installed"


def _pid_in(path: Path) -> int | None:
    """The running Ceph daemon whose pid file this is; the file may outlive its process."""
    try:
        pid = int(path.read_text())
        name = Path(f"/proc/{pid}/comm").read_text()
    except (OSError, ValueError):
        return None
    return pid if name.startswith("ceph-") and _runs(pid) else None


def _runs(pid: int) -> bool:
    """Whether the process runs. One that ended but was not reaped (a zombie) does not."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


def _end(pids: list[int], number: signal.Signals) -> None:
    for pid in pids:
        if _runs(pid):
            os.kill(pid, number)


def _wait_gone(pids: list[int], timeout_s: float) -> bool:
    deadline = time.monotonic() + timeout_s
    while any(_runs(pid) for pid in pids):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def _run(
    *command: str, timeout_s: float = _COMMAND_TIMEOUT_S, env: dict[str, str] | None = None
) -> str:
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            env=env,
            check=False,
        )
    except FileNotFoundError:
        raise ClusterError(f"{command[0]} is not installed") from None
    except subprocess.TimeoutExpired:
        raise ClusterError(f"{' '.join(command)[:200]}: no answer in {timeout_s} s") from None
    if done.returncode != 0:
        raise ClusterError(f"{' '.join(command)[:200]} failed:\n{done.stderr[-2000:]}")
    return done.stdout


def main(arguments: list[str] | None = None) -> int:
    """The command line; see the module's text."""
    parser = argparse.ArgumentParser(
        prog="python3 -m tests.ceph.cluster",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=("install", "start", "stop", "remove"))
    parser.add_argument("directory", nargs="?", type=Path)
    parser.add_argument("--mgr", action="store_true", help="start: with a manager (300 MB more)")
    options = parser.parse_args(arguments)
    try:
        if options.command == "install":
            install()
            return 0
        if options.directory is None:
            parser.error(f"{options.command} needs DIR")
        cluster = Cluster(options.directory)
        if options.command == "start":
            cluster.start(mgr=options.mgr)
            print(cluster.conf)
        elif options.command == "stop":
            cluster.stop()
        else:
            cluster.remove()
    except ClusterError as error:
        print(f"ceph: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
