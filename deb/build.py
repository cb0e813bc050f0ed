"""Builds the Debian package: `./run deb [DIRECTORY]`.

The package has a Python environment of its own in /usr/lib/nbd-bridge, for the distribution's
python3: Debian's trio and structlog are older than what the bridge needs. Its libraries are those
of the environment that runs this, which are the tested ones; no index is asked. The package is for
the machine's architecture, because of the compiled engine.
"""

from __future__ import annotations

import gzip
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from importlib.metadata import Distribution, distribution
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
HERE = ROOT / "deb"
LIBRARY = "usr/lib/nbd-bridge"
REVISION = 1

_BUILD_WHEEL = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
_LEFT_OUT = shutil.ignore_patterns("__pycache__", "*.so", "*.pyc", "*.egg-info")


def main(arguments: list[str]) -> int:
    """Build into the directory that is given, or `dist`; print the package's path."""
    target = Path(arguments[0] if arguments else ROOT / "dist").resolve()
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="nbd-bridge-deb-") as folder:
        tree = Path(folder) / "tree"
        version = _library(tree / LIBRARY, Path(folder))
        _programs(tree)
        _documents(tree)
        _control(tree, version)
        package = target / f"nbd-bridge_{version}-{REVISION}_{_architecture()}.deb"
        command = ["dpkg-deb", "--root-owner-group", "-Zxz", "--build", str(tree), str(package)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    print(package)
    return 0


def _library(target: Path, folder: Path) -> str:
    """The bridge, the plugin and the libraries; the version."""
    target.mkdir(parents=True)
    source = folder / "source"
    source.mkdir()
    for name in ("bridge", "nbd_plugin"):
        shutil.copytree(ROOT / name, source / name, ignore=_LEFT_OUT)
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, source / name)
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _BUILD_WHEEL, str(folder)],
        cwd=source,
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    if not list(target.glob("bridge/datapath/_native*.so")):
        print("without a C compiler the package has the pure engine alone", file=sys.stderr)
    for each in _needed("nbd-bridge"):
        _copy(each, target)
    return wheel.name.split("-")[1]


def _needed(name: str) -> Iterator[Distribution]:
    """The distributions that `name` needs, itself left out."""
    seen = {name}
    waiting = [name]
    while waiting:
        for requirement in distribution(waiting.pop()).requires or []:
            if ";" in requirement and not _applies(requirement.partition(";")[2]):
                continue
            found = re.match(r"[A-Za-z0-9._-]+", requirement)
            assert found is not None
            wanted = found[0].lower()
            if wanted not in seen:
                seen.add(wanted)
                waiting.append(wanted)
                yield distribution(wanted)


def _applies(marker: str) -> bool:
    """Not one of an extra, another system, another Python or an old one."""
    return not re.search(
        r"extra|win32|Windows|nt'|PyPy|pypy|python_version *<|full_version *<", marker
    )


def _copy(what: Distribution, target: Path) -> None:
    for each in what.files or []:
        if ".." in each.parts or "__pycache__" in each.parts or each.parts[0] == "bin":
            continue
        source = Path(str(what.locate_file(each)))
        if source.suffix == ".so":
            raise SystemExit(f"{each} is compiled for one Python: the package needs pure libraries")
        if source.name in ("RECORD", "INSTALLER", "REQUESTED", "direct_url.json"):
            continue
        place = target / each
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, place)


_PROGRAM = """\
#!/usr/bin/python3 -I
import sys

sys.path.insert(0, "/usr/lib/nbd-bridge")
from bridge.cli.main import main

main()
"""


def _programs(tree: Path) -> None:
    """The command, the units, completions."""
    program = tree / "usr/bin/nbd-bridge"
    program.parent.mkdir(parents=True)
    program.write_text(_PROGRAM)
    program.chmod(0o755)
    plugin = f"/{LIBRARY}/nbd_plugin/plugin.py"
    _bridge(
        tree,
        "install-units",
        "--root",
        str(tree),
        "--vendor",
        "--program",
        "/usr/bin/nbd-bridge",
        "--plugin",
        plugin,
    )
    (tree / "etc/nbd-bridge").mkdir(parents=True)
    for shell, place in (
        ("bash", "usr/share/bash-completion/completions/nbd-bridge"),
        ("zsh", "usr/share/zsh/vendor-completions/_nbd-bridge"),
        ("fish", "usr/share/fish/vendor_completions.d/nbd-bridge.fish"),
    ):
        path = tree / place
        path.parent.mkdir(parents=True)
        path.write_text(_bridge(tree, "completion", shell))


_LINKED = (
    *("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md"),
    *("docker/README.md", "nbd_plugin/README.md"),
)


def _documents(tree: Path) -> None:
    _bridge(tree, "man-pages", str(tree / "usr/share/man/man1"))
    for page in (tree / "usr/share/man/man1").iterdir():
        _compress(page)
    documents = tree / "usr/share/doc/nbd-bridge"
    documents.mkdir(parents=True, exist_ok=True)
    shutil.copy(HERE / "copyright", documents / "copyright")
    shutil.copy(ROOT / "CHANGELOG.md", documents / "changelog")
    _compress(documents / "changelog")
    # As in a checkout, so that the links between them hold; with dashboard and alerts.
    for name in _LINKED:
        (documents / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, documents / name)
    shutil.copytree(ROOT / "docs", documents / "docs")
    for path in documents.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)


def _compress(path: Path) -> None:
    data = gzip.compress(path.read_bytes(), 9, mtime=0)
    path.unlink()
    path.with_name(f"{path.name}.gz").write_bytes(data)


def _control(tree: Path, version: str) -> None:
    control = tree / "DEBIAN"
    control.mkdir()
    size_kib = sum(each.stat().st_size for each in tree.rglob("*") if each.is_file()) // 1024
    words = {
        "VERSION": f"{version}-{REVISION}",
        "ARCHITECTURE": _architecture(),
        "SIZE": str(size_kib),
    }
    text = (HERE / "control").read_text()
    for word, value in words.items():
        text = text.replace(f"@{word}@", value)
    (control / "control").write_text(text)
    for name in ("postinst", "prerm", "postrm"):
        shutil.copy(HERE / name, control / name)
        (control / name).chmod(0o755)


def _bridge(tree: Path, *arguments: str) -> str:
    """What the packaged command prints."""
    done = subprocess.run(
        [sys.executable, "-B", "-I", "-c",
         f"import sys; sys.path.insert(0, {str(tree / LIBRARY)!r})\n"
         "from bridge.cli.main import main; main()", *arguments],
        env={key: value for key, value in os.environ.items() if not key.startswith("NBD_BRIDGE")},
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    return done.stdout


def _architecture() -> str:
    command = ["dpkg", "--print-architecture"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
