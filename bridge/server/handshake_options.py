"""What a handshake is for and would like to negotiate, and what a list of exports says."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Goal(Enum):
    """The purpose of the negotiation."""

    GO = "go"
    INFO = "info"
    LIST = "list"


@dataclass(frozen=True, slots=True)
class ExportListEntry:
    """One export of a list."""

    name: str
    description: str


@dataclass(frozen=True, slots=True)
class HandshakeOptions:
    """What the client would like to negotiate."""

    export_name: str = ""
    typed_name: str | None = None
    """The operator's name of the export, where `export_name` has more in it."""
    list_if_refused: bool = False
    """Say which exports there are when the server does not give the one that is wanted."""
    goal: Goal = Goal.GO
    tls: bool = False
    structured: bool = True
    extended: bool = True
    block_status: bool = True
