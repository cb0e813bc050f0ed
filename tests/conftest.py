"""What every test shares."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from xdist.scheduler import LoadScopeScheduling

from tests import tiers, tools, turns
from tests.processes import short_directory

# A bridge that a test starts has no cache unless the test says so: the default one is a large
# file in the system's cache directory.
os.environ["NBD_BRIDGE_SERVE_CACHE_MODE"] = "off"
# And no control socket, which would be in the system's directory.
os.environ["NBD_BRIDGE_SERVE_API"] = "off"

# Where these are set pytest explains a failed comparison in full, and the full difference between
# two pieces of a disk takes minutes and hides the failure behind a time-out.
# (Tests that must not be skipped in CI ask `tiers.in_ci`.)
if os.environ.pop("CI", "") or os.environ.pop("BUILD_NUMBER", ""):
    os.environ[tiers.IN_CI] = "true"

# Under nohup it is ignored, and so it would be by every bridge that a test sends it to.
signal.signal(signal.SIGHUP, signal.SIG_DFL)

# No test asserts a time: on a busy machine any example may take long.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("nbd-bridge")
    group.addoption(
        "--fast",
        action="store_true",
        help="only what needs no more than Python packages and takes no longer than a moment",
    )
    group.addoption("--rest", action="store_true", help="only what --fast leaves out")
    group.addoption(
        "--package", action="store_true", help="only the tests that install the Debian package"
    )
    group.addoption(
        "--needs", metavar="FILE", help="run nothing; write the tools that are needed to FILE"
    )


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    tiers.mark(items)
    only_package = config.getoption("package")
    _leave_out(
        config, items, lambda item: bool(item.get_closest_marker(tiers.PACKAGE)) != only_package
    )
    if config.getoption("fast"):
        _leave_out(config, items, tiers.is_left_out_by_fast)
    if config.getoption("rest"):
        _leave_out(config, items, lambda item: not tiers.is_left_out_by_fast(item))
    if hasattr(config, "workerinput"):
        items[:] = tiers.in_order(items)


def _leave_out(
    config: pytest.Config, items: list[pytest.Item], which: Callable[[pytest.Item], bool]
) -> None:
    left_out = [item for item in items if which(item)]
    config.hook.pytest_deselected(items=left_out)
    gone = set(left_out)
    items[:] = [item for item in items if item not in gone]


def pytest_collection_finish(session: pytest.Session) -> None:
    if path := session.config.getoption("needs"):
        with open(path, "w") as file:
            file.write(" ".join(tiers.needed(session.items)))
        session.items.clear()
    # The modules and the tests themselves stay: no collection of garbage has to go through them.
    gc.collect()
    gc.freeze()


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """`-n auto`: none for a few named tests."""
    if config.args_source is pytest.Config.ArgsSource.ARGS or config.getoption("needs"):
        return 0
    # Half of a test's time is waiting, as a rule: for processes, or for the loop's turn.
    return 2 * len(os.sched_getaffinity(0))


class _Scheduler(LoadScopeScheduling):
    """Gives workers units of tests as `tests.tiers` has them, in the order of `tiers.in_order`."""

    def _split_scope(self, nodeid: str) -> str:
        return tiers.unit_of(nodeid)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> _Scheduler | None:
    """Not `--dist=loadgroup`, whose groups pytest 9.2 ignores: xdist 3.8 writes them where it no
    longer looks."""
    return _Scheduler(config, log) if config.getoption("dist") == "loadscope" else None


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, bool, bool]:
    tools.allowed = {mark.name for mark in item.iter_markers()}
    try:
        return (yield)
    finally:
        tools.allowed = None


@pytest.fixture
def directory() -> Iterator[Path]:
    """A directory of its own for the test, with a short name: see `short_directory`."""
    with short_directory() as path:
        yield path


@pytest.fixture(autouse=True)
def signals_as_they_were() -> Iterator[None]:
    """A stop ignores further signals until the process has ended; here it goes on, and whatever it
    starts would ignore them as well."""
    numbers = (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM)
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in before.items():
        if signal.getsignal(number) is not handler:
            signal.signal(number, handler)


@pytest.fixture(autouse=True, scope="module")
def nothing_left_to_collect() -> Iterator[None]:
    """Tests of other files count descriptors: those of tracebacks, in cycles, go before that."""
    yield
    gc.collect()


@pytest.fixture(autouse=True)
def _fresh_turn() -> None:
    turns.forget()
