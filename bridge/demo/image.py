"""Checks the disk image from the server's side, without mounting it and without root."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from pathlib import Path

from bridge.errors import ConfigError

_TOOL_LIMIT_S = 120.0


def allocated_bytes(image: Path) -> int:
    """The bytes that the sparse file takes on the server's disk."""
    return os.stat(image).st_blocks * 512


def check_filesystem(image: Path) -> str:
    """Run `e2fsck -fn`, which only reads; return its complaint, empty when the image is clean."""
    done = _run("e2fsck", "-fn", str(image))
    return "" if done.returncode == 0 else (done.stdout + done.stderr).strip()[-500:]


def extract_files(image: Path, folder: Path) -> None:
    """Copy all files of the image's ext4 file system into `folder`, with debugfs."""
    folder.mkdir(exist_ok=True)
    _run("debugfs", "-R", f"rdump / {folder}", str(image))


def check_sums(folder: Path, sums: str = "SUMS") -> tuple[int, list[str]]:
    """Compare files with the list `sums`: (number of right ones, names of wrong or missing ones).

    `md5sum` has written the list. With an empty or missing list no file is right.
    """
    right, wrong = 0, []
    listing = folder / sums
    for line in listing.read_text().splitlines() if listing.exists() else []:
        wanted, name = line.split(maxsplit=1)
        path = folder / Path(name.lstrip("*")).name
        if path.exists() and _md5(path) == wanted:
            right += 1
        else:
            wrong.append(name)
    return right, wrong


def _md5(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False))
    return digest.hexdigest()


def _run(tool: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    path = shutil.which(tool, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")
    if path is None:
        raise ConfigError(f"{tool} is missing: install the package e2fsprogs")
    return subprocess.run(
        [path, *arguments], capture_output=True, text=True, check=False, timeout=_TOOL_LIMIT_S
    )
