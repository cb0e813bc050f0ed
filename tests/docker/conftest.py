"""The containers' scripts, importable as they are in the containers: by their bare names."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "docker" / "scripts"


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """No setting of this machine's reaches the scripts."""
    for name in list(os.environ):
        if name.startswith(("NBD_", "BRIDGE_", "GUEST_", "RBD_")):
            monkeypatch.delenv(name)


sys.path.insert(0, str(SCRIPTS))
