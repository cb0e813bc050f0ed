"""The limit of open descriptors is raised at the start."""

from __future__ import annotations

import resource

import pytest

from bridge.app.descriptors import allow_all_descriptors


@pytest.fixture
def low_limit():
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(512, before[1]), before[1]))
    yield before[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_soft_limit_is_raised_to_the_hard_one(low_limit: int) -> None:
    allow_all_descriptors()
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == (low_limit, low_limit)


def test_limit_that_may_not_be_raised_stays(low_limit: int, monkeypatch) -> None:
    def refuse(which: int, limits: tuple[int, int]) -> None:
        raise ValueError("not allowed to raise maximum limit")

    monkeypatch.setattr(resource, "setrlimit", refuse)
    allow_all_descriptors()
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] < low_limit
