"""Fixtures of the plugin's tests."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.ceph.cluster import Cluster, ClusterError, missing_tool
from tests.plugin.server import HOST, PEERS
from tests.tools import missing


@pytest.fixture(params=[HOST, pytest.param(PEERS, marks=pytest.mark.peers)])
def where(request: pytest.FixtureRequest) -> str:
    """This host's nbdkit, then the newer one."""
    value: str = request.param
    return value


@pytest.fixture
def volumes() -> Iterator[Path]:
    """An empty directory for volumes, under /tmp, which the peers see too."""
    path = Path(tempfile.mkdtemp(prefix="nbp-vol-", dir="/tmp"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture(scope="session")
def ceph() -> Iterator[Cluster]:
    """A real Ceph of one node, for the whole run."""
    tool = missing_tool()
    if tool is not None:
        missing(f"{tool} is not installed")
    cluster = Cluster(Path(tempfile.mkdtemp(prefix="nbp-ceph-", dir="/tmp")))
    try:
        cluster.start()
    except ClusterError as error:
        cluster.remove()
        missing(f"Ceph does not start here: {error}")
    yield cluster
    cluster.remove()
