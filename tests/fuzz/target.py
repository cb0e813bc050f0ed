"""What a fuzz target is, and the rules that hold for each run of one.

A target is a function of bytes that has to return, whatever they are: errors that the product
documents are its own business, everything else leaves it and is a fault. The rules beyond that are
checked here, where an input is replayed: it takes no more than so many lines of Python, and no more
than so much memory at a time. Both are counted, not timed: they are the same on every machine.
"""

from __future__ import annotations

import hashlib
import re
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

CORPUS = Path(__file__).parent / "corpus"
VERSION_FILE = "VERSION"


class OtherVersion(Exception):
    """An input was made for another version of its target, and would mean something else now."""


class TooManyLines(AssertionError):
    """An input keeps the product busy: as good as a hang."""


class TooMuchMemory(AssertionError):
    """An input makes the product take memory without a bound."""


@dataclass(frozen=True)
class Target:
    """One kind of hostile peer."""

    name: str
    run: Callable[[bytes], object]
    """Returns a word for what came of it, or nothing."""
    version: int = 1
    """Raised by a change that alters what the bytes of an input mean."""
    longest_bytes: int = 4096
    """Of an input that the fuzzer makes."""
    most_lines: int = 2_000_000
    """Lines of Python that an input may take."""
    most_bytes: int = 16 << 20
    """Memory that an input may take at a time."""
    modules: tuple[str, ...] = ("bridge",)
    """Packages whose coverage leads the fuzzer."""

    @property
    def corpus(self) -> Path:
        """The directory of its inputs."""
        return CORPUS / self.name

    def inputs(self) -> list[Path]:
        """The files of its corpus. Raises OtherVersion."""
        check_version(self)
        return sorted(path for path in self.corpus.iterdir() if path.name != VERSION_FILE)


def check_version(target: Target) -> None:
    """Raises OtherVersion for a corpus that was made for another version of the target."""
    version = target.corpus / VERSION_FILE
    found = version.read_text().strip() if version.exists() else "none"
    if found != str(target.version):
        raise OtherVersion(
            f"the corpus of {target.name} is of version {found}, the target of version "
            f"{target.version}: make it anew with ./run fuzz {target.name} --anew"
        )


def fault_name(target: Target, data: bytes) -> str:
    """The name of a file that holds an input which fails."""
    return f"{target.name}-v{target.version}-{hashlib.sha256(data).hexdigest()[:12]}"


def named_target(name: str, targets: dict[str, Target]) -> Target:
    """The target of a file that `fault_name` named. Raises OtherVersion, ValueError."""
    match = re.fullmatch(r"([a-z_]+)-v([0-9]+)-[0-9a-f]+", name)
    if match is None or match[1] not in targets:
        raise ValueError(f"{name}: not the name of an input: TARGET-vVERSION-HASH")
    target = targets[match[1]]
    if int(match[2]) != target.version:
        raise OtherVersion(
            f"{name} was made for version {match[2]} of {target.name}, this is version "
            f"{target.version}: it means something else now"
        )
    return target


def replay(target: Target, data: bytes) -> object:
    """One input under all rules: what came of it. Raises whatever must not be raised."""
    outcome = _within_lines(target, data)
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        target.run(data)
        taken = tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()
    if taken > target.most_bytes:
        raise TooMuchMemory(f"{target.name}: an input of {len(data)} bytes takes {taken}")
    return outcome


def _within_lines(target: Target, data: bytes) -> object:
    left = target.most_lines

    def count(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            raise TooManyLines(f"{target.name}: more than {target.most_lines} lines")
        return count

    outer = sys.gettrace()
    sys.settrace(count)
    try:
        return target.run(data)
    finally:
        sys.settrace(outer)


def check_line(text: str, most_chars: int = 60_000) -> None:
    """The text of an error is one line, fit for a terminal. Raises AssertionError."""
    assert len(text.splitlines()) <= 1, text
    assert "\x1b" not in text, text
    assert len(text) <= most_chars, len(text)


def chunks(data: bytes, size: int) -> Iterator[bytes]:
    """`data` in parts of `size` bytes."""
    for at in range(0, len(data), size):
        yield data[at : at + size]
