"""The plugin's parameters (`key=value` on nbdkit's command line), checked."""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass, fields

from nbd_plugin import names
from nbd_plugin.errors import PluginError
from nbd_plugin.sizes import parse_size

STORES = ("file", "memory", "rbd")
FENCES = ("on", "takeover", "token", "off")


@dataclass
class Settings:
    """Parameters as they came, in text; `check` says what they lack."""

    store: str = ""
    file: str = ""
    dir: str = ""
    state: str = ""
    size: str = ""
    volume: str = ""
    create: str = "off"
    parallel: str = ""
    connections: str = "0"
    fence: str = "on"
    fence_timeout: str = "10"
    pool: str = ""
    namespace: str = ""
    image: str = ""
    conf: str = ""
    id: str = ""
    timeout: str = "10"

    def set(self, key: str, value: str) -> None:
        """Take one parameter. Raises PluginError for an unknown one."""
        if key not in {field.name for field in fields(self)}:
            known = ", ".join(field.name for field in fields(self))
            raise PluginError(f"unknown parameter {key!r}; known are {known}")
        if "\0" in value:
            raise PluginError(f"{key}: a path or name has no NUL character")
        if key in ("file", "dir", "conf", "state"):
            value = os.path.abspath(value)  # nbdkit goes to / when it becomes a daemon
        setattr(self, key, value)

    def check(self) -> None:
        """Refuse what does not go together. Raises PluginError naming the parameter."""
        self.store = self.store or ("file" if self.file or self.dir else "")
        if self.store not in STORES:
            given = f"unknown store {self.store!r}" if self.store else "no store"
            raise PluginError(f"{given}: give store=file (with dir= or file=), memory or rbd")
        self._check_store_parameters()
        if self.fence not in FENCES:
            raise PluginError(f"fence={self.fence!r}: it is one of {', '.join(FENCES)}")
        if self.create not in ("on", "off"):
            raise PluginError(f"create={self.create!r}: it is on or off")
        if self.create == "on" and not self.size:
            raise PluginError("create=on needs size=, the size of the volumes that it creates")
        if self.parallel not in ("", "on", "off"):
            raise PluginError(f"parallel={self.parallel!r}: it is on or off")
        _ = self.size_bytes, self.fence_timeout_s, self.timeout_s, self.max_connections
        if self.volume:
            names.check_volume_name(self.volume)

    @property
    def size_bytes(self) -> int | None:
        """The parameter `size`; None without one. Raises PluginError."""
        return parse_size(self.size) if self.size else None

    @property
    def max_connections(self) -> int:
        """How many connections may have an export open at a time; 0: any number. Raises
        PluginError."""
        if not (self.connections.isascii() and self.connections.isdigit()):
            raise PluginError(f"connections={self.connections!r} is not a number")
        return int(self.connections[:9])

    @property
    def is_parallel(self) -> bool:
        """Whether the requests of one connection are executed on several threads.

        Off for files and memory: nbdkit before 1.34 aborts when a client hangs up with several
        parallel requests in flight. README.md has the figures.
        """
        return self.parallel == "on" or (self.parallel == "" and self.store == "rbd")

    @property
    def fence_timeout_s(self) -> float:
        """How long a new writer waits for the one before it, 0 to 3600. Raises PluginError."""
        return _seconds("fence_timeout", self.fence_timeout)

    @property
    def timeout_s(self) -> float:
        """How long a call into the cluster may take, 0 to 3600. Raises PluginError."""
        return _seconds("timeout", self.timeout)

    def _check_store_parameters(self) -> None:
        if self.store == "file":
            if bool(self.file) == bool(self.dir):
                raise PluginError("store=file needs either dir= or file=")
            if self.dir and not os.path.isdir(self.dir):  # No path raises here, however long.
                raise PluginError(f"dir={self.dir}: no such directory", errno.ENOENT)
        elif self.file or self.dir or self.state:
            raise PluginError(f"file=, dir= and state= do not go with store={self.store}")
        if self.store == "rbd":
            if not self.pool:
                raise PluginError("store=rbd needs pool=")
        else:
            for key in ("pool", "namespace", "image", "conf", "id"):
                if getattr(self, key):
                    raise PluginError(f"{key}= goes with store=rbd only")
        if self.store == "memory" and not self.size:
            raise PluginError("store=memory needs size=")


def _seconds(key: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise PluginError(f"{key}={text!r} is not a number of seconds") from None
    if not 0 <= value <= 3600:
        raise PluginError(f"{key}={text!r} must be between 0 and 3600 seconds")
    return value
