"""All targets that are written in Python, by name."""

from __future__ import annotations

from functools import cache as once

import structlog
import trio

from tests.fuzz import cache_file, control, nbd, rings, texts
from tests.fuzz.dice import BytesRandom
from tests.fuzz.target import Target
from tests.guest.vhost_user.fakes import FakeDevice, open_fds
from tests.guest.vhost_user.fuzz import RandomDice, RealDevice, converse


@once
def _campaign() -> rings.Campaign:
    return rings.Campaign()


def _rings(data: bytes) -> None:
    _campaign().play(BytesRandom(data))


@once
def _real_device() -> RealDevice:
    return RealDevice()


def _vhost_user(data: bytes) -> int:
    """A conversation with a device, and no descriptor is lost; the messages that were handled."""
    random = BytesRandom(data)
    real = _real_device()
    before = open_fds()
    dice = RandomDice(random)
    if random.getrandbits(1):
        handled = trio.run(lambda: converse(dice, real.device, turn=real.turn))
    else:
        handled = trio.run(lambda: converse(dice, FakeDevice(max_queues=2), turn=lambda: None))
    assert open_fds() == before
    return handled


_BRIDGE = ("bridge", "nbd_plugin")

TARGETS = {
    target.name: target
    for target in (
        Target("rings", _rings, longest_bytes=3000, modules=("bridge.guest", "bridge.datapath")),
        Target("vhost_user", _vhost_user, longest_bytes=2000, modules=("bridge.guest",)),
        Target("handshake", nbd.handshake, modules=("bridge.server",)),
        Target("replies", nbd.replies, longest_bytes=1000, modules=("bridge.server",)),
        Target("streams", nbd.streams, longest_bytes=1000, modules=("bridge.server",)),
        Target("cache_file", cache_file.run, longest_bytes=200, modules=("bridge.cache",)),
        Target("uri", texts.uri, longest_bytes=6000, modules=("bridge.server.uri", "urllib")),
        Target("size", texts.size, longest_bytes=60, modules=_BRIDGE),
        Target("config", texts.config, modules=("bridge.cli", "bridge.app", "tomllib")),
        Target("export_name", texts.export_name, longest_bytes=400, modules=_BRIDGE),
        Target("description", texts.description, longest_bytes=600, modules=_BRIDGE),
        Target("plugin_settings", texts.plugin_settings, longest_bytes=6000, modules=_BRIDGE),
        Target("control", control.run, longest_bytes=20_000, modules=("bridge.api", "h11")),
    )
}


def quiet() -> None:
    """What the product logs of hostile peers is right, and too much here."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger("critical"))
