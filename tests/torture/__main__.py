"""`./run torture`, or `python -m tests.torture`: real processes, broken again and again.

Exit status 1 if anything was lost, hung, failed for no reason, or if nothing was verified.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace

from tests.ceph.cluster import Cluster, install
from tests.processes import short_directory
from tests.torture import campaign, endurance
from tests.torture.campaign import Plan
from tests.torture.disk import OTHERS, PROFILES, Profile
from tests.torture.tally import Tally

_ALL = (*PROFILES, *OTHERS)


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(prog="./run torture", description=__doc__)
    parser.add_argument("--hours", type=float, help="go on for so long (default: 1)")
    parser.add_argument("--kills", type=int, help="go on until so many processes were killed")
    parser.add_argument("--seed", default="", help="of all the dice (default: a new one)")
    parser.add_argument(
        "endurance",
        nargs="?",
        choices=["endurance"],
        help="a compressed week instead: nothing grows",
    )
    parser.add_argument("--disks", type=int, default=len(_ALL), help="so many, at most")
    parser.add_argument("--ceph", action="store_true", help="one more disk, on a Ceph of one node")
    chosen = parser.parse_args(arguments)
    seed = chosen.seed or os.urandom(4).hex()
    if chosen.endurance:
        return _endure(seed, chosen.disks)
    no_limit = chosen.hours is None and chosen.kills is None
    plan = Plan(
        seed=seed,
        hours=1.0 if no_limit else chosen.hours or 0.0,
        kills=300 if no_limit else chosen.kills or 0,
        profiles=_ALL[: chosen.disks],
    )
    with _ceph() if chosen.ceph else nullcontext(()) as more:
        plan = replace(plan, profiles=(*plan.profiles, *more))
        _say(f"seed {plan.seed}; {len(plan.profiles)} disks")
        return _report(campaign.run(plan, _say), plan)


@contextmanager
def _ceph() -> Iterator[tuple[Profile, ...]]:
    """A cluster, and the profile of a disk on it."""
    with short_directory() as folder:
        cluster = Cluster(folder / "ceph")
        install()
        cluster.start()
        try:
            yield (Profile("rbd", "writeback", cluster=cluster),)
        finally:
            cluster.remove()


def _endure(seed: str, disks: int) -> int:
    plan = Plan(seed=seed, profiles=endurance.PROFILES[:disks])
    _say(f"seed {seed}; {endurance.WEEK}")
    return _report(endurance.run(plan, endurance.WEEK, _say), plan)


def _say(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {line}", flush=True)


def _report(tally: Tally, plan: Plan) -> int:
    for title, counts in (
        ("faults", tally.faults),
        ("kills", tally.kills),
        ("requests", tally.requests),
        ("failed with a reason", tally.errors),
    ):
        print(f"{title}: " + ", ".join(f"{name} {count}" for name, count in counts.most_common()))
    if tally.killed and (missing := campaign.never(tally)):
        print(f"never happened: {', '.join(missing)}")
    for name, why in tally.left_out.items():
        print(f"left out: {name}: {why}")
    for problem in tally.problems:
        print(f"FOUND: {problem}")
    verdict = "FAILED" if tally.problems else "nothing lost, nothing hung"
    _say(f"seed {plan.seed}: {tally.line()}: {verdict}")
    return 1 if tally.problems else 0


if __name__ == "__main__":
    sys.exit(main())
