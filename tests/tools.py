"""Helpers that more than one folder of tests uses."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable

import pytest

from bridge.cli.wording import explain
from bridge.errors import BridgeError

HUNG_S = 60.0
"""Nothing that a test waits for takes this long, on the busiest machine: it hangs."""


def need(name: str) -> str:
    """The path of the external tool `name`.

    A test that cannot have it fails in CI, where everything is installed, and is skipped with the
    reason elsewhere.
    """
    found = shutil.which(name, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")
    if found is None:
        missing(f"{name} is not installed")
    assert found is not None
    return found


def missing(reason: str) -> None:
    """What a test needs is not there: fails in CI, skips elsewhere."""
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)


def told(pattern: str) -> Callable[[BridgeError], bool]:
    """For `pytest.raises(…, check=…)`: what the operator is told of the error has `pattern`."""

    def check(error: BridgeError) -> bool:
        return re.search(pattern, explain(error)) is not None

    return check
