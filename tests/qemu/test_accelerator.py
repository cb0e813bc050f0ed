"""The KVM probe, with programs in QEMU's place."""

import os
from pathlib import Path

import pytest

from bridge.demo.accelerator import choose_accelerator, probe_kvm


def fake_qemu(folder: Path, behaviour: str) -> list[str]:
    """A program that has a version and then does as told; it counts its starts."""
    program = folder / "qemu"
    program.write_text(
        f"#!/bin/sh\n[ $1 = --version ] && echo 'QEMU emulator version 7.2.0' && exit\n"
        f"echo $$ >>{folder}/starts\n{behaviour}\n"
    )
    program.chmod(0o755)
    return [str(program)]


@pytest.fixture
def device(tmp_path: Path) -> Path:
    path = tmp_path / "kvm"
    path.touch()
    return path


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


async def test_probe_of_a_hanging_guest_kills_it_and_says_no(tmp_path: Path, device: Path) -> None:
    qemu = fake_qemu(tmp_path, "exec sleep 1000")

    works = await probe_kvm(tmp_path, tmp_path, qemu=qemu, timeout_s=0.3, device=device)

    assert not works
    assert not is_alive(int((tmp_path / "starts").read_text()))


async def test_probe_of_a_guest_that_passes_says_yes(tmp_path: Path, device: Path) -> None:
    qemu = fake_qemu(tmp_path, "echo PASS")

    assert await probe_kvm(tmp_path, tmp_path, qemu=qemu, timeout_s=30, device=device)


async def test_probe_of_a_qemu_that_aborts_says_no(tmp_path: Path, device: Path) -> None:
    qemu = fake_qemu(tmp_path, "echo failed to set MSR >&2; kill -ABRT $$")

    assert not await probe_kvm(tmp_path, tmp_path, qemu=qemu, timeout_s=30, device=device)


async def test_probe_without_a_qemu_says_no(tmp_path: Path, device: Path) -> None:
    qemu = [str(tmp_path / "nothing")]

    assert not await probe_kvm(tmp_path, tmp_path, qemu=qemu, timeout_s=30, device=device)


async def test_choice_without_a_device_is_tcg_and_starts_nothing(tmp_path: Path) -> None:
    qemu = fake_qemu(tmp_path, "echo PASS")

    choice = await choose_accelerator(
        tmp_path, tmp_path, tmp_path / "cache", qemu=qemu, device=tmp_path / "none"
    )

    assert choice == "tcg"
    assert not (tmp_path / "starts").exists()


@pytest.mark.parametrize(("says", "choice"), [("PASS", "kvm"), ("FAIL no", "tcg")])
async def test_choice_is_kept_for_the_next_time(
    tmp_path: Path, device: Path, says: str, choice: str
) -> None:
    qemu = fake_qemu(tmp_path, f"echo {says}")
    arguments = (tmp_path, tmp_path, tmp_path / "cache")

    first = await choose_accelerator(*arguments, qemu=qemu, device=device)
    second = await choose_accelerator(*arguments, qemu=qemu, device=device)

    assert (first, second) == (choice, choice)
    assert len((tmp_path / "starts").read_text().split()) == 1


async def test_choice_with_a_broken_cache_file_probes_again(tmp_path: Path, device: Path) -> None:
    qemu = fake_qemu(tmp_path, "echo PASS")
    (tmp_path / "accelerator.json").write_text("[1, 2")

    choice = await choose_accelerator(tmp_path, tmp_path, tmp_path, qemu=qemu, device=device)

    assert choice == "kvm"
