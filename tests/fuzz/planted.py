"""A bug for each target, put into the product: a target that does not find it is worth nothing.

Each takes away a check that a peer has to pass, or turns the error that is documented into another.
"""

from __future__ import annotations

import re
from contextlib import AbstractContextManager
from struct import Struct
from typing import Any
from unittest.mock import patch

PLANTED: dict[str, AbstractContextManager[Any]] = {
    # A descriptor outside the guest's memory is an error that nothing expects.
    "rings": patch("bridge.guest.virtio.chain.BadAddress", ZeroDivisionError),
    # Messages of any length, with any number of descriptors.
    "vhost_user": patch("bridge.guest.vhost_user.session.check_shape", lambda *_: None),
    # Information of any length.
    "handshake": patch("bridge.server.infos._expect_length", lambda *_: None),
    # Errors of any length.
    "replies": patch(
        "bridge.server.transmission.parse_error",
        lambda kind, payload, request: Struct(">IH").unpack_from(payload)[0],
    ),
    # A hole is what was there before.
    "streams": patch("bridge.server.transmission.zero", lambda *_: None),
    # Any file may be dropped.
    "cache_file": patch("bridge.cache.file.locking.is_ours_untrusted", lambda _: True),
    "uri": patch("bridge.server.uri._BAD_CHARACTER", re.compile("(?!)")),
    # The sign for Kelvin is a K to an expression that takes either case.
    "size": patch(
        "bridge.units._SIZE", re.compile(r"([0-9]+)(?:\.([0-9]+))? ?(?:([KMGT])(i?B)?|B)?", re.I)
    ),
    "config": patch("bridge.cli.config_file._faults", lambda *_: iter(())),
    "export_name": patch("nbd_plugin.names._NAME", re.compile("[A-Za-z0-9_./+-]{1,128}")),
    # A number may be any word.
    "description": patch(
        "bridge.server.volume_words.counter", lambda _, word: None if word is None else int(word)
    ),
    "plugin_settings": patch("nbd_plugin.settings._seconds", lambda _, text: float(text)),
    "control": patch("bridge.api.fields.ValueError", ZeroDivisionError, create=True),
}
