"""What conftest.py does for every test."""

from __future__ import annotations

import pytest

_LENGTH_BYTES = 1 << 20


def test_difference_between_two_pieces_of_a_disk_is_explained_in_a_few_lines() -> None:
    """Whether it runs in CI or not: a full difference would take minutes."""
    expected = bytearray(_LENGTH_BYTES)
    expected[7] = 1
    with pytest.raises(AssertionError, match="At index 7") as caught:
        assert bytes(_LENGTH_BYTES) == bytes(expected)
    assert len(str(caught.value)) < 2000
