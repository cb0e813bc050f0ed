"""The life of the service: up, a guest that writes through kills, down, a look at the image, up."""

from __future__ import annotations

import json
import os
import random
import re
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from bridge.demo.image import check_filesystem, check_sums, extract_files
from tests.docker.command import Failed
from tests.docker.compose import Compose

KILLS = 3
"""How often each of storage and bridge is killed while the guest writes."""
IMAGE_LIMIT_BYTES = 250 * 1000 * 1000
UP_LIMIT_S = 15.0
IDLE_LIMIT_PERCENT = 1.0
TRIES = 3
"""What is measured on a machine that others use as well may be measured again."""

_FILE_MIB = 4
_HEALTHY_LIMIT_S = 180.0
_ROUND_LIMIT_S = 240.0
_GUEST_LIMIT_S = 700.0
_ROUND = re.compile(r"^REPORT round=(\d+)$", re.MULTILINE)
_COMPILERS = ("gcc", "cc", "c++", "g++", "ld", "make", "pip", "pip3")

Say = Callable[[str], None]


def check_images(compose: Compose, say: Say, version: str) -> None:
    """The images are small, labelled, not root's, and have no compilers. Raises Failed."""
    for name in ("storage", "bridge", "guest"):
        image = f"nbd-bridge/{name}:{version}"
        about = json.loads(compose.engine("image", "inspect", image))[0]
        labels = about["Config"]["Labels"] or {}
        mega_bytes = about["Size"] / 1e6
        say(f"image    {name}: {mega_bytes:.0f} MB, user {about['Config']['User']}")
        if about["Size"] > IMAGE_LIMIT_BYTES:
            raise Failed(f"image {image} has {mega_bytes:.0f} MB")
        if labels.get("org.opencontainers.image.licenses") != "Apache-2.0":
            raise Failed(f"image {image} has no licence label: {labels}")
        if labels.get("org.opencontainers.image.version") != version:
            raise Failed(f"image {image} has the wrong version label, not {version}: {labels}")
        if about["Config"]["User"] in ("", "0", "root"):
            raise Failed(f"image {image} runs as root")
        look = "; ".join(f"command -v {program}" for program in _COMPILERS)
        found = compose.engine("run", "--rm", "--network", "none", "--entrypoint", "sh", image,
                               "-c", look, check=False)  # fmt: skip
        if found.strip():
            raise Failed(f"image {image} has {found.split()}")


def start(compose: Compose, say: Say) -> float:
    """`up` from nothing until both sides are healthy; the seconds it took. Raises Failed."""
    began_s = time.monotonic()
    compose.up("storage", "bridge")
    compose.wait_health("storage", "healthy", _HEALTHY_LIMIT_S)
    compose.wait_health("bridge", "healthy", _HEALTHY_LIMIT_S)
    took_s = time.monotonic() - began_s
    say(f"up       storage and bridge healthy after {took_s:.1f} s")
    return took_s


def check_confinement(compose: Compose) -> None:
    """The containers are what compose.yaml says of them. Raises Failed."""
    for service in ("storage", "bridge"):
        host = compose.inspect(service)["HostConfig"]
        wrong = [
            what
            for what, is_right in {
                "the root file system is writable": host["ReadonlyRootfs"],
                "capabilities": host["CapDrop"] == ["ALL"] and not host["CapAdd"],
                "privileges": "no-new-privileges:true" in host["SecurityOpt"],
                "memory": host["Memory"] > 0,
                "processors": host["NanoCpus"] > 0,
                "processes": (host["PidsLimit"] or 0) > 0,
                "init": host["Init"],
                "restart": host["RestartPolicy"]["Name"] == "unless-stopped",
            }.items()
            if not is_right
        ]
        if wrong:
            raise Failed(f"{service} is not confined: {', '.join(wrong)}")


def check_keys(compose: Compose) -> None:
    """Private keys are readable for those who need them only. Raises Failed."""
    listing = compose.engine(
        "exec", compose.container("storage"), "sh", "-c",
        "stat -c '%a %u:%g %n' /certificates/server/*-key.pem /certificates/client/*-key.pem",
    )  # fmt: skip
    wanted = {
        "/certificates/server/ca-key.pem": "600 10809:10809",
        "/certificates/server/server-key.pem": "600 10809:10809",
        "/certificates/client/client-key.pem": "640 10809:10810",
    }
    found = {line.rsplit(" ", 1)[1]: line.rsplit(" ", 1)[0] for line in listing.splitlines()}
    if found != wanted:
        raise Failed(f"private keys are {found}, should be {wanted}")


def check_idle(compose: Compose, say: Say) -> None:
    """Both containers use next to no CPU while no client sends a request. Raises Failed."""
    for service in ("storage", "bridge"):
        for _ in range(TRIES):
            percent = _cpu_percent(compose, service)
            say(f"idle     {service}: {percent:.2f} % CPU")
            if percent <= IDLE_LIMIT_PERCENT:
                break
        else:
            raise Failed(f"{service} is idle and uses {percent:.1f} % CPU")


def _cpu_percent(compose: Compose, service: str) -> float:
    began_s, used_s = time.monotonic(), _cpu_s(compose, service)
    time.sleep(5)
    spent_s = _cpu_s(compose, service) - used_s
    return 100 * spent_s / (time.monotonic() - began_s)


def _cpu_s(compose: Compose, service: str) -> float:
    """The CPU time of the service's programs so far; health checks are gone and not counted."""
    shown = compose.engine(
        "exec", compose.container(service), "sh", "-c", "cat /proc/[0-9]*/stat 2>/dev/null"
    )
    ticks = 0
    for line in shown.splitlines():
        name, _, rest = line.partition("(")[2].rpartition(")")
        if name not in ("sh", "cat"):
            ticks += sum(int(word) for word in rest.split()[11:13])
    return ticks / os.sysconf("SC_CLK_TCK")


def write_through_kills(compose: Compose, say: Say, seed: int) -> None:
    """A guest writes; storage and bridge are killed meanwhile; it ends well. Raises Failed."""
    chance = random.Random(seed)
    compose.up("guest", GUEST_SECONDS="500", GUEST_MIB=str(_FILE_MIB))
    victims = ["storage", "bridge"] * KILLS
    chance.shuffle(victims)
    began_s = time.monotonic()
    for victim in victims:
        _wait_rounds(compose, 2)
        time.sleep(chance.random() * 1.5)  # anywhere in a round
        _kill(compose, say, victim)
    compose.engine("kill", "--signal", "USR1", compose.container("guest"))
    _finish_guest(compose, say, began_s)


def stop_with_dirty_cache(compose: Compose, say: Say) -> None:
    """Storage gone, guest dead, bridge stopped: what the guest synced is still there.

    What the cache could not bring to the storage waits in its file. Raises Failed.
    """
    compose.up("guest", GUEST_SECONDS="500", GUEST_MIB=str(_FILE_MIB))
    _wait_rounds(compose, 3)
    compose.compose("stop", "-t", "1", "storage")
    time.sleep(2)  # the guest writes on, into the cache
    synced = _rounds(compose)
    compose.engine("kill", compose.container("guest"))
    began_s = time.monotonic()
    compose.down()
    took_s = time.monotonic() - began_s
    compose.up("storage", "bridge")
    said = run_guest(compose, say, GUEST_SECONDS="1")
    newest = re.search(r"^REPORT newest=file\d+-[0-9a-f]+\.(\d+)$", said, re.MULTILINE)
    if newest is None or int(newest[1]) < synced:
        raise Failed(f"the guest had synced round {synced}, found is {newest and newest[0]}")
    say(f"stopped  without a storage in {took_s:.1f} s; nothing that was synced is lost")


def _kill(compose: Compose, say: Say, victim: str) -> None:
    before = compose.inspect(victim)["State"]["StartedAt"]
    compose.kill(victim)
    killed_s = time.monotonic()
    while compose.inspect(victim)["State"]["StartedAt"] == before:
        if time.monotonic() - killed_s > _HEALTHY_LIMIT_S:
            raise Failed(f"{victim} was killed and not started again")
        time.sleep(0.1)
    back_s = time.monotonic() - killed_s
    _wait_rounds(compose, 1)
    writing_s = time.monotonic() - killed_s
    say(f"killed   {victim}: back after {back_s:.1f} s, the guest goes on after {writing_s:.1f} s")


def _wait_rounds(compose: Compose, more: int) -> None:
    """Wait until the guest has finished `more` further rounds. Raises Failed when it does not."""
    first = _rounds(compose)
    deadline = time.monotonic() + _ROUND_LIMIT_S
    while _rounds(compose) < first + more:
        if not compose.inspect("guest")["State"]["Running"]:
            raise Failed(f"the guest ended early:\n{compose.logs('guest')[-1500:]}")
        if time.monotonic() > deadline:
            raise Failed(
                f"the guest has stood still for {_ROUND_LIMIT_S:.0f} s:\n"
                f"{compose.logs('guest')[-800:]}\n{compose.logs('bridge')[-1500:]}"
            )
        time.sleep(0.25)


def _rounds(compose: Compose) -> int:
    found = _ROUND.findall(compose.logs("guest"))
    return int(found[-1]) if found else 0


def run_guest(compose: Compose, say: Say, **settings: str) -> str:
    """A guest from power-on to power-off; what it said. Raises Failed unless it says PASS."""
    began_s = time.monotonic()
    compose.up("guest", **settings)
    return _finish_guest(compose, say, began_s)


def check_warm_cache(compose: Compose, say: Say) -> None:
    """A guest reads every file again, and little of it comes from the storage. Raises Failed."""
    before = _received_bytes(compose, "bridge")
    said = run_guest(compose, say, GUEST_SCRIPT="verify")
    files = re.search(r"^REPORT files=(\d+)$", said, re.MULTILINE)
    read_mib = int(files[1]) * _FILE_MIB if files else 0
    fetched_mib = (_received_bytes(compose, "bridge") - before) / (1 << 20)
    say(f"warm     {read_mib} MiB of files verified, {fetched_mib:.1f} MiB came from the storage")
    if not read_mib or fetched_mib > read_mib / 4:
        raise Failed(f"the cache is not warm:\n{compose.logs('bridge')[-1500:]}")


def _received_bytes(compose: Compose, service: str) -> int:
    """What came over the service's network so far."""
    table = compose.engine("exec", compose.container(service), "cat", "/proc/net/dev")
    rows = (line.partition(":") for line in table.splitlines())
    return sum(int(row[2].split()[0]) for row in rows if row[1] and row[0].strip() != "lo")


def _finish_guest(compose: Compose, say: Say, began_s: float) -> str:
    deadline = time.monotonic() + _GUEST_LIMIT_S
    while (state := compose.inspect("guest")["State"])["Running"]:
        if time.monotonic() > deadline:
            raise Failed(f"the guest does not end:\n{compose.logs('guest')[-1500:]}")
        time.sleep(0.3)
    said = compose.logs("guest")
    if state["ExitCode"] or "PASS" not in said.split("\n"):
        raise Failed(f"the guest failed (exit status {state['ExitCode']}):\n{said[-1500:]}")
    rounds = _ROUND.findall(said)
    found = re.search(r"^REPORT found=(\d+)$", said, re.MULTILINE)
    say(
        f"guest    PASS after {time.monotonic() - began_s:.1f} s, {len(rounds)} rounds of writing"
        + (f", found {found[1]} files of an earlier boot" if found else "")
    )
    return said


def check_volume(compose: Compose, say: Say, version: str, volume: str = "disk") -> None:
    """The image, as the storage has it after `down`, is clean and has every file. Raises Failed."""
    with tempfile.TemporaryDirectory(prefix="nbd-bridge-image-") as temporary:
        folder = Path(temporary)
        # Only through a container: the volume's place is the engine's own business.
        name = compose.engine(
            "create", "-v", f"{compose.name}_volumes:/volumes:ro",
            f"nbd-bridge/storage:{version}",
        ).strip()  # fmt: skip
        try:
            compose.engine("cp", f"{name}:/volumes/{volume}", str(folder / "disk"), limit_s=120)
        finally:
            compose.engine("rm", "-f", name)
        if complaint := check_filesystem(folder / "disk"):
            raise Failed(f"the image's file system is damaged: {complaint}")
        extract_files(folder / "disk", folder / "files")
        right, wrong = check_sums(folder / "files")
    if wrong or not right:
        raise Failed(f"the image has {right} right files; wrong or missing: {wrong}")
    say(f"image    file system clean, {right} files right, seen from the storage")
