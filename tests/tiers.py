"""Which tests need more than Python packages, and which run in one worker, one after the other.

A marker says what a test needs, or that it takes long (pyproject.toml lists them). Most are set
here, by folder, file or fixture; a single test that differs from its file carries its own.
`tests.tools.need` refuses a tool to a test that is not marked for it, so the markers cannot rot.
`./run test` installs what the chosen tests' markers stand for, and `--fast` leaves the marked ones
out.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

import pytest

IN_CI = "TESTS_IN_CI"
"""The variable that conftest.py leaves in place of CI."""


def in_ci() -> bool:
    """Nothing may be left out for want of something on this machine."""
    return bool(os.environ.get(IN_CI))


TOOLS = ("nbdkit", "qemu", "ceph", "peers", "openssl", "prometheus", "chromium", "systemd")
"""The markers that stand for Debian packages: see packages_of in `run`."""

NEEDS = (*TOOLS, "root")
"""The markers of tests that need more than Python packages."""

LEFT_OUT_BY_FAST = (*NEEDS, "slow")
PACKAGE = "package"
"""The marker of tests with a command of their own, which takes minutes."""

_BY_PLACE: dict[str, tuple[str, ...]] = {
    "tests/api/test_commands.py": ("nbdkit",),
    "tests/api/test_page.py": ("chromium", "slow"),
    "tests/api/test_prometheus.py": ("prometheus", "slow"),
    "tests/api/test_ten_bridges.py": ("slow",),
    "tests/app/test_bad_input.py": ("nbdkit",),
    "tests/app/test_cache.py": ("nbdkit",),
    "tests/app/test_cache_foreign.py": ("nbdkit", "qemu"),
    "tests/app/test_cache_guest.py": ("nbdkit", "qemu", "slow"),
    "tests/app/test_durability.py": ("slow",),
    "tests/app/test_ends.py": ("nbdkit",),
    "tests/app/test_long_requests.py": ("nbdkit", "slow"),
    "tests/app/test_plugin_life.py": ("nbdkit",),
    "tests/app/test_serve.py": ("nbdkit",),
    "tests/app/test_stale_writes.py": ("nbdkit",),
    "tests/app/test_upgrade.py": ("nbdkit",),
    "tests/cache/test_with_nbdkit.py": ("nbdkit",),
    "tests/docker": ("docker",),
    "tests/docker/test_certificates.py": ("openssl",),
    "tests/guest/vhost_user/test_peers.py": ("peers",),
    "tests/packaging/test_deb.py": ("package", "peers", "nbdkit", "slow"),
    "tests/packaging/test_units.py": ("systemd",),
    "tests/packaging/test_wheel.py": ("slow",),
    "tests/plugin/test_clients.py": ("nbdkit", "qemu"),
    "tests/plugin/test_deployment.py": ("nbdkit",),
    "tests/plugin/test_fence.py": ("nbdkit",),
    "tests/plugin/test_generation.py": ("nbdkit",),
    "tests/plugin/test_rbd.py": ("ceph", "nbdkit", "qemu", "slow"),
    "tests/qemu/test_firmware.py": ("nbdkit", "qemu", "slow"),
    "tests/qemu/test_guest_life.py": ("nbdkit", "qemu", "slow"),
    "tests/server/test_killed.py": ("nbdkit", "slow"),
    "tests/server/test_plugin_sessions.py": ("nbdkit",),
}
"""Markers of every test of a folder or a file."""

_BY_FIXTURE: dict[tuple[str, str], tuple[str, ...]] = {
    ("tests/docker/", "server_certificates"): ("openssl", "nbdkit"),
    ("tests/plugin/", "ceph"): ("ceph",),
    ("tests/plugin/", "where"): ("nbdkit",),
    ("tests/qemu/", "archive"): ("qemu",),
    ("tests/qemu/", "machine"): ("qemu", "slow"),
}
"""Markers of every test of a folder that uses a fixture, directly or not."""

_IMPLIED: dict[str, tuple[str, ...]] = {"ceph": ("root",), "peers": ("root",)}

_ALONE = ("tests/plugin/test_rbd.py",)
"""All of it runs in one worker: there is one Ceph cluster, which takes ten seconds to start."""

_ONE_BY_ONE = (
    "tests/app/",
    "tests/cache/test_depth.py",
    "tests/cache/test_eviction.py",
    "tests/cache/test_model.py",
    "tests/cache/test_oracle.py",
    "tests/guest/vhost_user/test_blk_driver.py",
    "tests/guest/vhost_user/test_crash.py",
    "tests/plugin/",
    "tests/qemu/",
    "tests/server/test_interop.py",
    "tests/server/test_killed.py",
    "tests/server/test_link.py",
    "tests/sim/",
    "tests/torture/",
)
"""Where single tests take long, or wait for processes. Of the others a worker takes a file."""

_WAITING = (
    *("tests/app/", "tests/plugin/", "tests/qemu/", "tests/server/test_interop.py"),
    "tests/torture/",
)
"""Where tests take long because they wait for processes."""


def mark(items: list[pytest.Item]) -> None:
    """Give every test its markers."""
    for item in items:
        for name in _names(item, _path(item)):
            item.add_marker(name)


def is_left_out_by_fast(item: pytest.Item) -> bool:
    """It needs more than Python packages, or takes long."""
    return any(map(item.get_closest_marker, LEFT_OUT_BY_FAST))


def unit_of(nodeid: str) -> str:
    """What one worker runs without another having a part in it: the test, or all of its file."""
    path = nodeid.partition("::")[0]
    if path.startswith(_ONE_BY_ONE) and path not in _ALONE:
        return nodeid
    return path


def needed(items: Iterable[pytest.Item]) -> list[str]:
    """The tools that these tests need, by their markers."""
    found = {mark.name for item in items for mark in item.iter_markers()}
    return [name for name in TOOLS if name in found]


def in_order(items: list[pytest.Item]) -> list[pytest.Item]:
    """What takes longest goes first: otherwise the last worker would run it while others idle."""
    return sorted(items, key=_place_in_order)


def _names(item: pytest.Item, path: str) -> list[str]:
    names = [
        name
        for place, found in _BY_PLACE.items()
        if path == place or path.startswith(f"{place}/")
        for name in found
    ]
    fixtures = getattr(item, "fixturenames", ())
    for (folder, fixture), found in _BY_FIXTURE.items():
        if path.startswith(folder) and fixture in fixtures:
            names += found
    own = [mark.name for mark in item.iter_markers()]
    names += [more for name in (*names, *own) for more in _IMPLIED.get(name, ())]
    return [name for name in dict.fromkeys(names) if name not in own]


def _place_in_order(item: pytest.Item) -> int:
    if item.get_closest_marker("ceph"):
        return 0
    if item.get_closest_marker("slow"):
        return 1
    return 2 if _path(item).startswith(_WAITING) else 3


def _path(item: pytest.Item) -> str:
    return item.nodeid.partition("::")[0]
