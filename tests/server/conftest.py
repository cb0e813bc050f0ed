"""Fixtures of the NBD client's tests."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def folder(directory: Path) -> Path:
    return directory
