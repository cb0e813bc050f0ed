"""Other people's front-ends are tortured, too; and what is lost under them is found."""

from __future__ import annotations

import pytest

from tests.torture import campaign
from tests.torture.campaign import Plan
from tests.torture.disk import MIB, Profile
from tests.torture.front_ends import LIBBLKIO, LINUX

LOST = "the image has|the guest reads"


def quiet(line: str) -> None:
    """What a campaign says on its way."""


def small(client: str, *, server: str = "plugin", cache: str = "writeback") -> Profile:
    """A disk of this client's whose cache is smaller than it is."""
    return Profile(server, cache, client=client, size_bytes=8 * MIB, cache_bytes=4 * MIB)


CLIENTS = [
    pytest.param(LIBBLKIO, marks=pytest.mark.peers),
    pytest.param(LINUX, marks=pytest.mark.qemu),
]

pytestmark = [pytest.mark.nbdkit, pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.mark.parametrize("client", CLIENTS)
def test_killed_under_another_front_end_nothing_is_lost(client: str) -> None:
    kills = ("server killed", "bridge killed", "both killed")
    plan = Plan(seed="ci", kills=4, profiles=[small(client)], only=kills)
    tally = campaign.run(plan, quiet)
    assert tally.problems == []
    assert tally.left_out.keys() <= {"clock jumps"}
    assert tally.killed >= 4
    assert tally.verified_bytes > MIB
    assert tally.clients.keys() == {client}
    assert f"{tally.clients[client]} of {client}" in tally.line()


@pytest.mark.parametrize("client", CLIENTS)
def test_planted_loss_is_found_under_another_front_end(client: str) -> None:
    profile = small(client, server="lying", cache="off")
    plan = Plan(seed="planted", hours=1, profiles=[profile], only=("bridge killed",))
    tally = campaign.run(plan, quiet)
    assert tally.has(LOST), tally.problems
