"""Many programs: on all cores, counted, and those that fail made shorter."""

from __future__ import annotations

import gc
import multiprocessing
import os
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from tests.sim import coverage
from tests.sim.config import Seed, script
from tests.sim.host import simulated
from tests.sim.world import World

_CHUNK = 8


@dataclass
class Result:
    """What programs have met."""

    programs: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    seen: Counter[str] = field(default_factory=Counter)
    """Transitions and states, see `coverage`."""
    failures: list[tuple[str, str]] = field(default_factory=list)
    """Seed and error."""
    cpu_s: float = 0.0

    def add(self, other: Result) -> None:
        """Both together."""
        self.programs += other.programs
        self.counts += other.counts
        self.seen += other.seen
        self.failures += other.failures
        self.cpu_s += other.cpu_s

    def __str__(self) -> str:
        faults = ", ".join(f"{name} {count}" for name, count in sorted(self.counts.items()))
        speed = self.programs / self.cpu_s if self.cpu_s else 0
        return (
            f"{self.programs} programs ({speed:.1f} per CPU second), "
            f"{len(self.failures)} failed; {faults}"
        )


@contextmanager
def programs(
    seen: Counter[str] | None = None, *, log: Callable[[str, dict[str, Any]], None] | None = None
) -> Iterator[None]:
    """Programs can run within, all in the same way: what gathers their coverage runs lines of the
    product, and a process may be killed at any of them. `log` gets what the bridges log."""
    with simulated(log=log), coverage.gathered(Counter() if seen is None else seen):
        with _collected_by_program():
            yield


def failure_of(seed: Seed) -> str:
    """Run one program within `programs`: how it fails, "" if it does not."""
    try:
        World(seed).run()
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        return describe(error)
    finally:
        gc.collect(0)
    return ""


def describe(error: BaseException) -> str:
    """One line: the error, and where it was raised if it is none of the oracle's."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({os.path.relpath(frames[-1].filename)}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}{where}"


def run_some(
    numbers: Iterable[int],
    *,
    until: Callable[[Result], bool] = lambda _: False,
    plant: Callable[[], object] = lambda: None,
) -> Result:
    """These programs, in this process. `plant` puts a bug into the simulated product."""
    result = Result()
    began = time.process_time()
    with programs(result.seen):
        plant()
        for number in numbers:
            world = World(Seed(number))
            try:
                world.run()
            except KeyboardInterrupt:
                raise
            except BaseException as error:
                result.failures.append((str(world.seed), describe(error)))
            result.programs += 1
            result.counts += world.counts
            result.counts["requests"] += world.guest.asked_total
            result.counts["sectors judged"] += world.oracle.checked
            del world
            gc.collect(0)
            if until(result):
                break
    result.cpu_s = time.process_time() - began
    return result


@contextmanager
def _collected_by_program() -> Iterator[None]:
    """What a program leaves is collected at its end, while it is in the processor's caches: that
    takes half the time, and what was there before is not looked at again."""
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()


def _chunk(first: int) -> Result:
    return run_some(range(first, first + _CHUNK))


def run_many(
    first: int, programs: int | None, *, hours: float = 0, jobs: int = 0
) -> Iterator[Result]:
    """Programs from `first` on, on all cores; the sum so far after each few. `programs` None: for
    `hours`."""
    end_s = time.monotonic() + hours * 3600
    total = Result()

    def firsts() -> Iterator[int]:
        at = first
        while (programs is None and time.monotonic() < end_s) or (
            programs is not None and at < first + programs
        ):
            yield at
            at += _CHUNK

    with multiprocessing.get_context("fork").Pool(jobs or os.cpu_count()) as pool:
        for result in pool.imap_unordered(_chunk, firsts()):
            total.add(result)
            yield total


def shrink(seed: Seed, *, plant: Callable[[], object] = lambda: None) -> Seed:
    """A shorter program that fails in the same way: with the same kind of error."""
    with programs():
        plant()
        kind = failure_of(seed).partition(":")[0]
        if not kind:
            raise ValueError(f"{seed} does not fail")
        kept = [number for number, _, _ in script(seed)[1]]
        size = max(1, len(kept) // 2)
        while True:
            at = 0
            while at < len(kept):
                fewer = kept[:at] + kept[at + size :]
                if failure_of(Seed(seed.number, tuple(fewer))).partition(":")[0] == kind:
                    kept = fewer
                else:
                    at += size
            if size == 1:
                return Seed(seed.number, tuple(kept))
            size = max(1, size // 2)
