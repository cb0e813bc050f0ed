"""The heap keeps the pages of freed buffers; counted in a process of its own."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
from bridge.app.malloc_tuning import keep_freed_pages
if sys.argv[1] == "kept":
    keep_freed_pages()
def buffers():
    held = [bytearray(256 << 10) for _ in range(8)]
buffers()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(50):
    buffers()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(how: str) -> int:
    """Of 400 buffers of 64 pages each."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, how], check=True, capture_output=True, text=True
    )
    return int(done.stdout)


@pytest.mark.parametrize(("how", "least", "most"), [("kept", 0, 1000), ("plain", 10_000, 10**9)])
def test_freed_buffers_cost_no_page_faults_again(how: str, least: int, most: int) -> None:
    assert least <= page_faults(how) <= most
