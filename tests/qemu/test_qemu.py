"""QEMU's command line."""

from pathlib import Path

import pytest

from bridge.demo.qemu import GuestConfig, VhostUserDisk, command_line, qemu_version
from bridge.errors import ConfigError


def chardev(version: tuple[int, int]) -> str:
    config = GuestConfig(disks=[VhostUserDisk(Path("/s"), reconnect_ms=1500)], qemu=["qemu"])
    arguments = command_line(config, version)
    return next(word for word in arguments if word.startswith("socket,"))


def test_reconnect_for_an_old_qemu_is_in_seconds() -> None:
    assert chardev((7, 2)).endswith(",reconnect=2")


def test_reconnect_for_a_new_qemu_is_in_milliseconds() -> None:
    assert chardev((9, 2)).endswith(",reconnect-ms=1500")


def test_wrapper_comes_before_everything_else() -> None:
    config = GuestConfig(qemu=["chroot", "/somewhere", "qemu-system-x86_64"])

    assert command_line(config, (10, 0))[:4] == [*config.qemu, "-machine"]


def test_memory_is_shared_for_the_back_end() -> None:
    arguments = command_line(GuestConfig(memory_mib=128), (7, 2))

    assert "memory-backend-memfd,id=ram,size=128M,share=on" in arguments


def test_version_of_a_program_that_is_no_qemu_raises() -> None:
    with pytest.raises(ConfigError, match="does not print a QEMU version"):
        qemu_version(["echo"])


def test_version_of_a_missing_program_raises() -> None:
    with pytest.raises(ConfigError, match="cannot run"):
        qemu_version(["/nonexistent/qemu"])
