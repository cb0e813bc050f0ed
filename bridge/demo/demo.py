"""The demo, end to end: a Linux guest uses a disk whose blocks are on an NBD server.

nbdkit with our plugin serves a sparse image, and the bridge serves that as a vhost-user-blk disk. A
guest in QEMU makes a file system on it, writes, discards, verifies, and verifies again in a second
boot. Then the demo stops everything in order and checks the image from the server's side.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

import trio

from bridge.demo.accelerator import choose_accelerator
from bridge.demo.image import check_filesystem, check_sums, extract_files
from bridge.demo.initramfs import build_initramfs
from bridge.demo.kernel import Kernel, cache_dir, find_kernel
from bridge.demo.qemu import GuestConfig, VhostUserDisk, find_qemu, qemu_version
from bridge.demo.report import GuestReport
from bridge.demo.servers import ServerProcess, bridge_command, running, watched
from bridge.demo.virtual_machine import run_guest
from bridge.demo.volume import FileVolume, Volume
from bridge.demo.without_guest import CHUNK_BYTES, pattern, run_without_guest
from bridge.errors import BridgeError, ConfigError

SERIAL = "nbd-bridge-demo"
_MIB = 1 << 20
_LOG_LINES = 8
_ACCELERATORS = {"kvm": "KVM", "tcg": "software emulation"}


@dataclass(frozen=True)
class DemoConfig:
    """Choices of a demo run."""

    total_mib: int = 200
    """How much the guest writes; at least 4."""
    disk_mib: int = 1024
    guest: bool = True
    """False: our own front-end plays the guest, without QEMU."""
    accelerator: str = "auto"
    """"auto" probes KVM; "kvm" and "tcg" are used without a probe."""
    boot_limit_s: float = 300.0


@dataclass
class DemoResult:
    """Results of a demo run. `failures` is empty when all went well."""

    failures: list[str] = field(default_factory=list)
    boots: dict[str, GuestReport] = field(default_factory=dict)
    allocated: dict[str, int] = field(default_factory=dict)
    """Bytes the image took on the server's disk, by checkpoint."""
    files_right: int = 0
    elapsed_s: float = 0.0

    @property
    def passed(self) -> bool:
        """Whether every check was right."""
        return not self.failures


@dataclass(frozen=True)
class _Machine:
    """What a guest needs to boot here."""

    kernel: Kernel
    initrd: Path
    accelerator: str
    version: tuple[int, int]


async def run_demo(
    config: DemoConfig | None = None,
    *,
    folder: Path | None = None,
    say: Callable[[str], None] = print,
    volume: Volume | None = None,
) -> DemoResult:
    """Run the demo and report through `say`, a line at a time.

    `volume` is served instead of a sparse image; it must have `config.disk_mib`. `folder` keeps
    image, sockets and logs; without one they are in a temporary folder that is removed afterwards.
    Raises ConfigError, with the remedy, when a program is missing on this machine. Later problems
    are in the result's `failures`. Cancellation kills the processes that were started.
    """
    config = config or DemoConfig()
    if folder is not None:
        os.makedirs(folder, exist_ok=True)
        return await _Demo(config, folder, say, volume).run()
    with tempfile.TemporaryDirectory(prefix="nbd-bridge-") as temporary:
        return await _Demo(config, Path(temporary), say, volume).run()


class _Demo:
    def __init__(
        self,
        config: DemoConfig,
        folder: Path,
        say: Callable[[str], None],
        volume: Volume | None,
    ) -> None:
        self.config = config
        self.folder = folder
        self.say = say
        self.volume = volume or FileVolume(folder / "disk.img", config.disk_mib, say)
        self.disk_socket = folder / "disk.sock"
        self.result = DemoResult()

    async def run(self) -> DemoResult:
        began_s = time.monotonic()
        result = self.result
        machine = await self._prepare_machine() if self.config.guest else None
        try:
            await self._serve_and_boot(machine)
            if machine is None:
                await self._check_pattern()
            else:
                await self._check_filesystem()
        except ConfigError:
            raise
        except BridgeError as error:
            self._fail(str(error))
        result.elapsed_s = time.monotonic() - began_s
        if not result.passed:
            self._tell_logs()
        verdict = "PASS" if result.passed else "FAIL"
        self.say(f"{verdict}  in {result.elapsed_s:.1f} s")
        return result

    async def _prepare_machine(self) -> _Machine | None:
        """Kernel, initrd and accelerator. Says so and returns None if QEMU is missing."""
        try:
            qemu = find_qemu()
        except ConfigError as error:
            self.say(f"guest    {error}; the built-in front-end plays the guest")
            return None
        kernel = await trio.to_thread.run_sync(find_kernel)
        initrd = self.folder / "initrd"
        initrd.write_bytes(await trio.to_thread.run_sync(build_initramfs, kernel))
        accelerator = self.config.accelerator
        if accelerator == "auto":
            accelerator = await choose_accelerator(kernel.image, initrd, cache_dir())
        version = await trio.to_thread.run_sync(qemu_version, [qemu])
        return _Machine(kernel, initrd, accelerator, version)

    async def _serve_and_boot(self, machine: _Machine | None) -> None:
        nbd_socket = self.folder / "nbd.sock"
        uri = f"nbd+unix:///?socket={nbd_socket}"
        async with AsyncExitStack() as stack:
            name, command = self.volume.server_command(nbd_socket)
            log = self.folder / "server.log"
            server = await stack.enter_async_context(running(name, command, nbd_socket, log))
            self.say(f"server   {name}, {self.volume.description}")
            command = bridge_command(
                *(uri, self.disk_socket, "--serial", SERIAL),
                *("--cache-dir", str(self.folder), "--cache-size", "256M"),
            )
            log = self.folder / "bridge.log"
            bridge = await stack.enter_async_context(
                running("bridge", command, self.disk_socket, log)
            )
            self.say(f"bridge   {uri} -> {self.disk_socket} (process {bridge.process.pid})")
            async with watched(bridge, server):
                if machine is None:
                    await self._without_guest()
                else:
                    await self._boot_twice(machine)
            for process in (bridge, server):
                await self._stop(process)

    async def _stop(self, server: ServerProcess) -> None:
        began_s = time.monotonic()
        await server.stop()
        self.say(f"stopped  {server.name}: exit 0 after {time.monotonic() - began_s:.2f} s")

    async def _without_guest(self) -> None:
        self.say("guest    none: the built-in front-end plays it")
        report = await run_without_guest(
            self.disk_socket, self.config.total_mib, checkpoint=self._checkpoint
        )
        self.result.boots["front-end"] = report
        if not report.passed:
            self._fail(f"front-end: {report.reason}")
            return
        values = report.values
        self.say(f"         disk of {values['sectors']} sectors, serial {values['serial']}")
        self.say(
            f"         wrote {self.config.total_mib} MiB at {values['write_mib_s']} MiB/s (flush "
            f"included), read and compared at {values['read_mib_s']} MiB/s"
        )
        self._tell_shrunk("discarding half of it", "written", "trimmed")

    async def _boot_twice(self, machine: _Machine) -> None:
        major, minor = machine.version
        self.say(
            f"guest    Linux {machine.kernel.release} in QEMU {major}.{minor}, "
            f"{_ACCELERATORS[machine.accelerator]}"
        )
        words: dict[str, str | int] = {
            "guest_script": "filesystem",
            "guest_mib": self.config.total_mib,
            "guest_sectors": self.config.disk_mib * _MIB // 512,
            "guest_serial": SERIAL,
        }
        guest = GuestConfig(
            disks=[VhostUserDisk(self.disk_socket)],
            kernel=machine.kernel.image,
            initrd=machine.initrd,
            accelerator=machine.accelerator,
            words=words,
        )
        if await self._boot("boot 1", guest):
            self._tell_filesystem(self.result.boots["boot 1"])
            if await self._boot("boot 2", replace(guest, words={"guest_script": "verify"})):
                self._tell_verify(self.result.boots["boot 2"])

    async def _boot(self, name: str, guest: GuestConfig) -> bool:
        log = self.folder / f"{name.replace(' ', '')}.log"
        report = await run_guest(
            guest, log, time_limit_s=self.config.boot_limit_s, checkpoint=self._checkpoint
        )
        self.result.boots[name] = report
        return self._judge(name, report)

    async def _checkpoint(self, name: str) -> None:
        self.result.allocated[name] = await trio.to_thread.run_sync(self.volume.allocated_bytes)

    def _judge(self, name: str, report: GuestReport) -> bool:
        if report.passed:
            self.say(f"{name}   PASS, {report.elapsed_s:.1f} s from power-on to power-off")
        else:
            self._fail(f"{name}: {report.reason}")
        return report.passed

    def _tell_filesystem(self, report: GuestReport) -> None:
        values = report.values
        self.say(
            f"         disk of {values.get('sectors')} sectors, serial {values.get('serial')}, "
            f"{values.get('write_cache')}; mkfs.ext4 {report.number('mkfs_ms') / 1000:.1f} s"
        )
        self.say(
            f"         wrote {self.config.total_mib} MiB at {values.get('write_mib_s')} MiB/s "
            f"(sync included), read after a remount at {values.get('read_mib_s')} MiB/s, "
            "checksums right"
        )
        self._tell_shrunk("fstrim", "deleted", "trimmed")
        self._tell_shrunk("blkdiscard", "raw_written", "raw_discarded")

    def _tell_shrunk(self, what: str, before: str, after: str) -> None:
        """Check that discarding has shrunk the image on the server."""
        sizes = self.result.allocated
        if before not in sizes or after not in sizes:
            self._fail(f"the guest never reached checkpoint '{after}'")
        elif sizes[after] + _MIB > sizes[before]:
            self._fail(f"{what} left the image at {sizes[after]} bytes ({sizes[before]} before)")
        else:
            self.say(
                f"         {what} shrank the image on the server from "
                f"{sizes[before] // _MIB} to {sizes[after] // _MIB} MiB"
            )

    def _tell_verify(self, report: GuestReport) -> None:
        values = report.values
        self.say(
            f"         file system clean, {values.get('files')} files read at "
            f"{values.get('read_mib_s')} MiB/s, checksums right"
        )

    async def _check_filesystem(self) -> None:
        """Check the image with the host's tools, after everything has stopped."""
        image = await trio.to_thread.run_sync(self.volume.image)
        complaint = await trio.to_thread.run_sync(check_filesystem, image)
        if complaint:
            self._fail(f"e2fsck on the server's image: {complaint}")
        files = self.folder / "files"
        await trio.to_thread.run_sync(extract_files, image, files)
        right, wrong = await trio.to_thread.run_sync(check_sums, files)
        self.result.files_right = right
        if wrong or not right:
            self._fail(f"on the server's image {right} files are right, these are not: {wrong}")
        if not complaint and right and not wrong:
            self.say(f"image    e2fsck clean, {right} files with the right checksums")

    async def _check_pattern(self) -> None:
        """Check that the image has what the front-end wrote."""
        chunks = int(self.result.boots["front-end"].number("written_chunks"))
        image = await trio.to_thread.run_sync(self.volume.image)
        wrong = await trio.to_thread.run_sync(_wrong_chunks, image, chunks)
        if wrong:
            self._fail(f"on the server's image these MiB are wrong: {wrong}")
        elif chunks:
            self.say(f"image    {chunks} MiB compared, all right")

    def _tell_logs(self) -> None:
        """Print the ends of the logs, whose folder may be removed afterwards."""
        for log in sorted(self.folder.glob("*.log")):
            lines = log.read_text(errors="replace").splitlines()[-_LOG_LINES:]
            for line in lines:
                printable = "".join(each if each.isprintable() else "?" for each in line)
                self.say(f"{log.name}: {printable}")

    def _fail(self, what: str) -> None:
        self.result.failures.append(what)
        self.say(f"FAILED   {what}")


def _wrong_chunks(image: Path, chunks: int) -> list[int]:
    with image.open("rb") as file:
        return [chunk for chunk in range(chunks) if file.read(CHUNK_BYTES) != pattern(chunk)]
