"""KVM or software emulation: decided by starting a guest, not by looking at `/dev/kvm`.

In a virtual machine whose nested virtualisation does not work, the device can exist, open, and hang
the first guest without end. So a guest that powers off at once is booted under KVM with a time
limit. The result is kept until the machine boots again.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from bridge.demo.qemu import GuestConfig
from bridge.demo.virtual_machine import run_guest
from bridge.errors import ConfigError
from bridge.host import boot_id

PROBE_LIMIT_S = 10.0
"""A guest under a working KVM takes about a second, on a busy machine three."""

_KVM = Path("/dev/kvm")


async def choose_accelerator(
    kernel: Path,
    initrd: Path,
    cache: Path,
    *,
    qemu: Sequence[str] = (),
    timeout_s: float = PROBE_LIMIT_S,
    device: Path = _KVM,
) -> str:
    """ "kvm" if a guest runs under it, else "tcg". Calls `probe_kvm` once per boot.

    Keeps the result in `cache`, per QEMU command. Without that file it probes again.
    """
    if not os.access(device, os.R_OK | os.W_OK):
        return "tcg"
    answers = cache / "accelerator.json"
    boot = boot_id().hex()
    key = " ".join([boot, str(device), *qemu])
    known = {k: v for k, v in _read_answers(answers).items() if k.startswith(boot)}
    if known.get(key) not in ("kvm", "tcg"):
        works = await probe_kvm(kernel, initrd, qemu=qemu, timeout_s=timeout_s, device=device)
        known[key] = "kvm" if works else "tcg"
        _write_answers(answers, known)
    return known[key]


async def probe_kvm(
    kernel: Path,
    initrd: Path,
    *,
    qemu: Sequence[str] = (),
    timeout_s: float = PROBE_LIMIT_S,
    device: Path = _KVM,
) -> bool:
    """Whether a guest under KVM runs to its end within `timeout_s`; kills it if it does not."""
    if not os.access(device, os.R_OK | os.W_OK):
        return False
    config = GuestConfig(
        kernel=kernel,
        initrd=initrd,
        words={"guest_script": "probe"},
        accelerator="kvm",
        memory_mib=128,
        qemu=qemu,
    )
    with tempfile.TemporaryDirectory(prefix="nbd-bridge-probe-") as folder:
        log = Path(folder) / "probe.log"
        try:
            report = await run_guest(config, log, time_limit_s=timeout_s)
        except ConfigError:
            return False
    return report.passed


def _read_answers(path: Path) -> dict[str, str]:
    try:
        answers = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return answers if isinstance(answers, dict) else {}


def _write_answers(path: Path, answers: dict[str, str]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}")
        temporary.write_text(json.dumps(answers))
        temporary.rename(path)
    except OSError:
        # A read-only home: the next start probes again.
        return
