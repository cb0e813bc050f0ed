"""What the guest tests share: the kernel and the initrd, fetched and built once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from bridge.demo.initramfs import build_initramfs
from bridge.demo.kernel import Kernel, find_kernel
from bridge.errors import ConfigError
from tests.tools import missing, need

TEST_SCRIPTS = Path(__file__).parent / "scripts"


@dataclass(frozen=True)
class GuestMachine:
    kernel: Kernel
    initrd: Path


@pytest.fixture(scope="session")
def machine(tmp_path_factory: pytest.TempPathFactory) -> GuestMachine:
    need("qemu-system-x86_64")
    try:
        kernel = find_kernel()
        initrd = build_initramfs(kernel, sorted(TEST_SCRIPTS.glob("*.sh")))
    except ConfigError as error:
        missing(str(error))
    path = tmp_path_factory.mktemp("guest") / "initrd"
    path.write_bytes(initrd)
    return GuestMachine(kernel, path)


@pytest.fixture
def folder(directory: Path) -> Path:
    return directory
