"""What the containers' test says while it builds."""

from __future__ import annotations

import sys

import pytest

from tests.docker.command import Failed, run
from tests.docker.progress import Progress


def test_step_is_shown_at_once_and_other_lines_every_few_seconds() -> None:
    said: list[str] = []
    now_s = [0.0]
    progress = Progress(said.append, "build", lambda: now_s[0])

    for at_s, line in [
        (0.1, "Step 1/40 : FROM debian:bookworm-slim"),
        (0.2, "Get:1 gcc"),
        (4.0, "Get:2 python3"),
        (6.0, "Get:3 \x1b[1mnbdkit\x1b[0m"),
        (6.5, "#9 [build 3/7] RUN pip"),
        (20.0, ""),
    ]:
        now_s[0] = at_s
        progress(line)

    assert said == [
        "build      0 s  Step 1/40 : FROM debian:bookworm-slim",
        "build      6 s  Get:3 nbdkit",
        "build      6 s  #9 [build 3/7] RUN pip",
    ]


def test_command_s_lines_are_seen_while_it_runs_and_returned_at_its_end() -> None:
    seen: list[str] = []

    done = run(sys.executable, "-c", "print('one'); print('two')", limit_s=60, watch=seen.append)

    assert seen == ["one", "two"]
    assert done.stdout == "one\ntwo\n"


def test_command_that_takes_too_long_is_ended_although_its_child_keeps_the_output_open() -> None:
    with pytest.raises(Failed, match="not done after 0 s"):
        run("sh", "-c", "sleep 3 & wait", limit_s=0.3)
