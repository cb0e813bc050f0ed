"""Finds a Linux kernel and the modules that a guest with a virtio disk needs.

It looks in this order: the cache, the kernels installed on this machine, the distribution's package
archive. A package is downloaded and unpacked into the cache, not installed, so that the boot loader
and the initramfs of this machine stay as they are. Distributions differ in which modules there are,
which are built in, and in which order they load: `modules.builtin` and each module's `.modinfo` say
so.
"""

from __future__ import annotations

import contextlib
import gzip
import lzma
import os
import platform
import re
import shutil
import subprocess
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

from bridge.errors import ConfigError

WANTED_MODULES = ("virtio_pci", "virtio_blk", "ext4")
"""The modules that the guest loads, with their dependencies."""

_META_PACKAGES = {
    "x86_64": ("linux-image-cloud-amd64", "linux-image-virtual", "linux-image-amd64"),
    "aarch64": ("linux-image-cloud-arm64", "linux-image-virtual", "linux-image-arm64"),
}
"""Packages that name the newest kernel package, smallest first (Debian, Ubuntu, Debian)."""

_KERNEL_PACKAGE = re.compile(r"^\s*\|?Depends: (linux-(?:image|modules)-\d\S*)$", re.MULTILINE)
_KEPT = re.compile(
    r"^(?:\./)?(?:usr/)?(?:boot/(?P<kernel>vmlinuz-\S+)"
    r"|lib/modules/(?P<release>[^/]+)/(?P<module>modules\.builtin|kernel/.*\.ko(?:\.\w+)?))$"
)
_KEPT_MODULES = re.compile(
    r"/(virtio[^/]*|ext4|jbd2|mbcache|crc16|crc32c[^/]*|libcrc32c)\.ko(\.\w+)?$"
)
_MODULE_MAX_BYTES = 16 << 20
_DOWNLOAD_LIMIT_S = 300.0


@dataclass(frozen=True)
class Kernel:
    """A kernel image, and the uncompressed modules to load, in load order."""

    release: str
    image: Path
    modules: tuple[Path, ...]


def cache_dir() -> Path:
    """The folder that keeps downloaded kernels and the accelerator's probe result.

    Raises ConfigError for a user who has no home directory.
    """
    try:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError:
        raise ConfigError(
            f"user {os.geteuid()} has no home directory to keep the guest's kernel in: name a "
            "directory with the environment variable XDG_CACHE_HOME"
        ) from None
    return Path(base) / "nbd-bridge"


def find_kernel(cache: Path | None = None, *, root: Path = Path("/")) -> Kernel:
    """A kernel for this machine's architecture. Blocks while it downloads one, once.

    `root`: the root folder of the installed kernels. Raises ConfigError, with the remedy, when no
    kernel can be found or fetched.
    """
    cache = cache or cache_dir()
    machine = platform.machine()
    if machine not in _META_PACKAGES:
        raise ConfigError(f"no guest kernel is known for {machine}, only for x86_64 and aarch64")
    kernel = _cached_kernel(cache / "kernel" / machine)
    kernel = kernel or _installed_kernel(root, cache / "modules")
    return kernel or _fetch_kernel(cache / "kernel" / machine, _META_PACKAGES[machine])


def _cached_kernel(folder: Path) -> Kernel | None:
    for tree in sorted(folder.glob("*/"), key=_version_key, reverse=True):
        kernel = _kernel_of_tree(tree, tree / "unpacked")
        if kernel is not None:
            return kernel
    return None


def _installed_kernel(root: Path, unpacked: Path) -> Kernel | None:
    return _kernel_of_tree(root, unpacked)


def _kernel_of_tree(root: Path, unpacked: Path) -> Kernel | None:
    """The newest readable kernel below `root` that has all modules."""
    images = sorted((root / "boot").glob("vmlinuz-*"), key=_version_key, reverse=True)
    for image in images:
        release = image.name.removeprefix("vmlinuz-")
        folder = next(
            (root / lib / release for lib in ("lib/modules", "usr/lib/modules")
             if (root / lib / release / "modules.builtin").exists()),
            None,
        )  # fmt: skip
        if folder is None or not os.access(image, os.R_OK):
            continue
        try:
            modules = load_order(folder, WANTED_MODULES, unpacked / release)
        except (ConfigError, OSError):
            continue
        return Kernel(release, image, modules)
    return None


def _version_key(path: Path) -> list[tuple[int, str]]:
    """Sorts 6.1.0-56 after 6.1.0-9."""
    return [(int(part), "") if part.isdigit() else (-1, part)
            for part in re.split(r"(\d+)", path.name)]  # fmt: skip


def load_order(folder: Path, wanted: tuple[str, ...], unpacked: Path) -> tuple[Path, ...]:
    """The files of `wanted` modules and their dependencies, each after those that it depends on.

    `folder` is a `lib/modules/RELEASE`; compressed modules are unpacked into `unpacked`.
    Raises ConfigError for a module that is neither a file nor built in.
    """
    text = (folder / "modules.builtin").read_text()
    builtin = {_module_name(Path(line)) for line in text.split()}
    files = {_module_name(path): path for path in (folder / "kernel").rglob("*.ko*")}
    order: dict[str, Path] = {}

    def visit(name: str, chain: tuple[str, ...]) -> None:
        if name in order or name in builtin:
            return
        if name not in files or name in chain:
            raise ConfigError(f"kernel {folder.name} has no module {name} ({folder})")
        path = _uncompressed(files[name], unpacked)
        for dependency in _dependencies(path):
            visit(dependency, (*chain, name))
        order[name] = path

    for name in wanted:
        visit(name, ())
    return tuple(order.values())


def _module_name(path: Path) -> str:
    return path.name.split(".", 1)[0].replace("-", "_")


def _dependencies(module: Path) -> list[str]:
    """The names after `depends=` in the module's `.modinfo`, a NUL-terminated string."""
    match = re.search(rb"\0depends=([\w,-]*)\0", b"\0" + module.read_bytes())
    names = match.group(1).decode() if match else ""
    return [name.replace("-", "_") for name in names.split(",") if name]


def _uncompressed(path: Path, unpacked: Path) -> Path:
    """`path`, or an unpacked copy of it below `unpacked`."""
    if path.suffix == ".ko":
        return path
    target = unpacked / path.with_suffix("").name
    if not target.exists():
        data = _decompress(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_suffix(f".{os.getpid()}")
        temporary.write_bytes(data)
        temporary.rename(target)
    return target


def _decompress(path: Path) -> bytes:
    """The uncompressed module, cut at `_MODULE_MAX_BYTES`."""
    if path.suffix == ".xz":
        return lzma.LZMADecompressor().decompress(path.read_bytes(), _MODULE_MAX_BYTES)
    if path.suffix == ".gz":
        with gzip.open(path) as file:
            return file.read(_MODULE_MAX_BYTES)
    if path.suffix == ".zst":
        zstd = shutil.which("zstd")
        if zstd is None:
            raise ConfigError(f"{path} is compressed: install the package zstd")
        done = subprocess.run([zstd, "-dcq", path], capture_output=True, check=False)
        if done.returncode == 0:
            return done.stdout
    raise ConfigError(f"{path}: cannot be unpacked")


def _fetch_kernel(folder: Path, meta_packages: tuple[str, ...]) -> Kernel:
    remedy = (
        "install a kernel package (Debian: linux-image-cloud-amd64 or -arm64, Ubuntu: "
        "linux-image-virtual), or run `apt-get update` as root and try again"
    )
    for tool in ("apt-cache", "apt-get", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise ConfigError(f"no kernel for the guest: {tool} is missing here; {remedy}")
    reason = _try_fetch(folder, meta_packages)
    if reason and os.geteuid() == 0:
        # A fresh container has no package lists, an old machine outdated ones.
        with contextlib.suppress(subprocess.TimeoutExpired):
            subprocess.run(
                ["apt-get", "update", "-q"],
                capture_output=True, check=False, timeout=_DOWNLOAD_LIMIT_S,
            )  # fmt: skip
        reason = _try_fetch(folder, meta_packages)
    kernel = _cached_kernel(folder)
    if kernel is None:
        raise ConfigError(f"no kernel for the guest: {reason or 'package not usable'}; {remedy}")
    return kernel


def _try_fetch(folder: Path, meta_packages: tuple[str, ...]) -> str:
    """Unpack the newest kernel into `folder`; return why that failed, empty if it did not."""
    reason = "no package list names a kernel"
    for meta in meta_packages:
        packages = _kernel_packages(meta)
        if packages:
            reason = _download(folder, packages)
            if not reason:
                return ""
    return reason


def _kernel_packages(meta: str) -> list[str]:
    """The versioned packages of a metapackage: the image and, on Ubuntu, its modules."""
    found: list[str] = []
    pending = [meta]
    while pending and len(found) < 4:
        shown = subprocess.run(
            ["apt-cache", "depends", "--", pending.pop()],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        new = [name for name in _KERNEL_PACKAGE.findall(shown.stdout) if name not in found]
        found += new
        pending += new
    return found


def _download(folder: Path, packages: list[str]) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        try:
            done = subprocess.run(
                ["apt-get", "download", "-q", *packages], cwd=temporary,
                capture_output=True, text=True, check=False, timeout=_DOWNLOAD_LIMIT_S,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return f"apt-get download {packages[0]} took more than {_DOWNLOAD_LIMIT_S:.0f} s"
        if done.returncode:
            return f"apt-get download {packages[0]}: {done.stderr.strip()[-300:]}"
        tree = Path(temporary) / "tree"
        try:
            for package in Path(temporary).glob("*.deb"):
                _unpack(package, tree)
            target = folder / packages[0]
            if _kernel_of_tree(tree, tree / "unpacked") is None:
                return f"package {packages[0]} lacks the kernel or its virtio modules"
            if not target.exists():
                tree.rename(target)
        except (OSError, tarfile.TarError) as error:
            return f"cannot unpack {packages[0]}: {error}"
    return ""


def _unpack(package: Path, tree: Path) -> None:
    """Write the kernel and the modules that the guest may need from a .deb into `tree`."""
    with subprocess.Popen(
        ["dpkg-deb", "--fsys-tarfile", package], stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        with tarfile.open(fileobj=process.stdout, mode="r|") as archive:
            for member in archive:
                match = _KEPT.match(member.name)
                if match is None or not member.isfile():
                    continue
                if match["kernel"]:
                    target = tree / "boot" / match["kernel"]
                elif match["module"] == "modules.builtin" or _KEPT_MODULES.search(member.name):
                    target = tree / "lib/modules" / match["release"] / match["module"]
                else:
                    continue
                source = archive.extractfile(member)
                if source is not None and ".." not in target.parts:
                    target.parent.mkdir(parents=True, exist_ok=True)
                    with target.open("wb") as file:
                        shutil.copyfileobj(source, file)
    if process.returncode:
        raise OSError(f"dpkg-deb --fsys-tarfile {package.name} failed")
