"""Access traces of granule numbers for miss-ratio tests; each is a list, made from a seed."""

from __future__ import annotations

import bisect
import itertools
import random
from collections.abc import Callable

OBJECTS = 10_000
LENGTH = 100_000


def zipf(
    seed: int = 1, skew: float = 0.9, objects: int = OBJECTS, length: int = LENGTH
) -> list[int]:
    """Independent draws, popularity 1 / rank ** skew, ranks spread over the disk."""
    rng = random.Random(seed)
    sums = list(itertools.accumulate(1 / rank**skew for rank in range(1, objects + 1)))
    names = list(range(objects))
    rng.shuffle(names)
    total = sums[-1]
    return [names[bisect.bisect(sums, rng.random() * total)] for _ in range(length)]


def scan(start: int, length: int) -> list[int]:
    """Each granule once."""
    return list(range(start, start + length))


def zipf_and_scan(seed: int = 2) -> list[int]:
    """A hot set, and every now and then a backup reads through everything."""
    base = zipf(seed)
    trace: list[int] = []
    for part in range(10):
        trace += base[part * LENGTH // 10 : (part + 1) * LENGTH // 10]
        trace += scan(1_000_000 + part * 3000, 3000)
    return trace


def loop(objects: int = 1500, length: int = LENGTH) -> list[int]:
    """The same sequence again and again."""
    return [at % objects for at in range(length)]


def mixed(seed: int = 3) -> list[int]:
    """A hot set that moves, a loop and scans, interleaved."""
    rng = random.Random(seed)
    hot = zipf(seed, 1.0)
    trace: list[int] = []
    fresh = 5_000_000
    at = 0
    for index, name in enumerate(hot):
        trace.append(name + index // 25_000 * 2500)
        if index % 7 == 0:
            trace.append(2_000_000 + at % 700)
            at += 1
        if index % 10_000 == 0:
            trace += scan(fresh, 1500)
            fresh += 1500
        if rng.random() < 0.02:
            trace.append(3_000_000 + rng.randrange(1_000_000))
    return trace


TRACES: dict[str, Callable[[], list[int]]] = {
    "zipf": zipf,
    "zipf 0.7": lambda: zipf(7, 0.7),
    "zipf 1.2": lambda: zipf(8, 1.2),
    "zipf + scan": zipf_and_scan,
    "loop": loop,
    "loop 1.1": lambda: loop(1100),
    "mixed": mixed,
}
