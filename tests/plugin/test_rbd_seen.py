"""What is remembered of an RBD image, without a Ceph: `test_rbd` has the real one."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest

VERSION = 7
NAME = b"\x03\x00\x00\x00abc"


class NoData(Exception):
    """As of `rados`."""


class FakePool:
    """A pool whose attribute changes while the plugin reads it."""

    def __init__(self, values: list[bytes]) -> None:
        self.values = values

    def get_xattr(self, name: str, attribute: str) -> bytes:
        if not self.values:
            raise NoData
        return self.values.pop(0) if len(self.values) > 1 else self.values[0]

    def read(self, name: str) -> bytes:
        return NAME

    def stat(self, name: str) -> None:
        assert name == "rbd_header.abc"

    def get_last_version(self) -> int:
        return VERSION

    def close(self) -> None:
        """Nothing to give back."""


@pytest.fixture
def is_as_remembered(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[bytes]], bool]:
    rados: Any = ModuleType("rados")
    rados.NoData, rados.Ioctx = NoData, FakePool
    monkeypatch.setitem(sys.modules, "rados", rados)
    monkeypatch.delitem(sys.modules, "nbd_plugin.rbd_seen", raising=False)
    rbd_seen = importlib.import_module("nbd_plugin.rbd_seen")
    monkeypatch.delitem(sys.modules, "nbd_plugin.rbd_seen")
    now_s = 0.0

    def sleep(seconds: float) -> None:
        nonlocal now_s
        now_s += seconds

    monkeypatch.setattr(rbd_seen.time, "sleep", sleep)
    monkeypatch.setattr(rbd_seen.time, "monotonic", lambda: now_s)
    return lambda values: rbd_seen.HeaderVersion(lambda: FakePool(values), "vm0").is_as_remembered()


@pytest.mark.parametrize(
    ("values", "answer"),
    [
        ([b"abc 7"], True),
        ([b"abc 6"], False),
        ([], False),
        pytest.param([b"open"] * 5 + [b"abc 7"], True, id="being-given-back"),
        pytest.param([b"open"] * 5 + [b"abc 6"], False, id="given-back-and-written"),
        pytest.param([b"open"], False, id="killed-before-it-remembered"),
    ],
)
def test_image_is_as_it_was_remembered(
    is_as_remembered: Callable[[list[bytes]], bool], values: list[bytes], answer: bool
) -> None:
    assert is_as_remembered(values) == answer
