"""The simulation by hand: `./run sim`, or `python -m tests.sim`.

--seed SEED         one program, exactly: its trace, and if it fails a shorter one that fails too
--seeds N           so many programs on all cores, from --first on; one line of counts
--hours H           as many as there is time for
--planted [NAME]    the planted bugs (or that one): each has to be found
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from typing import Any

import trio

from tests.sim import campaign, coverage, planted
from tests.sim.config import OtherVersion, Seed
from tests.sim.world import World

_SAY_EVERY_S = 30.0


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status: 1 if something was found, or a planted bug was not."""
    parser = argparse.ArgumentParser(prog="./run sim", description=__doc__.partition("\n")[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--seed", help="replay one program and print what happens")
    what.add_argument("--seeds", type=int, help="run so many programs")
    what.add_argument("--hours", type=float, help="run programs for so long")
    what.add_argument("--planted", nargs="?", const="", help="look for planted bugs")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--jobs", type=int, default=0, help="processes (all cores)")
    parser.add_argument(
        "--no-shrink", action="store_true", help="do not look for a shorter program"
    )
    chosen = parser.parse_args(arguments)
    if chosen.seed is not None:
        return _replay(chosen.seed, shrinks=not chosen.no_shrink)
    if chosen.planted is not None:
        return _plant(chosen.planted, chosen.jobs)
    return _run_many(chosen)


def _replay(text: str, *, shrinks: bool) -> int:
    try:
        seed = Seed.parse(text)
    except (OtherVersion, ValueError) as error:
        print(f"sim: {error}", file=sys.stderr)
        return 2
    error = trace(seed)
    if error is None:
        print(f"\n{seed} finds nothing")
        return 0
    print(f"\n{seed} fails: {campaign.describe(error)}")
    traceback.print_exception(error)
    if shrinks and seed.kept is None:
        print("\nlooking for a shorter program …")
        print(f"./run sim --seed {campaign.shrink(seed)}")
    return 1


def trace(seed: Seed) -> BaseException | None:
    """Print what happens in one program; its error."""
    began_s = 0.0

    def tell(moment_s: float, event: str, fields: dict[str, Any]) -> None:
        nonlocal began_s
        began_s = trio.current_time() - moment_s
        words = " ".join(f"{key}={value}" for key, value in fields.items())
        print(f"{moment_s:11.4f}  {event:18}  {words}")

    def log(level: str, event: dict[str, Any]) -> None:
        text = event.pop("event", "")
        tell(trio.current_time() - began_s, f"  {level}", {"says": text, **event})

    with campaign.programs(log=log):
        world = World(seed, tell=tell)
        try:
            world.run()
        except Exception as error:
            return error
    return None


def _run_many(chosen: argparse.Namespace) -> int:
    said_s = time.monotonic()
    total = campaign.Result()
    failures = 0
    for total in campaign.run_many(
        chosen.first, chosen.seeds, hours=chosen.hours or 0, jobs=chosen.jobs
    ):
        for seed, error in total.failures[failures:]:
            print(f"{seed} fails: {error}", flush=True)
        failures = len(total.failures)
        if time.monotonic() - said_s > _SAY_EVERY_S:
            said_s = time.monotonic()
            print(total, flush=True)
    print(total)
    print(f"seen: {', '.join(f'{name} {n}' for name, n in sorted(total.seen.items()))}")
    if never := coverage.never(total.seen, total.counts):
        print(f"never exercised: {', '.join(never)}")
    if failures and not chosen.no_shrink:
        print(f"./run sim --seed {campaign.shrink(Seed.parse(total.failures[0][0]))}")
    return 1 if failures else 0


def _plant(name: str, jobs: int) -> int:
    known = planted.asserted() | planted.RARE
    if name and name not in known:
        print(f"sim: no planted bug {name!r}: there are {', '.join(known)}", file=sys.stderr)
        return 2
    sought = [name] if name else list(planted.asserted())
    missed = 0
    for found in planted.hunt(sought, jobs=jobs):
        print(found, flush=True)
        missed += not found.seed
    print(f"{len(sought) - missed} of {len(sought)} planted bugs found")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
