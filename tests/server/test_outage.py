"""What the operator is told of times without a server."""

from __future__ import annotations

import gc
from weakref import ref

import structlog.testing

from bridge.errors import ConnectionLost, ProtocolError
from bridge.server.outage import Outages


def test_outage_is_told_at_its_begin_each_minute_and_at_its_end() -> None:
    outages = Outages("nbd://far")
    with structlog.testing.capture_logs() as lines:
        outages.begin(100.0, ConnectionLost("reset"))
        outages.lost(3)
        for second in range(150):
            outages.remind(100.0 + second)
            outages.failed(ConnectionLost("refused"))
        outages.end(250.0, generation=2)
        outages.remind(1000.0)
    assert [line["event"] for line in lines] == [
        "connection lost",
        "still without a server",
        "still without a server",
        "reconnected",
    ]
    assert str(lines[0]["reason"]) == "reset"
    assert (lines[1]["seconds"], str(lines[1]["reason"])) == (60, "refused")
    assert (lines[3]["after_s"], lines[3]["sent_again"]) == (150.0, 3)


class _Reply:
    """What a parser has at hand."""


def test_outage_keeps_nothing_of_the_reply_that_broke_a_rule() -> None:
    """It knows its request, and that the guest's memory."""
    outages = Outages("nbd://far")
    kept: list[ref[_Reply]] = []

    def parse() -> None:
        reply = _Reply()
        kept.append(ref(reply))
        raise ProtocolError("nonsense")

    try:
        parse()
    except ProtocolError as error:
        outages.begin(0.0, error)
    gc.collect()
    assert (outages.reason, kept[0]()) == ("nonsense", None)


def test_time_without_a_server_adds_up() -> None:
    outages = Outages("nbd://far")
    assert outages.seconds_total(50.0) == 0
    outages.begin(100.0, ConnectionLost("reset"))
    assert outages.seconds(110.0) == 10.0
    outages.end(120.0, generation=2)
    outages.begin(200.0, ConnectionLost("reset"))
    outages.begin(205.0, ConnectionLost("another connection"))
    assert outages.seconds(210.0) == 10.0
    assert outages.seconds_total(210.0) == 30.0
    assert outages.total == 2
    assert outages.reason == "another connection"


def test_failure_is_told_again_when_its_reason_changes() -> None:
    outages = Outages("nbd://far")
    outages.begin(0.0, ConnectionLost("reset"))
    assert outages.failed(ConnectionLost("refused"))
    assert not outages.failed(ConnectionLost("refused"))
    assert outages.failed(ConnectionLost("no route"))


def test_connections_that_are_replaced_on_purpose_are_not_an_outage() -> None:
    outages = Outages("nbd://far")
    outages.end(10.0, generation=2)
    assert (outages.total, outages.seconds_total(10.0)) == (0, 0.0)
