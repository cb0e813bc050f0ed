"""`check`: sound devices pass, whoever made them, and each rule notices what breaks it."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest
import trio

from bridge.errors import ConnectionLost
from bridge.peers.nbd_server import Server
from bridge.peers.nbd_server_disk import MemoryDisk
from bridge.probe.check import RULES, Finding, check
from bridge.probe.rules import Verdict
from tests.guest.vhost_user.backends import running_backend
from tests.guest.vhost_user.test_peers import storage_daemon
from tests.probe.faulty import PLANTS, FaultyDevice
from tests.processes import bridge_argv, serving, unix_uri

_OF_STORAGE_DAEMON = {
    "features_refused": "SET_FEATURES with bit",
    "features_parts": "4 bytes at 20 differ",
    "used_length": "a read that failed claims",
    "session_stop": "the ring stopped at",
}
"""What qemu-storage-daemon 10 does not keep: it accepts any feature, gives the beginning of the
configuration space for each part, says that a failed read wrote its data, and on a busy machine may
have stopped a ring before what was popped there is answered."""


def by_verdict(findings: list[Finding], verdict: Verdict) -> dict[str, str]:
    return {each.rule: each.detail for each in findings if each.verdict is verdict}


def test_every_rule_has_a_name_of_its_own_and_a_fault_that_breaks_it() -> None:
    names = [each.name for each in RULES]

    assert len(set(names)) == len(names)
    assert PLANTS.keys() == set(names)


def test_rule_is_named_after_a_section_of_the_rules() -> None:
    text = (Path(__file__).parents[2] / "docs/rules/virtio.md").read_text()
    sections = re.findall(r"^### `(\w+)`", text, re.MULTILINE)

    assert [each.name for each in RULES if not each.name.startswith(tuple(sections))] == []


async def test_our_device_keeps_every_promise(directory: Path) -> None:
    async with running_backend(directory) as backend:
        findings = await check(str(backend.path), destructive=True)

    assert by_verdict(findings, Verdict.FAILED) == {}
    assert by_verdict(findings, Verdict.SKIPPED) == {"request_read_only": "RO is not offered"}
    assert len(findings) == len(RULES)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["pure", "auto"])
@pytest.mark.parametrize("cache_mode", ["off", "writeback"])
async def test_bridge_keeps_every_promise(
    directory: Path, nursery: trio.Nursery, cache_mode: str, engine: str
) -> None:
    """The whole process, over a server: with the usual case, and a cache smaller than the disk."""
    disk = MemoryDisk(16 << 20)
    await nursery.start(Server({"": disk}).serve_unix, directory / "nbd")
    options = ("--cache-mode", cache_mode, "--cache-size", "4M", "--cache-dir", str(directory))
    path = directory / "vhost"
    async with serving(
        *(unix_uri(directory / "nbd"), path, *options),
        *("--num-queues", "4", "--engine", engine, "--log-level", "error"),
    ):
        findings = await check(str(path), destructive=True)
    nursery.cancel_scope.cancel()

    assert by_verdict(findings, Verdict.FAILED) == {}
    assert by_verdict(findings, Verdict.SKIPPED) == {"request_read_only": "RO is not offered"}


async def test_without_leave_nothing_is_written(directory: Path) -> None:
    async with running_backend(directory) as backend:
        before = bytes(backend.target.data)
        findings = await check(str(backend.path))
        assert bytes(backend.target.data) == before

    skipped = by_verdict(findings, Verdict.SKIPPED)
    assert {name for name, why in skipped.items() if why == "it writes"} == {
        each.name for each in RULES if each.destructive
    }
    assert by_verdict(findings, Verdict.FAILED) == {}


async def test_read_only_disk_keeps_what_it_promises(directory: Path) -> None:
    async with running_backend(directory, geometry={"read_only": True}) as backend:
        findings = await check(str(backend.path), destructive=True)

    assert by_verdict(findings, Verdict.FAILED) == {}
    assert "request_read_only" not in by_verdict(findings, Verdict.SKIPPED)
    assert by_verdict(findings, Verdict.SKIPPED)["data_written"] == "the disk is read-only"


async def test_disk_with_large_blocks_keeps_every_promise(directory: Path) -> None:
    geometry = {"block_size_bytes": 4096, "min_io_bytes": 4096}
    async with running_backend(directory, geometry=geometry) as backend:
        findings = await check(str(backend.path), destructive=True)

    assert by_verdict(findings, Verdict.FAILED) == {}


@pytest.mark.parametrize("name", [each.name for each in RULES])
async def test_rule_notices_the_fault_that_breaks_it(directory: Path, name: str) -> None:
    geometry = {"read_only": name == "request_read_only"}
    is_deaf = name == "notify_spurious"
    async with running_backend(directory, geometry=geometry, make_device=FaultyDevice) as backend:
        device = backend.device
        assert isinstance(device, FaultyDevice)
        PLANTS[name](backend, device)
        findings = await check(
            str(backend.path), destructive=True, only=name, limit_s=1 if is_deaf else 60
        )

    (finding,) = [each for each in findings if each.rule == name]
    assert finding.verdict is Verdict.FAILED, finding
    assert finding.detail.startswith("no answer") is is_deaf


async def test_device_that_does_not_answer_fails_in_time(directory: Path) -> None:
    async with running_backend(directory) as backend:
        backend.target.hold = True
        (finding,) = await check(str(backend.path), only="request_read_only", limit_s=0.2)
        assert finding.verdict is Verdict.SKIPPED
        (finding,) = await check(str(backend.path), only="request_flush", limit_s=0.2)
        backend.target.release()

    assert (finding.verdict, finding.detail) == (Verdict.FAILED, "no answer within 0.2 s")


async def test_no_device_is_no_finding(directory: Path) -> None:
    with pytest.raises(ConnectionLost):
        await check(str(directory / "none.sock"))


@pytest.mark.peers
async def test_storage_daemon_keeps_its_promises_but_those_known(directory: Path) -> None:
    with storage_daemon(directory) as path:
        findings = await check(str(path), destructive=True)

    failed = by_verdict(findings, Verdict.FAILED)
    assert failed.keys() <= _OF_STORAGE_DAEMON.keys()
    assert all(failed[name].startswith(_OF_STORAGE_DAEMON[name]) for name in failed)
    passed = by_verdict(findings, Verdict.OK)
    assert {"data_model", "data_queues", "ring_indirect", "malformed_chains"} <= passed.keys()


async def run(*arguments: str) -> subprocess.CompletedProcess[bytes]:
    return await trio.run_process(
        bridge_argv("check", *arguments), capture_stdout=True, capture_stderr=True, check=False
    )


async def test_command_prints_a_line_for_each_rule_and_its_sum(directory: Path) -> None:
    async with running_backend(directory, make_device=FaultyDevice) as backend:
        assert isinstance(backend.device, FaultyDevice)
        sound = await run("--only", "request", str(backend.path))
        PLANTS["request_flush"](backend, backend.device)
        broken = await run("--only", "request_fl", str(backend.path))
        as_json = await run("--only", "request_fl", "--json", str(backend.path))
        unknown = await run("--only", "nosuch", str(backend.path))

    lines = sound.stdout.decode().splitlines()
    assert sound.returncode == 0, sound.stderr
    assert lines[0].split()[:2] == ["ok", "request_read"]
    assert lines[-1] == f"{len(lines) - 2} ok, 0 failed, 1 skipped"
    assert b"\x1b" not in sound.stdout
    assert broken.returncode == as_json.returncode == 1
    assert broken.stdout.decode().splitlines()[0].endswith(": a flush: status IOERR")
    found = json.loads(as_json.stdout)
    assert found["passed"] is False
    assert found["rules"][0]["verdict"] == "failed"
    assert unknown.returncode == 2
    assert b"data_model" in unknown.stderr
