"""What the parser makes of a serial console."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from bridge.demo.report import GuestReport, SerialParser


def parse(data: bytes) -> GuestReport:
    parser = SerialParser()
    parser.feed(data)
    parser.finish()
    return parser.report


def test_pass_line_after_firmware_escapes_passes() -> None:
    report = parse(b"\x1bc\x1b[?7l\x1b[2JSeaBIOS\r\nREPORT size=12\r\n\x1b[0mPASS\r\n")

    assert report.passed
    assert report.values == {"size": "12"}
    assert report.number("size") == 12


def test_silent_end_does_not_pass() -> None:
    assert not parse(b"booting\r\nREPORT a=b\r\n").passed


def test_fail_line_gives_the_reason() -> None:
    report = parse(b"FAIL mount gave 32\r\nFAIL second\r\n")

    assert (report.passed, report.reason) == (False, "mount gave 32")


def test_fail_after_pass_fails() -> None:
    assert not parse(b"PASS\r\nFAIL umount\r\n").passed


def test_pass_after_fail_fails() -> None:
    assert not parse(b"FAIL early\r\nPASS\r\n").passed


def test_kernel_panic_is_a_failure() -> None:
    report = parse(b"[    1.2] Kernel panic - not syncing: VFS: no root\r\nPASS\r\n")

    assert not report.passed
    assert "no root" in report.reason


def test_pass_inside_a_line_does_not_pass() -> None:
    assert not parse(b"echo PASS\r\nPASSED\r\n").passed


def test_console_flood_stays_bounded() -> None:
    parser = SerialParser()
    for i in range(2000):
        parser.feed(b"REPORT k%d=v\n" % i + b"x" * 10_000)

    assert len(parser.report.values) <= 1000
    assert len(parser.report.tail) <= 40
    assert max(map(len, parser.report.tail)) <= 4096


@given(st.binary(max_size=200), st.lists(st.integers(0, 200)))
def test_console_split_anywhere_equals_whole(noise: bytes, cuts: list[int]) -> None:
    data = b"REPORT a=1\r\n" + noise + b"\nREPORT b=2\nFAIL why\n"
    split = SerialParser()
    edges = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    lines = [
        line for start, end in itertools.pairwise(edges) for line in split.feed(data[start:end])
    ]
    whole = SerialParser()

    assert lines == whole.feed(data)
    assert split.report == whole.report
