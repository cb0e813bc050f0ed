"""nbdkit with the plugin under test, as a process: this host's, or the newer peers' one."""

from __future__ import annotations

import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

from tests.tools import need, peer

PACKAGE = Path(__file__).resolve().parents[2] / "nbd_plugin"
PLUGIN = PACKAGE / "plugin.py"

HOST = "host"
PEERS = "peers"

_START_TIMEOUT_S = 30


class Nbdkit:
    """One nbdkit process on a unix socket; stopped by `stop` or at the end of a `with`."""

    def __init__(
        self,
        *parameters: str,
        options: tuple[str, ...] = (),
        filters: tuple[str, ...] = (),
        where: str = HOST,
        plugin: Path | None = PLUGIN,
        unix: bool = True,
    ) -> None:
        """`plugin=None` runs another nbdkit plugin: the first parameter is its name.

        With `unix=False` the options say where to listen.
        """
        # Not under pytest's directory: a socket's path has at most 107 bytes.
        self.directory = Path(tempfile.mkdtemp(prefix="nbp-"))
        self.socket = self.directory / "s"
        self._log = self.directory / "log"
        pidfile = self.directory / "pid"
        script = () if plugin is None else ("python", str(self._visible(plugin, where)))
        command = [
            *self._nbdkit(where),
            *("-f", "-P", str(pidfile), *options),
            *(("-U", str(self.socket)) if unix else ()),
            *(f"--filter={name}" for name in filters),
            *script,
            *parameters,
        ]
        with open(self._log, "wb") as log:
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=log)
        deadline = time.monotonic() + _START_TIMEOUT_S
        while not pidfile.exists():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.stop(keep_log=True)
                raise RuntimeError(f"nbdkit did not start: {self.log}")
            time.sleep(0.01)

    def __enter__(self) -> Nbdkit:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def log(self) -> str:
        """What nbdkit said on standard error."""
        return self._log.read_text() if self._log.exists() else ""

    def uri(self, export: str = "") -> str:
        return f"nbd+unix:///{export}?socket={self.socket}"

    def kill(self) -> None:
        """End it as a crash would."""
        self.process.kill()
        self.process.wait()

    def stop(self, *, keep_log: bool = False) -> None:
        """End it, orderly if that works; the directory goes too."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(5)
            except subprocess.TimeoutExpired:
                self.kill()
        if not keep_log:
            shutil.rmtree(self.directory, ignore_errors=True)

    def _visible(self, plugin: Path, where: str) -> Path:
        """The plugin's path there: the peers see only /tmp."""
        if where == HOST:
            return plugin
        copy = self.directory / "code"
        shutil.copytree(PACKAGE, copy / PACKAGE.name)
        if plugin.is_relative_to(PACKAGE):
            return copy / PACKAGE.name / plugin.name
        return Path(shutil.copy(plugin, copy))

    def _nbdkit(self, where: str) -> list[str]:
        return [need("nbdkit")] if where == HOST else peer("nbdkit")


def refusal(*parameters: str, options: tuple[str, ...] = ()) -> str:
    """What nbdkit says when it refuses to start with these parameters; fails if it starts."""
    done = subprocess.run(
        [need("nbdkit"), "-U", "-", *options, "python", str(PLUGIN), *parameters, "--run", "true"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode != 0, "nbdkit started"
    return done.stderr.strip()


def run(*command: str, timeout_s: float = 120) -> str:
    """Run a tool; returns its standard output, fails with its standard error."""
    done = subprocess.run(
        [need(command[0]), *command[1:]],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    assert done.returncode == 0, f"{' '.join(command)}: {done.stdout}{done.stderr}"
    return done.stdout
