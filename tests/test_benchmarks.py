"""Benchmarks are run by hand: that what they import is still there is seen here."""

from __future__ import annotations

import importlib
import pkgutil

import pytest

import tests.bench

_OTHERS = ("__main__", "far_plugin")
"""One runs, the other needs nbdkit."""


@pytest.mark.parametrize(
    "name",
    [each.name for each in pkgutil.iter_modules(tests.bench.__path__) if each.name not in _OTHERS],
)
def test_every_benchmark_can_be_imported(name: str) -> None:
    assert importlib.import_module(f"tests.bench.{name}").__doc__
