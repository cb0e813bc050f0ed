"""Whether others want the processor (`crowding`)."""

from __future__ import annotations

from pathlib import Path

import pytest

from bridge.datapath.crowding import Crowding


class Clock:
    """A thread's times, as the system tells them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.now_s = 1000.0
        self._ran_ns = self._waited_ns = 0
        self.spend(0, 0, 0)
        self.crowding = Crowding(str(path))

    def spend(self, elapsed_s: float, ran_s: float, waited_s: float) -> None:
        self.now_s += elapsed_s
        self._ran_ns += round(ran_s * 1e9)
        self._waited_ns += round(waited_s * 1e9)
        self.path.write_text(f"{self._ran_ns} {self._waited_ns} 17\n")

    def look(self) -> bool:
        return self.crowding.look(self.now_s)


def test_a_thread_that_waits_as_long_as_it_runs_is_not_alone(tmp_path: Path) -> None:
    clock = Clock(tmp_path / "schedstat")
    assert not clock.look()  # There is nothing to compare with yet.
    clock.spend(0.06, 0.05, 0.01)
    assert not clock.look()
    clock.spend(0.06, 0.03, 0.03)
    assert clock.look()


def test_what_it_sleeps_says_nothing(tmp_path: Path) -> None:
    clock = Clock(tmp_path / "schedstat")
    clock.look()
    clock.spend(0.06, 0.001, 0.002)
    assert not clock.look()


def test_a_look_is_believed_for_a_while_and_then_taken_anew(tmp_path: Path) -> None:
    clock = Clock(tmp_path / "schedstat")
    clock.look()
    clock.spend(0.06, 0.02, 0.04)
    assert clock.look()
    clock.spend(0.9, 0.9, 0.0)
    assert clock.look()
    clock.spend(0.2, 0.1, 0.1)  # Of so long a time nothing is known.
    assert not clock.look()
    clock.spend(0.06, 0.02, 0.04)
    assert clock.look()
    clock.spend(1.1, 0.4, 0.4)
    assert not clock.look()
    clock.spend(0.06, 0.06, 0.0)
    assert not clock.look()


def test_between_two_looks_nothing_is_read(tmp_path: Path) -> None:
    clock = Clock(tmp_path / "schedstat")
    clock.look()
    clock.spend(0.01, 0.0, 0.01)
    assert not clock.look()
    clock.spend(0.05, 0.01, 0.04)
    assert clock.look()


def test_where_the_system_does_not_tell_nobody_waits(tmp_path: Path) -> None:
    crowding = Crowding(str(tmp_path / "none"))
    assert not crowding.look(1.0)
    assert not crowding.look(2.0)
    crowding.close()


@pytest.mark.parametrize("text", ["", "1", "one two three", "1.5 2.5 3"])
def test_what_is_no_times_is_not_asked_again(text: str, tmp_path: Path) -> None:
    path = tmp_path / "schedstat"
    path.write_text(text)
    crowding = Crowding(str(path))
    assert not crowding.look(1.0)
    path.write_text("1 1000000000000 1")
    assert not crowding.look(2.0)
    assert not crowding.look(2.06)
    crowding.close()


def test_the_system_tells() -> None:
    crowding = Crowding()
    crowding.look(1.0)
    crowding.look(1.06)
    crowding.close()
