"""The volume that the demo's server serves, and how to check it without the bridge."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from bridge.demo.image import allocated_bytes
from bridge.demo.servers import nbdkit_command, small_server_command
from bridge.errors import ConfigError

_MIB = 1 << 20


class Volume(Protocol):
    """A volume of some store, served by an NBD server on a unix socket."""

    description: str

    def server_command(self, socket: Path) -> tuple[str, list[str]]:
        """The NBD server's name and command line."""

    def allocated_bytes(self) -> int:
        """The bytes that the volume takes in its store."""

    def image(self) -> Path:
        """The volume's content as a file, once the server has stopped."""


class FileVolume:
    """A sparse image file; without nbdkit the bridge's own small server serves it."""

    def __init__(self, path: Path, size_mib: int, say: Callable[[str], None]) -> None:
        self._path = path
        self._size_mib = size_mib
        self._say = say
        self.description = f"sparse image of {size_mib} MiB ({path})"

    def server_command(self, socket: Path) -> tuple[str, list[str]]:
        """nbdkit with our plugin if it is installed, else the small server."""
        try:
            return "nbdkit", nbdkit_command(self._path, socket, f"size={self._size_mib}M")
        except ConfigError as error:
            self._say(f"server   {error}; the small NBD server of the bridge takes its place")
            command = small_server_command(self._path, socket, self._size_mib * _MIB)
            return "small NBD server", command

    def allocated_bytes(self) -> int:
        """See Volume."""
        return allocated_bytes(self._path)

    def image(self) -> Path:
        """See Volume."""
        return self._path
