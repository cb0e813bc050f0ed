"""A last word before the process ends."""

from __future__ import annotations

import signal
import subprocess
import sys

SHORTENED = """
import mmap, os
from bridge.app.bus_errors import report_bus_errors
report_bus_errors()
fd = os.memfd_create("guest-memory")
os.ftruncate(fd, 4096)
memory = mmap.mmap(fd, 4096)
os.ftruncate(fd, 0)
def touch_guest_memory():
    memory[0] = 1
touch_guest_memory()
"""


def test_bus_error_says_where_it_was() -> None:
    ended = subprocess.run([sys.executable, "-c", SHORTENED], stderr=subprocess.PIPE, text=True)
    assert ended.returncode == -signal.SIGBUS
    assert "Bus error" in ended.stderr
    assert "touch_guest_memory" in ended.stderr


def test_closed_stderr_is_no_reason_not_to_start() -> None:
    program = (
        "import sys; sys.stderr = None; import bridge.app.bus_errors as f; f.report_bus_errors()"
    )
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
