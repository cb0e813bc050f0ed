"""debian:bookworm-slim: as it is here, pulled, or made with debootstrap."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from tests.docker.command import find, install, run
from tests.docker.progress import Progress

OFFICIAL = "debian:bookworm-slim"
MADE = "nbd-bridge-base:bookworm-slim"
RELEASE = "bookworm"

_PULL_LIMIT_S = 300.0
_CA_BUNDLE = Path("etc/ssl/certs/ca-certificates.crt")
_LEFT_OUT = ("usr/share/doc", "usr/share/man", "usr/share/info", "usr/share/locale",
             "usr/share/groff", "usr/share/lintian", "var/cache/apt", "var/lib/apt/lists",
             "var/log/apt", "var/log/bootstrap.log", "var/log/dpkg.log")  # fmt: skip
_SLIM = """\
path-exclude /usr/share/doc/*
path-include /usr/share/doc/*/copyright
path-exclude /usr/share/info/*
path-exclude /usr/share/locale/*
path-exclude /usr/share/man/*
path-exclude /usr/share/lintian/*
"""
_CLEAN = 'APT::Update::Post-Invoke {"rm -f /var/cache/apt/*.bin || true";};\n'


def base_image(docker: str, address: str, say: Callable[[str], None]) -> str:
    """The name of an image to build from. Raises Failed."""
    for name in (OFFICIAL, MADE):
        if _is_there(docker, address, name):
            return name
    say(f"base     pulling {OFFICIAL}")
    pull = [docker, "-H", address, "pull", OFFICIAL]
    pulled = run(*pull, limit_s=_PULL_LIMIT_S, check=False, watch=Progress(say, "base"))
    if pulled.returncode == 0:
        return OFFICIAL
    say("base     cannot be pulled, so it is made with debootstrap")
    _make(docker, address, say)
    return MADE


def _is_there(docker: str, address: str, name: str) -> bool:
    done = run(docker, "-H", address, "image", "inspect", name, limit_s=150, check=False)
    return done.returncode == 0


def _make(docker: str, address: str, say: Callable[[str], None]) -> None:
    if find("debootstrap") is None:
        install(["debootstrap"])
    with tempfile.TemporaryDirectory(prefix="nbd-bridge-base-") as temporary:
        root = Path(temporary, "root")
        mirror = [uri] if (uri := debian_mirror(RELEASE)) else []
        run("debootstrap", "--variant=minbase", "--include=ca-certificates", RELEASE, root,
            *mirror, limit_s=400, watch=Progress(say, "base"))  # fmt: skip
        _trim(root)
        archive = Path(temporary, "base.tar")
        run("tar", "-C", root, "--numeric-owner", "-cf", archive, "--exclude=./proc/*",
            "--exclude=./sys/*", "--exclude=./dev/*", ".", limit_s=400)  # fmt: skip
        run(docker, "-H", address, "import", "-c", 'CMD ["bash"]', archive, MADE, limit_s=400)


def _trim(root: Path) -> None:
    """Make it slim, as the official image is, with the certificates that this machine trusts."""
    for name in _LEFT_OUT:
        path = root / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    (root / "var/cache/apt/archives/partial").mkdir(parents=True)
    (root / "var/lib/apt/lists/partial").mkdir(parents=True)
    (root / "etc/dpkg/dpkg.cfg.d/slim").write_text(_SLIM)
    (root / "etc/apt/apt.conf.d/clean").write_text(_CLEAN)
    bundle = Path(os.environ.get("SSL_CERT_FILE") or "/" / _CA_BUNDLE)
    if bundle.is_file():
        shutil.copyfile(bundle, root / _CA_BUNDLE)


def debian_mirror(release: str) -> str | None:
    """The archive that this machine's apt has Debian's `release` from; None if it has it not."""
    shown = run("apt-get", "indextargets", "--format", "$(REPO_URI) $(RELEASE) $(COMPONENT)",
                "Created-By: Packages", limit_s=150, check=False).stdout  # fmt: skip
    for line in shown.splitlines():
        uri, _, rest = line.partition(" ")
        if rest == f"{release} main":
            return uri
    return None
