"""The remembered state of a volume as text, the same for every store."""

from __future__ import annotations

import json
import re

from nbd_plugin.last_seen import SEEN
from nbd_plugin.store import VolumeState

MAX_STATE_BYTES = 4096
_IDENTITY = re.compile("([0-9a-f]{32})?", re.ASCII)
_WRITER = re.compile("[A-Za-z0-9_.-]{0,64}", re.ASCII)


def parse_state(data: bytes) -> VolumeState:
    """From JSON. Raises ValueError for anything that `json.dumps(asdict(state))` cannot be."""
    if len(data) > MAX_STATE_BYTES:
        raise ValueError("too long")
    fields = json.loads(data)
    if not isinstance(fields, dict):
        raise ValueError("not an object")
    keys = ("generation", "written", "losses", "grown_from", "grown_to")
    counters = [fields.get(key, 0) for key in keys]
    if not all(type(value) is int and 0 <= value < 2**63 for value in counters):
        raise ValueError("not a counter")
    identity = fields.get("identity", "")
    if not (isinstance(identity, str) and _IDENTITY.fullmatch(identity)):
        raise ValueError("not an identity")
    seen = fields.get("seen", "")
    if not (isinstance(seen, str) and SEEN.fullmatch(seen)):
        raise ValueError("not a description of a file")
    writer = fields.get("writer", "")
    if not (isinstance(writer, str) and _WRITER.fullmatch(writer)):
        raise ValueError("not a client")
    return VolumeState(
        generation=counters[0],
        written=counters[1],
        read_only=fields.get("read_only") is True,
        losses=counters[2],
        grown_from=counters[3],
        grown_to=counters[4],
        identity=identity,
        seen=seen,
        writer=writer,
    )
