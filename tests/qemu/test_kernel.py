"""Finding a kernel and the order of its modules, in trees made up for the purpose."""

import lzma
import os
import platform
import subprocess
from pathlib import Path

import pytest

from bridge.demo import kernel as kernel_module
from bridge.demo.kernel import find_kernel, load_order
from bridge.errors import ConfigError
from tests.tools import need

RELEASE = "9.8.7-6-test"


def module_bytes(depends: str) -> bytes:
    return b"\x7fELF\0license=GPL\0depends=" + depends.encode() + b"\0name=x\0"


def make_tree(root: Path, modules: dict[str, str], builtin: str = "") -> Path:
    """A lib/modules/RELEASE with a vmlinuz; `modules`: file name -> what it depends on."""
    folder = root / "lib/modules" / RELEASE
    (folder / "kernel/drivers").mkdir(parents=True)
    (folder / "modules.builtin").write_text(builtin)
    for name, depends in modules.items():
        data = module_bytes(depends)
        packed = lzma.compress(data) if name.endswith(".xz") else data
        (folder / "kernel/drivers" / name).write_bytes(packed)
    (root / "boot").mkdir()
    (root / "boot" / f"vmlinuz-{RELEASE}").write_bytes(b"kernel")
    return folder


def names(paths: tuple[Path, ...]) -> list[str]:
    return [path.name for path in paths]


def test_load_order_puts_each_module_after_what_it_depends_on(tmp_path: Path) -> None:
    folder = make_tree(
        tmp_path,
        {
            "virtio_ring.ko": "",
            "virtio.ko": "virtio_ring",
            "virtio-pci.ko": "virtio,virtio_ring",
            "virtio_blk.ko": "virtio",
        },
    )

    order = load_order(folder, ("virtio_pci", "virtio_blk"), tmp_path / "unpacked")

    assert names(order) == ["virtio_ring.ko", "virtio.ko", "virtio-pci.ko", "virtio_blk.ko"]


def test_load_order_leaves_built_in_modules_out(tmp_path: Path) -> None:
    folder = make_tree(
        tmp_path, {"virtio_blk.ko": "virtio"}, builtin="kernel/drivers/virtio/virtio.ko\n"
    )

    assert names(load_order(folder, ("virtio_blk",), tmp_path)) == ["virtio_blk.ko"]


def test_load_order_unpacks_compressed_modules(tmp_path: Path) -> None:
    folder = make_tree(tmp_path, {"virtio_blk.ko.xz": "virtio", "virtio.ko.xz": ""})

    order = load_order(folder, ("virtio_blk",), tmp_path / "unpacked")

    assert names(order) == ["virtio.ko", "virtio_blk.ko"]
    assert order[0].read_bytes() == module_bytes("")


def test_load_order_without_a_module_raises(tmp_path: Path) -> None:
    folder = make_tree(tmp_path, {"virtio_blk.ko": "virtio"})

    with pytest.raises(ConfigError, match="no module virtio"):
        load_order(folder, ("virtio_blk",), tmp_path)


def test_load_order_of_a_dependency_loop_raises(tmp_path: Path) -> None:
    folder = make_tree(tmp_path, {"a.ko": "b", "b.ko": "a"})

    with pytest.raises(ConfigError):
        load_order(folder, ("a",), tmp_path)


def test_find_kernel_with_an_installed_one_takes_it(tmp_path: Path) -> None:
    make_tree(tmp_path, {f"{name}.ko": "" for name in kernel_module.WANTED_MODULES})

    kernel = find_kernel(tmp_path / "cache", root=tmp_path)

    assert kernel.release == RELEASE
    assert len(kernel.modules) == 3


def build_package(name: str, folder: Path, archive: Path) -> None:
    """Make the package `name` of `folder`, with the real dpkg-deb."""
    (folder / "DEBIAN").mkdir()
    (folder / "DEBIAN/control").write_text(
        f"Package: {name}\nVersion: 1\nArchitecture: all\n"
        "Maintainer: nobody <nobody@example.org>\nDescription: a test\n"
    )
    archive.mkdir(exist_ok=True)
    subprocess.run(
        [need("dpkg-deb"), "--build", folder, archive / f"{name}.deb"],
        check=True, capture_output=True,
    )  # fmt: skip


@pytest.fixture
def archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of packages, NAME.deb and NAME.depends, that apt's tools know; no network."""
    folder, tools = tmp_path / "archive", tmp_path / "tools"
    folder.mkdir()
    tools.mkdir()
    (tools / "apt-cache").write_text(
        f"#!/bin/sh\n[ $2 = -- ] && shift\n"
        f'for each in $(cat {folder}/$2.depends 2>/dev/null); do echo "  Depends: $each"; done\n'
    )
    (tools / "apt-get").write_text(
        f"#!/bin/sh\n[ $1 = download ] || exit 0\nshift 2\n"
        f"for each; do cp {folder}/$each.deb . || exit 100; done\n"
    )
    for tool in tools.iterdir():
        tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    return folder


def test_find_kernel_without_one_unpacks_the_package_once(tmp_path: Path, archive: Path) -> None:
    package, cache = tmp_path / "package", tmp_path / "cache"
    make_tree(package, {f"{name}.ko": "" for name in kernel_module.WANTED_MODULES})
    build_package(f"linux-image-{RELEASE}", package, archive)
    for meta in kernel_module._META_PACKAGES[platform.machine()]:
        (archive / f"{meta}.depends").write_text(f"linux-image-{RELEASE}")

    first = find_kernel(cache, root=tmp_path / "nothing")
    (tmp_path / "tools/apt-get").write_text("#!/bin/sh\nexit 100\n")
    second = find_kernel(cache, root=tmp_path / "nothing")

    assert first == second
    assert first.image.read_bytes() == b"kernel"
    assert first.image.is_relative_to(cache)


def test_find_kernel_with_its_modules_in_another_package_unpacks_both(
    tmp_path: Path, archive: Path
) -> None:
    """As on Ubuntu; some modules are compressed, others built in."""
    image, modules = tmp_path / "image", tmp_path / "modules"
    folder = make_tree(
        modules, {"virtio_blk.ko.xz": ""}, builtin="fs/ext4.ko\ndrivers/virtio_pci.ko"
    )
    image.mkdir()
    (modules / "boot").rename(image / "boot")
    folder.rename(folder.parent / "moved")
    (modules / "usr").mkdir()
    (modules / "lib").rename(modules / "usr/lib")
    (modules / "usr/lib/modules/moved").rename(modules / "usr/lib/modules" / RELEASE)
    build_package(f"linux-image-{RELEASE}", image, archive)
    build_package(f"linux-modules-{RELEASE}", modules, archive)
    (archive / "linux-image-virtual.depends").write_text(f"linux-image-{RELEASE} linux-headers-9")
    (archive / f"linux-image-{RELEASE}.depends").write_text(f"kmod linux-modules-{RELEASE}")

    kernel = find_kernel(tmp_path / "cache", root=tmp_path / "nothing")

    assert kernel.image.read_bytes() == b"kernel"
    assert names(kernel.modules) == ["virtio_blk.ko"]


def test_find_kernel_without_a_package_names_the_remedy(tmp_path: Path, archive: Path) -> None:
    with pytest.raises(ConfigError, match="apt-get update"):
        find_kernel(tmp_path / "cache", root=tmp_path / "nothing")
