"""`./run ceph-demo`: the demo, with a Ceph of one node behind the plugin.

Installs what is missing, starts monitor, manager and storage daemon as plain processes in a
private directory on loopback, makes an RBD image, and runs the demo on it: nbdkit with the rbd
store, the bridge, and the guest (or `--no-guest`). Everything is gone afterwards.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from bridge.app.signals import run_until_signal
from bridge.demo.demo import DemoConfig, run_demo
from bridge.demo.unwrap import unwrapped
from bridge.errors import BridgeError
from tests.ceph.cluster import Cluster, ClusterError, install

_POOL = "rbd"
_IMAGE = "demo"
_DISK_MIB = 1024
_TOOL_LIMIT_S = 120.0


class RbdVolume:
    """An RBD image of the private cluster, served by nbdkit with our plugin."""

    description = f"RBD image of {_DISK_MIB} MiB in a Ceph of one node"

    def __init__(self, conf: Path, folder: Path) -> None:
        self._conf = conf
        self._folder = folder

    def create(self) -> None:
        """Make the image, with the plugin's command line and the system's Python (it has rbd)."""
        root = Path(__file__).parents[2]
        command = ["/usr/bin/python3", "-m", "nbd_plugin", "create", "store=rbd"]
        command += [f"conf={self._conf}", f"pool={_POOL}", _IMAGE, f"{_DISK_MIB}M"]
        done = subprocess.run(
            command, cwd=root, capture_output=True, text=True, timeout=_TOOL_LIMIT_S, check=False
        )
        if done.returncode:
            raise BridgeError(f"the image could not be made: {done.stderr.strip()[-300:]}")

    def server_command(self, socket: Path) -> tuple[str, list[str]]:
        """See bridge.demo.volume.Volume."""
        nbdkit = shutil.which("nbdkit") or "nbdkit"
        plugin = Path(__file__).parents[2] / "nbd_plugin" / "plugin.py"
        parameters = ["store=rbd", f"conf={self._conf}", f"pool={_POOL}", f"image={_IMAGE}"]
        return "nbdkit", [
            *(nbdkit, "--foreground", "--unix", str(socket)),
            *("python", str(plugin), *parameters),
        ]

    def allocated_bytes(self) -> int:
        """See Volume: what the image's objects take."""
        told = json.loads(self._rbd("du", "--format", "json", f"{_POOL}/{_IMAGE}"))
        return sum(int(image["used_size"]) for image in told["images"])

    def image(self) -> Path:
        """See Volume: exported by Ceph's own tool."""
        path = self._folder / "exported.img"
        self._rbd("export", "--no-progress", f"{_POOL}/{_IMAGE}", str(path))
        return path

    def _rbd(self, *arguments: str) -> str:
        command = ["rbd", "-c", str(self._conf), *arguments]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_TOOL_LIMIT_S, check=False
        )
        if done.returncode:
            raise BridgeError(f"{' '.join(command)}: {done.stderr.strip()[-300:]}")
        return done.stdout


def main() -> int:
    """Run it; exit status 0 when everything was right."""
    parser = argparse.ArgumentParser(prog="./run ceph-demo", description=__doc__)
    parser.add_argument("--no-guest", action="store_true", help="no QEMU")
    options = parser.parse_args()
    # What ends the demo ends Ceph, too.
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.default_int_handler)
    # Socket paths have 107 bytes.
    with tempfile.TemporaryDirectory(prefix="ceph-demo-", dir="/tmp") as name:
        folder = Path(name)
        cluster = Cluster(folder / "ceph")
        try:
            install()
            print("ceph     starting one monitor, one manager, one storage daemon", flush=True)
            cluster.start(mgr=True)
            volume = RbdVolume(cluster.conf, folder)
            volume.create()
            config = DemoConfig(guest=not options.no_guest, disk_mib=_DISK_MIB, total_mib=64)
            with unwrapped():
                result = run_until_signal(lambda: run_demo(config, folder=folder, volume=volume))
        except (ClusterError, BridgeError) as error:
            print(f"ceph-demo: {error}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            print("ceph-demo: interrupted", file=sys.stderr)
            return 1
        finally:
            cluster.remove()
        return 0 if result.passed else 1


if __name__ == "__main__":
    sys.exit(main())
