"""The NBD servers that are tortured, and what each may lose when it is killed."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bridge.host import PLUGIN
from tests.ceph.cluster import POOL, Cluster
from tests.tools import need

ERROR_FILTER = ("error", "error=EIO", "error-rate=20%")
DELAY_FILTER = ("delay", "rdelay=5ms", "wdelay=10ms")
RATE_FILTER = ("rate", "rate=20M")
FILTERS = {"delay": DELAY_FILTER, "rate": RATE_FILTER}
"""Filters of nbdkit's that make a server slow, with their parameters."""

_LOSSY_PLUGIN = Path(__file__).with_name("lossy_plugin.py")


@dataclass(frozen=True)
class ServerKind:
    """What one kind of server promises."""

    has_filters: bool
    """It is nbdkit, which takes filters."""
    proves_instance: bool
    """It tells whether it is still the same, so that no flush has to fail for nothing."""
    loses_unflushed: bool
    """A kill costs what no flush covers."""
    counts_writers: bool = False
    """It tells whether another client wrote."""
    trims_past_its_cache: bool = False
    """What was discarded and flushed reads as before until it is killed, and as zeroes then. To a
    bridge with dirty data that is another client's change."""


KINDS = {
    "plugin": ServerKind(
        has_filters=True, proves_instance=True, loses_unflushed=False, counts_writers=True
    ),
    "rbd": ServerKind(
        has_filters=True, proves_instance=False, loses_unflushed=True, counts_writers=True
    ),
    "plugin-lossy": ServerKind(
        has_filters=True,
        proves_instance=False,
        loses_unflushed=True,
        trims_past_its_cache=True,
    ),
    "file": ServerKind(has_filters=True, proves_instance=False, loses_unflushed=False),
    "qemu-nbd": ServerKind(has_filters=False, proves_instance=False, loses_unflushed=False),
    "lying": ServerKind(has_filters=True, proves_instance=False, loses_unflushed=False),
}
"""`lying` loses a write now and then that it has acknowledged and flushed: to test the checker."""


RBD_IMAGE = "torture"


def server_argv(
    kind: str,
    image: Path,
    socket: Path,
    filters: Sequence[Sequence[str]] = (),
    *,
    cluster: Cluster | None = None,
) -> list[str]:
    """The command line of a server for `image`, or for RBD_IMAGE of `cluster`. `filters`: of
    nbdkit, each with its parameters."""
    if kind == "qemu-nbd":
        return [
            *(need("qemu-nbd"), "-f", "raw", "-t", "-e", "8", "--discard=unmap"),
            *("-k", str(socket), str(image)),
        ]
    if kind == "plugin-lossy":
        filters = [*filters, ("cache", "cache=writeback")]
    argv = [need("nbdkit"), "-f", "-U", str(socket)]
    argv += [f"--filter={name}" for name, *_ in filters]
    if kind == "file":
        argv += ["file", f"file={image}"]
    elif kind == "lying":
        argv += ["python", str(_LOSSY_PLUGIN), f"file={image}"]
    elif kind == "rbd":
        assert cluster is not None
        argv += ["python", str(PLUGIN), *_rbd_parameters(cluster), f"image={RBD_IMAGE}"]
    else:
        argv += ["python", str(PLUGIN), f"file={image}"]
    return [*argv, *(parameter for _, *parameters in filters for parameter in parameters)]


def create_rbd_image(cluster: Cluster, size_bytes: int) -> None:
    """Make RBD_IMAGE, with the system's Python, which has librbd's module."""
    argv = ["/usr/bin/python3", "-m", "nbd_plugin", "create", *_rbd_parameters(cluster)]
    subprocess.run([*argv, RBD_IMAGE, str(size_bytes)], cwd=PLUGIN.parents[1], check=True)


def _rbd_parameters(cluster: Cluster) -> list[str]:
    return ["store=rbd", f"conf={cluster.conf}", f"pool={POOL}"]
