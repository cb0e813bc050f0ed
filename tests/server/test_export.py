"""What our plugin's description says of an export."""

from __future__ import annotations

import pytest

from bridge.server.export import Export


def described(words: str) -> Export:
    return Export("vm0", 1 << 20, description=f"nbd-bridge volume=vm0 {words} session=yes")


def test_export_that_only_grew_has_the_last_real_writer() -> None:
    export = described("generation=9 written=8 grown_from=5")
    assert (export.sessions, export.content_sessions) == ((9, 8), (9, 5))


@pytest.mark.parametrize("word", ["", "grown_from=x", "grown_from=-1", "grown_from=" + "9" * 40])
def test_export_without_a_sensible_growth_has_its_counters_only(word: str) -> None:
    export = described(f"generation=9 written=8 {word}")
    assert export.content_sessions == export.sessions == (9, 8)


def test_growth_makes_no_writer_later_than_it_was() -> None:
    assert described("generation=9 written=3 grown_from=7").content_sessions == (9, 3)


def test_foreign_server_counts_nothing() -> None:
    assert Export("x", 1, description="grown_from=1").content_sessions is None


def test_reason_why_a_volume_is_read_only_is_taken_from_our_plugin_as_it_is() -> None:
    export = described("session=yes read-only: /a instance=1: Permission denied")
    assert export.volume.why_read_only == "/a instance=1: Permission denied session=yes"
    assert "instance" not in export.volume.words
    assert Export("x", 1, description="a read-only: disk").volume.why_read_only == ""
