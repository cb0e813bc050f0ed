"""A short campaign against real processes; and what looks for losses, tested with planted ones."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from _pytest.mark import ParameterSet

from tests.sim.oracle import Violation
from tests.torture import campaign, endurance
from tests.torture.campaign import Plan
from tests.torture.content import TORN, numbers_of, sectors_of
from tests.torture.disk import MIB, PROFILES, Profile
from tests.torture.endurance import LARGEST_GROWTH_BYTES, Load, Sample
from tests.torture.guest import Excuses
from tests.torture.oracle import DiskOracle
from tests.torture.tally import Tally

SECTOR = 512
DISK = 3


# The checker.


def test_sector_tells_an_old_write_from_a_moved_and_a_torn_one() -> None:
    data = sectors_of(DISK, 8, 2, 5)
    assert numbers_of(DISK, 8, data) == [5, 5]
    assert numbers_of(DISK, 8, bytes(SECTOR) + data[SECTOR:]) == [0, 5]
    assert numbers_of(DISK, 9, data) == [TORN, TORN]
    assert numbers_of(DISK + 1, 8, data) == [TORN, TORN]
    other = sectors_of(DISK, 8, 2, 6)
    assert numbers_of(DISK, 8, data[:256] + other[256:]) == [TORN, 6]


@pytest.fixture
def image(directory: Path) -> Path:
    path = directory / "image"
    path.write_bytes(bytes(64 * SECTOR))
    return path


def write_image(image: Path, first: int, number: int) -> None:
    with image.open("r+b") as file:
        file.seek(first * SECTOR)
        file.write(sectors_of(DISK, first, 1, number))


def oracle_of(image: Path, *, has_cache: bool, keeps_completed: bool = False) -> DiskOracle:
    return DiskOracle(DISK, 64, image, has_cache=has_cache, keeps_completed=keeps_completed)


@pytest.fixture
def cached(image: Path) -> Iterator[DiskOracle]:
    oracle = oracle_of(image, has_cache=True)
    yield oracle
    oracle.close()


@pytest.fixture
def uncached(image: Path) -> Iterator[DiskOracle]:
    oracle = oracle_of(image, has_cache=False)
    yield oracle
    oracle.close()


def write(oracle: DiskOracle, first: int = 0) -> int:
    change = oracle.begin(first, 1)
    oracle.end(change, done=True)
    return change.number


async def flush(oracle: DiskOracle) -> None:
    with oracle.since() as since:
        await oracle.flush_succeeded(since)


def read(oracle: DiskOracle, number: int) -> None:
    with oracle.since() as since:
        oracle.judge_read(0, [number], since)


async def test_flushed_write_that_is_not_in_the_image_is_found(
    cached: DiskOracle, image: Path
) -> None:
    write_image(image, 0, write(cached))
    await flush(cached)
    write(cached)
    with pytest.raises(Violation, match="a flush succeeded, the image has write 1"):
        await flush(cached)


async def test_read_of_an_older_write_is_found(cached: DiskOracle) -> None:
    old, new = write(cached), write(cached)
    read(cached, new)
    with pytest.raises(Violation, match="the guest reads write 1"):
        read(cached, old)


async def test_write_that_failed_may_be_there_or_not_until_the_next_one(
    cached: DiskOracle,
) -> None:
    old = write(cached)
    change = cached.begin(0, 1)
    cached.end(change, done=False)
    read(cached, old)
    read(cached, change.number)
    new = write(cached)
    for each in (old, change.number):
        with pytest.raises(Violation):
            read(cached, each)
    read(cached, new)


async def test_loss_without_a_cache_has_to_be_told_by_a_flush(
    uncached: DiskOracle, image: Path
) -> None:
    write(uncached)
    uncached.server_lost_power()
    read(uncached, 0)
    with pytest.raises(Violation, match="a flush succeeded"):
        await flush(uncached)
    uncached.flush_failed()
    await flush(uncached)


async def test_loss_with_a_cache_is_never_excused(cached: DiskOracle) -> None:
    write(cached)
    cached.server_lost_power()
    cached.flush_failed()
    with pytest.raises(Violation, match="the guest reads"):
        read(cached, 0)


async def test_frozen_image_has_to_have_what_was_complete_where_that_means_it(
    image: Path,
) -> None:
    oracle = oracle_of(image, has_cache=True, keeps_completed=True)
    number = write(oracle)
    with pytest.raises(Violation, match="killed, the image has write 0"):
        await oracle.judge_frozen_image("killed")
    write_image(image, 0, number)
    await oracle.judge_frozen_image("killed")
    oracle.close()


async def test_many_writes_of_one_sector_leave_few_to_remember(
    cached: DiskOracle, image: Path
) -> None:
    for _ in range(50):
        write_image(image, 0, write(cached))
        await flush(cached)
    assert len(cached.sectors[0]) < 10
    read(cached, 50)
    with pytest.raises(Violation):
        read(cached, 49)


async def test_what_a_slow_read_may_return_is_not_forgotten(
    cached: DiskOracle, image: Path
) -> None:
    old = write(cached)
    with cached.since() as since:
        for _ in range(50):
            write_image(image, 0, write(cached))
            await flush(cached)
        cached.judge_read(0, [old], since)


def test_excuse_ends_for_what_is_sent_after_it() -> None:
    excuses = Excuses()
    assert not excuses.has("flush", 1)
    excuses.begin("flush")
    assert excuses.has("flush", 5)
    assert not excuses.has("read", 5)
    excuses.end(7)
    assert excuses.has("flush", 7)
    assert not excuses.has("flush", 8)


# Flat memory.


def samples(*anonymous_bytes: int, descriptors: int = 20) -> list[Sample]:
    return [Sample(each, each, descriptors) for each in anonymous_bytes]


def test_warming_up_is_no_growth() -> None:
    warm = [10 * MIB] * 12
    assert endurance.judge("x", samples(1 * MIB, 2 * MIB, 5 * MIB, 9 * MIB, *warm)) == []


def test_memory_that_grows_with_each_event_is_found() -> None:
    step = LARGEST_GROWTH_BYTES // 6
    (found,) = endurance.judge("x", samples(*range(10 * MIB, 10 * MIB + 16 * step, step)))
    assert "its memory has grown" in found


def test_what_is_given_back_is_no_growth() -> None:
    peaks = [10 * MIB, 10 * MIB, 10 * MIB, 30 * MIB] * 4
    assert endurance.judge("x", samples(*peaks)) == []


def test_one_descriptor_more_is_found() -> None:
    before, after = samples(*[MIB] * 8), samples(*[MIB] * 8, descriptors=21)
    (found,) = endurance.judge("x", before + after)
    assert "1 descriptors more" in found


def test_too_few_samples_judge_nothing() -> None:
    assert endurance.judge("x", samples(MIB, MIB, MIB)) != []


# Real processes.


def quiet(line: str) -> None:
    """What a campaign says on its way."""


@pytest.mark.nbdkit
@pytest.mark.qemu
@pytest.mark.root
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("profiles", [PROFILES[:4], PROFILES[4:]], ids=["first", "second"])
def test_campaign_loses_nothing(profiles: tuple[Profile, ...]) -> None:
    tally = campaign.run(Plan(seed="ci", kills=12, profiles=profiles), quiet)
    assert tally.problems == []
    assert tally.killed >= 12
    assert tally.verified_bytes > 16 * MIB
    assert tally.requests["flush"] > 0


def small(server: str, cache: str, bug: str = "") -> Profile:
    return Profile(server, cache, engine="pure", bug=bug, size_bytes=8 * MIB, cache_bytes=4 * MIB)


HANGS = "(read|write|zeroes|discard|flush) hangs for"
LOST = "the image has|the guest reads"
FOUND = f"{LOST}|holds [0-9]+ bytes that the server lacks, and "
"""Or the bridge that is started again sees that clean blocks differ from what the server has."""


def planted(
    bug: str, fault: str, found: str, *, server: str = "plugin", cache: str = "writeback"
) -> ParameterSet:
    """A bridge with this bug: what shows it, and how."""
    return pytest.param(small(server, cache, bug), fault, found, id=bug)


@pytest.mark.nbdkit
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("profile", "fault", "found"),
    [
        pytest.param(small("lying", "off"), "bridge killed", LOST, id="lying server"),
        pytest.param(small("lying", "writeback"), "bridge killed", FOUND, id="lying, with a cache"),
        planted("cache_evicts_dirty", "bridge killed", LOST),
        planted("recovered_forgotten", "bridge killed", HANGS, cache="off"),
        planted(
            "stop_without_flush", "guest pauses", "the guest's stop was answered, the image has"
        ),
        planted("cache_reconnect_ignores_written", "server killed", LOST, server="plugin-lossy"),
        planted("loss_is_never_told", "server killed", LOST, server="plugin-lossy", cache="off"),
    ],
)
def test_planted_loss_is_found(profile: Profile, fault: str, found: str) -> None:
    # What is not to be found as a hang may be slow on a busy machine.
    hung_ticks = 15 if "hangs" in found else 150
    plan = Plan(seed="planted", hours=1, profiles=[profile], only=(fault,), hung_ticks=hung_ticks)
    problems = campaign.run(plan, quiet).problems
    assert Tally(problems=problems).has(found), problems


def test_campaign_that_looks_at_nothing_fails() -> None:
    tally = campaign.run(Plan(profiles=()), quiet)
    assert "nothing was verified" in tally.problems


@pytest.mark.nbdkit
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_endurance_finds_everything_flat() -> None:
    plan = Plan(seed="ci", profiles=endurance.PROFILES[:2])
    tally = endurance.run(plan, Load(reconnects=24, turns=1, samples=8), quiet)
    assert tally.problems == []
    assert tally.faults["connections cut"] == 48
    assert tally.faults["guest reset"] == 4


@pytest.mark.nbdkit
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("bug", "found"),
    [("descriptor_kept", "descriptors more"), ("memory_kept", "its memory has grown")],
)
def test_planted_leak_is_found(bug: str, found: str) -> None:
    profile = Profile("plugin", "off", engine="pure", proxied=True, bug=bug)
    tally = endurance.run(
        Plan(seed="ci", profiles=[profile]), Load(reconnects=24, turns=0, samples=8), quiet
    )
    assert tally.has(found), tally.problems
