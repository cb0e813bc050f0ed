"""The campaign: several disks at once, each with its own faults, until there were enough."""

from __future__ import annotations

import shutil
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import trio

from tests.processes import short_directory
from tests.sim.oracle import Violation
from tests.torture.disk import PROFILES, Disk, Profile
from tests.torture.faults import FAULTS, Fault, draw
from tests.torture.front_ends import missing
from tests.torture.memory import Hierarchy, NoLimits
from tests.torture.pressure import clock_library
from tests.torture.tally import Tally

HUNG_TICKS = 300
"""A request that waits so many seconds of the campaign's own time is not answered any more."""
_PAUSE_S = (0.5, 4.0)
"""Between two faults of one disk."""
_NO_RECOVERY = 0.25
"""How often the next fault comes before the disk has recovered from the last one."""
_STALL_S = 5.0
_SAY_EVERY_TICKS = 30


@dataclass(frozen=True)
class Plan:
    """How long, how much, and with which dice."""

    seed: str = "1"
    hours: float = 0.0
    kills: int = 0
    profiles: Sequence[Profile] = PROFILES
    say_every_ticks: int = _SAY_EVERY_TICKS
    only: tuple[str, ...] = ()
    """Names of the faults to make; () for all."""
    hung_ticks: int = HUNG_TICKS


class Campaign:
    """One run. `run` returns the tally, whose `problems` is empty if nothing was found."""

    def __init__(self, plan: Plan, folder: Path, say: Callable[[str], None]) -> None:
        self._plan = plan
        self._say = say
        self.tally = Tally()
        self.disks: list[Disk] = []
        self._folder = folder
        self._ticks = 0
        self._over = trio.Event()
        self._library: Path | None = None
        self._limits: Hierarchy | None = None

    async def run(self) -> Tally:
        """All of it."""
        self._library = clock_library(self._folder)
        if self._library is None:
            self.tally.left_out["clock jumps"] = "there is no C compiler"
        try:
            self._limits = Hierarchy()
        except NoLimits as error:
            self.tally.left_out["memory limits"] = str(error)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._clock)
                async with trio.open_nursery() as disks:
                    for number, profile in enumerate(self._plan.profiles, 1):
                        disks.start_soon(self._torture, number, profile)
                nursery.cancel_scope.cancel()
        except* Exception as group:
            self.tally.problems += [_told(each) for each in _leaves(group)]
        self._count()
        self._judge()
        if self.tally.problems:
            self._keep_logs()
        return self.tally

    def _keep_logs(self) -> None:
        kept = Path(tempfile.mkdtemp(prefix="nbd-bridge-torture-"))
        for log in self._folder.glob("*/*.log"):
            shutil.copy(log, kept / f"{log.parent.name}-{log.name}")
        (kept / "story").write_text("\n".join(self.tally.story) + "\n")
        self._say(f"logs, and what happened when: {kept}")

    async def _torture(self, number: int, profile: Profile) -> None:
        if why := await trio.to_thread.run_sync(missing, profile.client):
            self.tally.left_out[f"disks of {profile.client}"] = why
            return
        folder = self._folder / f"disk{number}"
        folder.mkdir()
        disk = Disk(
            number,
            profile,
            folder,
            self._plan.seed,
            self.tally,
            library=self._library,
            limits=self._limits,
        )
        self.disks.append(disk)
        if profile.small_file_systems and not disk.storage.can_be_filled:
            self.tally.left_out["disks that are full"] = "only root may mount small file systems"
        try:
            async with disk.running():
                await disk.recovers()
                await self._break(disk)
                await self._end(disk)
        finally:
            self._look_for_tracebacks(disk)

    async def _break(self, disk: Disk) -> None:
        """One fault after the other, until the campaign is over."""
        while not self._over.is_set():
            await disk.sleep(*_PAUSE_S)
            fault = self._draw(disk)
            if fault.alone:
                await disk.recovers()
            self.tally.faults[fault.name] += 1
            self.tally.story.append(f"{self._ticks} disk {disk.number}: {fault.name}")
            await fault.happen(disk)
            if fault.alone or disk.has_to_recover or disk.rng.random() >= _NO_RECOVERY:
                await disk.recovers()
        await disk.recovers()

    def _draw(self, disk: Disk) -> Fault:
        while True:
            fault = draw(disk)
            if not self._plan.only or fault.name in self._plan.only:
                return fault

    async def _end(self, disk: Disk) -> None:
        """All is answered, read again, stopped in order, and in the image."""
        disk.guest.hold()
        await disk.guest.all_answered()
        await disk.guest.flush_once()
        await disk.guest.read_everything()
        status = await disk.bridge.stop()
        if status:
            raise Violation(f"disk {disk.number}: the last stop ended with status {status}")
        await disk.server.kill()
        await disk.oracle.judge_stopped("everything has stopped")
        self._say(f"disk {disk.number} ({disk.profile}) is done")

    # Watching.

    async def _clock(self) -> None:
        """Ticks of our own time, which stands still while this process is stopped."""
        began_s = last_s = time.monotonic()
        while True:
            await trio.sleep(1)
            now_s = time.monotonic()
            if now_s - last_s > _STALL_S:
                self._say(f"this process stood still for {now_s - last_s:.0f} s")
            last_s = now_s
            self._ticks += 1
            for disk in self.disks:
                disk.guest.tick = self._ticks
                self._look_at(disk)
            self._count()
            if self._ticks % self._plan.say_every_ticks == 0:
                self._say(self.tally.line())
            long_enough = now_s - began_s >= self._plan.hours * 3600
            if long_enough and self.tally.killed >= self._plan.kills:
                self._over.set()

    def _look_at(self, disk: Disk) -> None:
        if self.tally.problems:
            raise Violation("stopped for that")
        age, kind = disk.guest.oldest_age_ticks()
        if age > self._plan.hung_ticks:
            raise Violation(
                f"disk {disk.number}: a {kind} hangs for {age} s; bridge: {disk.bridge.said()}; "
                f"server: {disk.server.said()}"
            )

    def _count(self) -> None:
        self.tally.verified_bytes = sum(disk.oracle.verified_bytes for disk in self.disks)

    def _look_for_tracebacks(self, disk: Disk) -> None:
        log = disk.bridge.log.read_text(errors="replace") if disk.bridge.log.exists() else ""
        if "Traceback" in log:
            where = log.index("Traceback")
            self.tally.problems.append(
                f"disk {disk.number}: a traceback in the bridge's log: {log[where : where + 3000]}"
            )

    def _judge(self) -> None:
        """A campaign that has looked at nothing has found nothing out."""
        if not self.tally.verified_bytes:
            self.tally.problems.append("nothing was verified")
        if not self.tally.killed and not self._plan.only:
            self.tally.problems.append("nothing was killed")


def _told(error: BaseException) -> str:
    """A violation in its own words; anything else is as much of a find, with its traceback."""
    if isinstance(error, Violation):
        return str(error)
    return "".join(traceback.format_exception(error)[-6:])


def _leaves(group: BaseExceptionGroup[Exception]) -> list[BaseException]:
    found: list[BaseException] = []
    for each in group.exceptions:
        found += _leaves(each) if isinstance(each, BaseExceptionGroup) else [each]
    return found


def run(plan: Plan, say: Callable[[str], None]) -> Tally:
    """One campaign in a directory of its own."""
    with short_directory() as folder:
        return trio.run(Campaign(plan, folder, say).run)


def never(tally: Tally) -> list[str]:
    """Kinds of faults that did not happen."""
    return [fault.name for fault in FAULTS if not tally.faults[fault.name]]
