"""What makes bridges services of a host: units, their user, QEMU's description, examples."""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import subprocess
from configparser import ConfigParser
from pathlib import Path

import pytest

from bridge.app import unit_files
from bridge.app.settings import ServeSettings
from bridge.cli import main as cli
from tests.processes import bridge_argv
from tests.tools import missing, need

_ALL = [
    *("nbd-bridge@.service", "nbd-bridge@.socket", "nbd-bridge-nbdkit@.service"),
    "nbd-bridge-exporter.service",
    *("nbd-bridge.conf", "50-nbd-bridge.json"),
    *("vm0.toml.example", "vm0.nbdkit.example", "exporter.env.example"),
]


@pytest.fixture
def program(directory: Path) -> Path:
    """An executable that the units may name."""
    return Path(shutil.copy("/bin/true", directory / "program"))


def install(root: Path, program: Path, *options: str) -> list[Path]:
    argv = bridge_argv("install-units", "--root", str(root), *options)
    # The real one is in the checkout, which may be in a home directory.
    argv += ["--program", "/usr/bin/env", "--plugin", "/usr/share/plugin.py"]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [Path(line) for line in done.stdout.splitlines()]


def unit(path: Path) -> ConfigParser:
    parser = ConfigParser(strict=False, interpolation=None)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read(path)
    return parser


def test_all_files_are_written_with_the_program_in_them(directory: Path, program: Path) -> None:
    written = install(directory / "root", program)

    assert {each.name for each in written} == set(_ALL)
    for each in written:
        text = each.read_text()
        assert not re.search("@[A-Z]+@", text), each
        assert stat.S_IMODE(each.stat().st_mode) == 0o644
    service = (directory / "root/etc/systemd/system/nbd-bridge@.service").read_text()
    assert "ExecStart=/usr/bin/env serve --config %i" in service


def test_package_has_them_in_usr(directory: Path, program: Path) -> None:
    written = install(directory / "root", program, "--vendor")

    assert all(each.is_relative_to(directory / "root" / "usr") for each in written)
    assert (directory / "root/usr/share/qemu/vhost-user/50-nbd-bridge.json").is_file()


def test_files_of_another_version_are_replaced(directory: Path, program: Path) -> None:
    first = install(directory / "root", program)
    for each in first:
        each.write_text("old")

    assert install(directory / "root", program) == first
    assert "old" not in {each.read_text() for each in first}


@pytest.mark.parametrize("unit_name", _ALL[:4])
def test_units_are_good_for_systemd(unit_name: str, directory: Path, program: Path) -> None:
    (path,) = (each for each in install(directory / "root", program) if each.name == unit_name)
    # It looks whether programs are there: nbdkit may be missing here.
    text = path.read_text().replace("ExecStart=nbdkit", f"ExecStart={program}")
    path.write_text(text)

    done = subprocess.run(
        [need("systemd-analyze"), "verify", "--man=no", str(path)],
        capture_output=True,
        text=True,
        check=False,
    )

    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    "unit_name",
    ["nbd-bridge@.service", "nbd-bridge-nbdkit@.service", "nbd-bridge-exporter.service"],
)
def test_sandbox_is_rated_ok(unit_name: str, directory: Path, program: Path) -> None:
    (path,) = (each for each in install(directory / "root", program) if each.name == unit_name)

    # The threshold is ten times the exposure, of which "OK" goes up to 5.
    done = subprocess.run(
        [need("systemd-analyze"), "security", "--offline=true", "--threshold=20", str(path)],
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stdout[-300:] + done.stderr
    assert " OK " in done.stdout.splitlines()[-1]


def test_unit_gives_a_stop_more_time_than_the_bridge_takes(directory: Path, program: Path) -> None:
    install(directory / "root", program)
    service = unit(directory / "root/etc/systemd/system/nbd-bridge@.service")["Service"]

    assert int(service["TimeoutStopSec"]) > ServeSettings().limits.stop_timeout_s + 10
    assert service["Type"] == "notify"


def test_guests_are_stopped_before_their_disks(directory: Path, program: Path) -> None:
    install(directory / "root", program)
    section = unit(directory / "root/etc/systemd/system/nbd-bridge@.service")["Unit"]

    assert "libvirt-guests.service" in section["Before"].split()
    assert "network-online.target" in section["After"].split()


@pytest.mark.root
def test_user_and_directories_are_made(directory: Path, program: Path) -> None:
    if os.geteuid():
        missing("only root can make users")
    root = directory / "root"
    install(root, program)

    subprocess.run([need("systemd-sysusers"), f"--root={root}"], check=True)
    subprocess.run([need("systemd-tmpfiles"), f"--root={root}", "--create"], check=True)

    groups = dict(line.split(":")[::3] for line in (root / "etc/group").read_text().splitlines())
    assert groups["kvm"].split(",") == ["nbd-bridge"]
    passwd = (root / "etc/passwd").read_text()
    (uid,) = re.findall(r"^nbd-bridge:[^:]*:(\d+):", passwd, re.MULTILINE)
    status = (root / "run/nbd-bridge").stat()
    assert (status.st_uid, stat.S_IMODE(status.st_mode)) == (int(uid), 0o711)


def test_description_for_qemu_says_what_the_program_says(directory: Path, program: Path) -> None:
    install(directory / "root", program)
    found = json.loads((directory / "root/etc/qemu/vhost-user/50-nbd-bridge.json").read_text())

    said = subprocess.run(bridge_argv("--print-capabilities"), capture_output=True, check=True)
    told = json.loads(said.stdout)
    assert found["binary"] == "/usr/bin/env"
    assert (found["type"], found["features"]) == (told["type"], told["features"])


def test_example_is_a_good_file_and_what_it_comments_out_is_good(directory: Path) -> None:
    text = (unit_files.SHARE / "etc/vm0.toml.example").read_text()
    # An option that is commented out has no blank behind the #.
    other = re.sub("^#(?=[a-z])", "", re.sub("^uri.*", "", text, flags=re.M), flags=re.M)
    assert other != text
    for name, content in (("vm0", text), ("vm1", other)):
        path = directory / f"{name}.toml"
        path.write_text(content)
        argv = bridge_argv("config", "check", str(path))
        done = subprocess.run(argv, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("place", ["/home/me/venv/bin/nbd-bridge", "/root/x", "/tmp/x/nbd-bridge"])
def test_program_that_the_units_cannot_see_is_refused(
    place: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["install-units", "--root", "/nowhere", "--program", place])

    assert ended.value.code == 2
    assert place in capsys.readouterr().err


def test_directory_that_cannot_be_written_is_one_line(
    directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (directory / "etc").write_text("a file")
    with pytest.raises(SystemExit) as ended:
        cli.main(["install-units", "--root", str(directory), "--program", "/usr/bin/env"])

    assert ended.value.code == 1
    assert capsys.readouterr().err.count("\n") == 1
