"""The cache against the oracle of `world`: random programs with every fault injected.

A failure names its seed: `run(seed)` repeats the program.
"""

from __future__ import annotations

import os

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from .world import DISCARD, WRITE, WRITE_ZEROES, Killed, World, run

slow = pytest.mark.slow

PROGRAMS = int(os.environ.get("CACHE_PROGRAMS", "3000"))
CHUNKS = 30
_OF_THE_FAST = 4
"""So many of the chunks are not slow."""


@pytest.mark.parametrize(
    "chunk",
    [*range(_OF_THE_FAST), *(pytest.param(n, marks=slow) for n in range(_OF_THE_FAST, CHUNKS))],
)
def test_random_programs_with_faults_never_lose_or_invent_data(chunk: int) -> None:
    first = int(os.environ.get("CACHE_SEED", "0"))
    for seed in range(first + chunk, first + PROGRAMS, CHUNKS):
        run(seed)


@pytest.mark.parametrize("seed", range(40))
def test_random_programs_without_faults_never_fail_a_request(seed: int) -> None:
    run(f"calm {seed}", faults=False)


@pytest.mark.parametrize("seed", range(20))
def test_long_program_ends_with_all_data_on_the_medium(seed: int) -> None:
    run(f"long {seed}", steps=1500)


class Machine(RuleBasedStateMachine):
    """The same world, with Hypothesis choosing (and shrinking) the steps."""

    @initialize(seed=st.integers(0, 2**32))
    def begin(self, seed: int) -> None:
        self.world = World(seed)

    def _do(self, action: object, *arguments: object, **named: object) -> None:
        try:
            action(*arguments, **named)  # type: ignore[operator]
        except Killed:
            self.world.kill()

    @rule(op=st.sampled_from((WRITE, WRITE, WRITE, DISCARD, WRITE_ZEROES)))
    def write(self, op: int) -> None:
        self._do(self.world.guest_write, op)

    @rule()
    def read(self) -> None:
        self._do(self.world.guest_read)

    @rule()
    def flush(self) -> None:
        self._do(self.world.guest_flush)

    @rule(count=st.integers(1, 10))
    def serve(self, count: int) -> None:
        for _ in range(count):
            self._do(self.world.serve)

    @rule(error=st.sampled_from((5, 28)))
    def refuse(self, error: int) -> None:
        self._do(self.world.serve, error=error)

    @rule()
    def end_turn(self) -> None:
        self._do(self.world.run_turn)

    @rule(seconds=st.sampled_from((0.1, 1.0, 10.0, 100.0)))
    def tick(self, seconds: float) -> None:
        self._do(self.world.tick, seconds)

    @rule(power_loss=st.booleans())
    def reconnect(self, power_loss: bool) -> None:
        self._do(self.world.reconnect, power_loss=power_loss)

    @rule(stores=st.integers(0, 20))
    def kill_soon(self, stores: int) -> None:
        self.world.image.stores_left = stores

    @rule()
    def give_up(self) -> None:
        self._do(self.world.give_up)

    @rule()
    def grow(self) -> None:
        self._do(self.world.grow)

    @rule()
    def drop_clean(self) -> None:
        self._do(self.world.drop_clean)

    @rule()
    def fail_everything(self) -> None:
        self._do(self.world.fail_everything)

    @rule()
    def stop(self) -> None:
        self._do(self.world.stop)

    @rule()
    def lose_host(self) -> None:
        self._do(self.world.lose_host)

    def teardown(self) -> None:
        if hasattr(self, "world"):
            self.world.settle()


TestMachine = Machine.TestCase
TestMachine.settings = settings(
    max_examples=150,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
