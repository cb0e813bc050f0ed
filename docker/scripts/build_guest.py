"""Builds the guest's kernel and initrd into a folder, while the image is built."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from bridge.demo.initramfs import build_initramfs
from bridge.demo.kernel import find_kernel


def main(folder: Path) -> None:
    folder.mkdir(parents=True)
    kernel = find_kernel()
    scripts = sorted(Path(__file__).parent.glob("*.sh"))
    (folder / "initrd").write_bytes(build_initramfs(kernel, scripts))
    shutil.copyfile(kernel.image, folder / "kernel")
    (folder / "release").write_text(kernel.release)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
