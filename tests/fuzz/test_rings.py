"""A few thousand cases of the ring campaign; `python -m tests.fuzz.rings` runs more."""

from __future__ import annotations

import pytest

from tests.fuzz.rings import Campaign

_CASES = 5000

REGRESSIONS = [49070]
"""Cases that failed once."""


def test_rings_of_nonsense_break_nothing() -> None:
    campaign = Campaign()
    for seed in range(_CASES):
        try:
            campaign.run(seed)
        except BaseException as error:
            pytest.fail(f"case {seed}: {error!r}")
    # The campaign is worth something only while it gets past the first check.
    assert campaign.outcomes["requests"] > _CASES
    assert campaign.outcomes["queue broken"] > _CASES // 20
    assert campaign.outcomes["a bad address"] > _CASES // 20


@pytest.mark.parametrize("seed", REGRESSIONS)
def test_ring_that_failed_once_does_not_again(seed: int) -> None:
    Campaign().run(seed)
