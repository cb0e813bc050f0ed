"""Colours are for terminals, and NO_COLOR forbids them."""

from __future__ import annotations

import sys

import pytest

from bridge.cli.common import coloured


@pytest.mark.parametrize(
    ("terminal", "no_color", "is_coloured"),
    [(True, "", True), (True, "1", False), (False, "", False)],
)
def test_colour_is_used_on_a_terminal_that_did_not_forbid_it(
    monkeypatch: pytest.MonkeyPatch, terminal: bool, no_color: str, is_coloured: bool
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    monkeypatch.setenv("NO_COLOR", no_color)

    assert ("\x1b[" in coloured("ok", "green")) is is_coloured
