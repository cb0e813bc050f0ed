"""Build the images, start everything, break it, repair it, look at the disk: with real Docker."""

from __future__ import annotations

import argparse
import os
import random
import secrets
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bridge.demo.kernel import cache_dir
from tests.docker import bad_input, host_vm, scenario, watching
from tests.docker.base_image import base_image
from tests.docker.command import Failed, find
from tests.docker.compose import Compose
from tests.docker.compose_versions import compose_v1, compose_v2
from tests.docker.engine import docker_engine
from tests.docker.progress import Progress
from tests.docker.staging import PROJECT, stage
from tests.ports import free_port

_PARTS = ("life", "host", "bad-input", "v2")
_BUILD_LIMIT_S = 1500.0
_SETTINGS = {"NBD_VOLUME_SIZE": "256M", "BRIDGE_CACHE_SIZE": "128M"}


def main() -> int:
    """Exit status 0 when everything that was tried is right."""
    options = _options()
    began_s = time.monotonic()
    try:
        with docker_engine() as address, _staged() as folder:
            _run(options, address, folder)
    except Failed as failure:
        say(f"FAIL     {failure}")
        return 1
    say(f"PASS     in {time.monotonic() - began_s:.0f} s")
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="./run docker-test", description=__doc__)
    seed_help = "where in a round the kills come (default: random, printed)"
    parser.add_argument("--seed", type=int, default=random.randrange(10**6), help=seed_help)
    only_help = "only this part, may be given again"
    parser.add_argument("--only", choices=_PARTS, action="append", help=only_help)
    return parser.parse_args()


@contextmanager
def _staged() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="nbd-bridge-stage-") as temporary:
        yield stage(Path(temporary), wheels=cache_dir() / "wheels")


def _run(options: argparse.Namespace, address: str, folder: Path) -> None:
    docker = find("docker")
    assert docker is not None
    parts = options.only or _PARTS
    with _project(compose_v1(), docker, address, folder) as compose:
        _build(compose)
        version = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]["version"]
        scenario.check_images(compose, say, version)
        if "life" in parts:
            say(f"seed     {options.seed}")
            _live(compose, version, options.seed)
        if "host" in parts:
            host_vm.run_host_vm(compose, say)
        if "bad-input" in parts:
            bad_input.run_bad_input(compose, say)
    if "v2" in parts:
        _try_v2(docker, address, folder, version)


def _build(compose: Compose) -> None:
    began_s = time.monotonic()
    base = base_image(compose.docker, compose.address, say)
    compose.settings["NBD_BASE_IMAGE"] = base
    proxies = [f"--build-arg={name}" for name in os.environ if name.lower().endswith("_proxy")]
    shown = Progress(say, "build")
    compose.compose("build", *proxies, limit_s=_BUILD_LIMIT_S, watch=shown)
    say(f"built    from {base} in {time.monotonic() - began_s:.1f} s")


def _live(compose: Compose, version: str, seed: int) -> None:
    """From nothing through kills to `down`, and once more."""
    scenario.start(compose, say)
    scenario.check_confinement(compose)
    scenario.check_keys(compose)
    watching.check_status(compose, say)
    watching.check_metrics(compose, say)
    scenario.check_idle(compose, say)
    scenario.write_through_kills(compose, say, seed)
    compose.down()
    scenario.check_volume(compose, say, version)
    took_s = scenario.start(compose, say)
    for _ in range(scenario.TRIES - 1):  # a busy machine is not the service's fault
        if took_s > scenario.UP_LIMIT_S:
            compose.down()
            took_s = min(took_s, scenario.start(compose, say))
    if took_s > scenario.UP_LIMIT_S:
        raise Failed(f"every further `up` took {took_s:.1f} s or more")
    scenario.check_warm_cache(compose, say)
    watching.check_backup(compose, say)
    scenario.stop_with_dirty_cache(compose, say)
    compose.down(volumes=True)


def _try_v2(docker: str, address: str, folder: Path, version: str) -> None:
    """The same files with Compose v2: up, a guest, down, a look, up, a guest that finds it."""
    command = compose_v2(docker, cache_dir())
    if command is None:
        say("skipped  Compose v2: `docker compose` is not here and could not be fetched")
        return
    say("compose  v2")
    with _project(command, docker, address, folder) as compose:
        scenario.start(compose, say)
        scenario.run_guest(compose, say, GUEST_SECONDS="5")
        compose.down()
        scenario.check_volume(compose, say, version)
        scenario.start(compose, say)
        scenario.run_guest(compose, say, GUEST_SECONDS="1")
        compose.down(volumes=True)


@contextmanager
def _project(command: list[str], docker: str, address: str, folder: Path) -> Iterator[Compose]:
    """A project of its own, gone afterwards with its volumes."""
    listen = {name: f"127.0.0.1:{free_port()}" for name in ("NBD_LISTEN", "EXPORTER_LISTEN")}
    settings = {**_SETTINGS, **listen}
    name = f"nbdtest{secrets.token_hex(3)}"
    compose = Compose(
        command, docker, address, folder, name, settings, profiles=["guest", "metrics"]
    )
    try:
        yield compose
    finally:
        compose.compose("down", "-v", "--remove-orphans", "-t", "5", limit_s=300, check=False)


def say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
