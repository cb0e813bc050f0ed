"""What an operator can choose of the control socket."""

from __future__ import annotations

from dataclasses import dataclass

OFF = "off"
AUTO = "auto"


@dataclass(frozen=True)
class ApiSettings:
    """The control socket of one bridge."""

    name: str = ""
    """What the bridge is called; "": after its socket, see `places.default_name`."""
    socket: str = OFF
    """OFF, AUTO (NAME.api in the runtime directory), or a path."""
    slow_s: float = 1.0
    """Requests that take longer are logged; 0: none are."""
