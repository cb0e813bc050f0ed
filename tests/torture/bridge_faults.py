"""What befalls the bridge otherwise than by a signal that kills: its host, its operator."""

from __future__ import annotations

import trio

from tests.processes import bridge_argv
from tests.sim.oracle import Violation
from tests.torture.disk import Disk
from tests.torture.pressure import page_out

_LEAST_SHARE = 0.4
_JUMPS_S = (-86_400, -3_600, -1, 1, 60, 3_600, 10_000_000)


async def cache_disk_full(disk: Disk) -> None:
    """No room beside the cache file, which has its own; the bridge is killed and started."""
    disk.cache.fill()
    try:
        await disk.kill_bridge()
        disk.start_bridge()
        await disk.recovers()
    finally:
        disk.cache.empty()


async def cache_disk_full_at_first_start(disk: Disk) -> None:
    """There is no cache file and no room for one: the bridge says so in one line and ends."""
    if not await _stop_bridge(disk):
        return
    for file in disk.cache.path.iterdir():
        file.unlink()
    disk.cache.fill()
    said = disk.bridge.log.stat().st_size if disk.bridge.log.exists() else 0
    try:
        disk.start_bridge()
        status = await disk.bridge.wait()
    finally:
        disk.cache.empty()
    words = disk.bridge.log.read_bytes()[said:].decode(errors="replace").strip()
    if status != 2 or "\n" in words or "No space left" not in words:
        raise Violation(f"disk {disk.number}: no room for a cache file: status {status}, {words!r}")
    disk.start_bridge()


async def bridge_told_to_stop(disk: Disk) -> None:
    """SIGTERM: it ends with status 0, and all is on the server."""
    await _stop_bridge(disk)
    if not disk.bridge.runs:
        disk.start_bridge()


async def _stop_bridge(disk: Disk) -> bool:
    """False if it had a reason not to end with status 0; it has been started again then."""
    disk.begin_flush_excuse()
    await disk.recovers()
    disk.begin_flush_excuse()
    status = await disk.bridge.stop()
    if status == 0:
        await disk.oracle.judge_stopped("the bridge has stopped with status 0")
        return True
    may_fail = not disk.has_cache and not disk.kind.proves_instance
    if status != 1 or not may_fail:
        raise Violation(
            f"disk {disk.number}: SIGTERM ended with status {status}: {disk.bridge.said()}"
        )
    disk.start_bridge()
    return False


_REFUSED = "the disk is served as before: requests of the guest are not answered within"


async def bridge_upgraded(disk: Disk) -> None:
    """Another process takes over from the bridge while the guest runs."""
    await disk.recovers()
    disk.begin_flush_excuse()
    argv = bridge_argv("upgrade", str(disk.control), "--timeout", "600")
    done = await trio.run_process(argv, capture_stdout=True, capture_stderr=True, check=False)
    said = done.stderr.decode()
    if done.returncode and _REFUSED in said:
        # It promises no more where the guest has to wait for two seconds: other disks' faults, and
        # a busy machine, can see to that.
        disk.tally.faults["bridge refused its upgrade"] += 1
    elif done.returncode:
        raise Violation(f"disk {disk.number}: the upgrade failed: {said}")


async def clock_jumps(disk: Disk) -> None:
    """The wall clock that the bridge sees jumps."""
    assert disk.clock is not None
    disk.clock.jump_to(disk.rng.choice(_JUMPS_S))


async def memory_limited(disk: Disk) -> None:
    """Server or bridge may have less memory than it uses. What the kernel cannot take from it, it
    may kill it for, again and again."""
    programs = [disk.server] if disk.has_to_recover else [disk.server, disk.bridge]
    group = disk.rng.choice(programs).group
    assert group is not None
    disk.begin_flush_excuse()
    before = group.at_limit
    group.limit(int(group.usage_bytes * disk.rng.uniform(_LEAST_SHARE, 1)))
    try:
        await disk.sleep(1, 4)
    finally:
        disk.tally.times_at_limit += group.at_limit - before
        group.unlimited()


async def memory_taken(disk: Disk) -> None:
    """The host takes the pages of the bridge's files away."""
    for _ in range(disk.rng.choice((1, 5))):
        page_out(disk.bridge.pid)
        await disk.sleep(0, 0.3)
