"""Finding a kernel and the order of its modules, in trees made up for the purpose."""

import lzma
import os
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


def fake_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, depends: str) -> None:
    """apt tools that know one kernel package, made by the real dpkg-deb; no network."""
    package = tmp_path / "package"
    make_tree(package, {f"{name}.ko": "" for name in kernel_module.WANTED_MODULES})
    (package / "DEBIAN").mkdir()
    (package / "DEBIAN/control").write_text(
        f"Package: linux-image-{RELEASE}\nVersion: 1\nArchitecture: all\n"
        "Maintainer: nobody <nobody@example.org>\nDescription: a test\n"
    )
    subprocess.run(
        [need("dpkg-deb"), "--build", package, tmp_path / "kernel.deb"],
        check=True, capture_output=True,
    )  # fmt: skip
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "apt-cache").write_text(f"#!/bin/sh\necho '{depends}'\n")
    (tools / "apt-get").write_text(
        f"#!/bin/sh\n[ \"$1\" = download ] && cp '{tmp_path}/kernel.deb' ./linux.deb\n"
    )
    for tool in tools.iterdir():
        tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")


def test_find_kernel_without_one_unpacks_the_package_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_archive(tmp_path, monkeypatch, depends=f"  Depends: linux-image-{RELEASE}")
    cache = tmp_path / "cache"

    first = find_kernel(cache, root=tmp_path / "nothing")
    (tmp_path / "tools/apt-get").write_text("#!/bin/sh\nexit 100\n")
    second = find_kernel(cache, root=tmp_path / "nothing")

    assert first == second
    assert first.image.read_bytes() == b"kernel"
    assert first.image.is_relative_to(cache)


def test_find_kernel_without_a_package_names_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_archive(tmp_path, monkeypatch, depends="nothing")

    with pytest.raises(ConfigError, match="apt-get update"):
        find_kernel(tmp_path / "cache", root=tmp_path / "nothing")
