"""Memory limits: that they bite, and that a disk loses nothing under them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.tiers import in_ci
from tests.torture import campaign
from tests.torture.campaign import Plan
from tests.torture.disk import MIB, Profile
from tests.torture.memory import VERSION_2, Hierarchy, MemoryGroup, NoLimits

pytestmark = pytest.mark.root

_LIMIT_BYTES = 32 * MIB
_WRITES_A_FILE = """
import mmap, sys
with open(sys.argv[1], "wb+") as file:
    file.truncate(64 << 20)
    pages = mmap.mmap(file.fileno(), 64 << 20)
    for at in range(0, 64 << 20, 4096):
        pages[at] = 7
"""
_NEEDS_MEMORY = "bytearray(b'x') * (128 << 20)"


@pytest.fixture
def group() -> Iterator[MemoryGroup]:
    try:
        group = Hierarchy().group("test")
    except NoLimits as reason:
        if in_ci():
            raise
        pytest.skip(str(reason))
    group.limit(_LIMIT_BYTES)
    yield group
    group.remove()


def status_in(group: MemoryGroup, program: str, *arguments: str) -> int:
    """Of a Python program that ran with the group's limit."""
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.run(command, preexec_fn=group.enter, check=False).returncode


def test_pages_of_files_are_taken_at_the_limit(group: MemoryGroup, directory: Path) -> None:
    assert status_in(group, _WRITES_A_FILE, str(directory / "file")) == 0
    assert group.kills == 0
    assert group.at_limit > 0
    assert group.usage_bytes <= _LIMIT_BYTES
    assert (directory / "file").read_bytes()[::4096] == b"\x07" * (64 * MIB // 4096)


def test_process_from_which_nothing_can_be_taken_is_killed(group: MemoryGroup) -> None:
    assert status_in(group, _NEEDS_MEMORY) == -9
    assert group.kills == 1


def test_process_without_a_limit_any_more_is_not_killed(group: MemoryGroup) -> None:
    group.unlimited()
    assert status_in(group, _NEEDS_MEMORY) == 0
    assert group.kills == 0


def test_files_of_version_2_are_understood(directory: Path) -> None:
    group = MemoryGroup(directory / "group", VERSION_2)
    events = directory / "group" / "memory.events"
    events.write_text("low 0\nhigh 0\nmax 169\noom 3\noom_kill 2\noom_group_kill 0\n")
    assert (group.at_limit, group.kills) == (169, 2)
    group.limit(4096)
    assert (directory / "group" / "memory.max").read_text() == "4096"
    group.unlimited()
    assert (directory / "group" / "memory.max").read_text() == "max"


@pytest.mark.nbdkit
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_campaign_with_too_little_memory_loses_nothing(group: MemoryGroup) -> None:
    profile = Profile("file", "writeback", size_bytes=16 * MIB)
    plan = Plan(seed="ci", hours=12 / 3600, profiles=[profile], only=("memory limited",))
    tally = campaign.run(plan, lambda line: None)
    assert tally.problems == []
    assert tally.verified_bytes > MIB
    assert tally.faults["memory limited"] > 0
    assert tally.times_at_limit > 0
    assert f"{tally.times_at_limit} times at a memory limit" in tally.line()
