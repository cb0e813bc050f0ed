"""The disk image as the server sees it: nothing here mounts it or needs root."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from pathlib import Path

from bridge.errors import ConfigError

_TOOL_LIMIT_S = 120.0


def allocated_bytes(image: Path) -> int:
    """What the sparse file really takes on the server's disk."""
    return os.stat(image).st_blocks * 512


def check_filesystem(image: Path) -> str:
    """The complaint of `e2fsck -fn`, which changes nothing; empty when the image is clean."""
    done = _run("e2fsck", "-fn", str(image))
    return "" if done.returncode == 0 else (done.stdout + done.stderr).strip()[-500:]


def extract_files(image: Path, folder: Path) -> None:
    """Copy everything in the image's ext4 file system into `folder`, through debugfs."""
    folder.mkdir(exist_ok=True)
    _run("debugfs", "-R", f"rdump / {folder}", str(image))


def check_sums(folder: Path, sums: str = "SUMS") -> tuple[int, list[str]]:
    """(files that are right, names of those that are wrong or missing) by the list `sums`.

    The list is what `md5sum` writes. An empty or missing list has no right files.
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
