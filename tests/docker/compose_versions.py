"""The two versions of Compose: Debian's docker-compose 1.29, and Compose v2.

Bookworm has no Compose v2, so it is taken from the next Debian release: downloaded with this
machine's apt and its keys, unpacked into a cache, not installed.
"""

from __future__ import annotations

import os
import platform
import shutil
import tempfile
from pathlib import Path

from tests.docker.base_image import debian_mirror
from tests.docker.command import Failed, find, install, run

_V2_RELEASE = "trixie"
_V2_PACKAGES = ("docker-compose", "docker-buildx")
_PLUGINS = "usr/libexec/docker/cli-plugins"


def compose_v1() -> list[str]:
    """How docker-compose 1.29 is called; installs it where there is none. Raises Failed."""
    program = find("docker-compose")
    if program is None or _major(program, "version", "--short") != "1":
        install(["docker-compose"])
        program = find("docker-compose")
    if program is None:
        raise Failed("docker-compose was installed and is not there")
    return [program]


def compose_v2(docker: str, cache: Path) -> list[str] | None:
    """How Compose v2 is called; None when it is neither here nor to be had."""
    if _major(docker, "compose", "version", "--short") == "2":
        return [docker, "compose"]
    folder = cache / "compose-v2" / platform.machine()
    plugin = folder / "cli-plugins" / "docker-compose"
    if not plugin.exists():
        try:
            _fetch(folder)
        except (Failed, OSError):
            return None
    return [docker, "--config", str(folder), "compose"] if plugin.exists() else None


def _major(*command: str) -> str:
    done = run(*command, limit_s=150, check=False)
    return done.stdout.strip().lstrip("v").partition(".")[0] if done.returncode == 0 else ""


def _fetch(folder: Path) -> None:
    """Unpack Debian's Compose v2 into `folder`. Raises Failed."""
    mirror = debian_mirror("bookworm") or debian_mirror(_V2_RELEASE)
    keys = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
    if mirror is None or not keys.exists():
        raise Failed("this machine's apt knows no Debian archive")
    with tempfile.TemporaryDirectory(prefix="nbd-bridge-apt-") as temporary:
        apt = Path(temporary)
        for name in ("lists/partial", "cache/archives/partial", "debs", "root"):
            (apt / name).mkdir(parents=True)
        apt.chmod(0o755)
        (apt / "sources.list").write_text(f"deb [signed-by={keys}] {mirror} {_V2_RELEASE} main\n")
        private = [
            f"-oDir::Etc::SourceList={apt}/sources.list", "-oDir::Etc::SourceParts=-",
            f"-oDir::State::Lists={apt}/lists", f"-oDir::Cache={apt}/cache",
            "-oAPT::Sandbox::User=root", "-oAcquire::Languages=none",
        ]  # fmt: skip
        run("apt-get", "update", "-q", *private, limit_s=120)
        names = [f"{name}/{_V2_RELEASE}" for name in _V2_PACKAGES]
        run("apt-get", "download", "-q", *private, *names, limit_s=120, folder=apt / "debs")
        for package in (apt / "debs").glob("*.deb"):
            run("dpkg-deb", "-x", package, apt / "root", limit_s=60)
        target = folder / "cli-plugins"
        target.mkdir(parents=True, exist_ok=True)
        for plugin in (apt / "root" / _PLUGINS).iterdir():
            temporary_plugin = target / f".{plugin.name}.{os.getpid()}"
            shutil.copyfile(plugin, temporary_plugin)
            temporary_plugin.chmod(0o755)
            temporary_plugin.rename(target / plugin.name)
