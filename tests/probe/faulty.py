"""A real device with a fault planted in it, one for each rule of `check`."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from bridge.datapath.request import DISCARD, FLUSH, READ, WRITE, WRITE_ZEROES, Request
from bridge.guest.device import BlkDevice
from bridge.guest.ring import RunningRing
from bridge.guest.vhost_user.device_interface import RingSetup
from bridge.guest.virtio.chain import Chain
from bridge.spec.virtio_blk import (
    F_FLUSH,
    S_IOERR,
    S_OK,
    S_UNSUPP,
    T_FLUSH,
    T_IN,
)
from bridge.spec.virtqueue import F_EVENT_IDX, F_INDIRECT, F_RING_PACKED, F_VERSION_1
from tests.guest.vhost_user.backends import Running

BLOCK_BYTES = 512


@dataclass
class Planted:
    """What a device does wrong; each is asked where it applies."""

    features: Callable[[int], int] = lambda bits: bits
    space: Callable[[bytes], bytes] = lambda space: space
    ignores_offset: bool = False
    status: Callable[[Chain, int], int] = lambda chain, status: status
    used: Callable[[int], int] = lambda length: length
    done: Callable[[FaultyDevice, RunningRing, Chain], None] = lambda device, ring, chain: None
    begun: Callable[[FaultyDevice], None] = lambda device: None
    base: int = 0
    inflight_bytes: int | None = None
    starts: list[RingSetup] = field(default_factory=list)


class FaultyDevice(BlkDevice):
    """A device that is sound until something is planted."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.planted = Planted()
        self.sessions = 0
        """That got as far as SET_FEATURES."""
        self.batch = 0
        """Chains that were begun together last."""
        self._sound_start = self._engine.start
        self._engine.start = self._start  # type: ignore[method-assign]

    @property
    def taken_features(self) -> int:
        return self._features

    def start_of(self, ring: RunningRing) -> RingSetup:
        index = next(index for index, each in self._rings.items() if each is ring)
        return self._setups[index]

    def index_of(self, ring: RunningRing) -> int:
        return next(index for index, each in self._rings.items() if each is ring)

    def offered_features(self) -> int:
        return self.planted.features(super().offered_features())

    def set_features(self, features: int) -> None:
        self.sessions += 1
        super().set_features(features)

    def read_config(self, offset: int, size: int) -> bytes:
        space = self.planted.space(super().read_config(0, 512))
        offset = 0 if self.planted.ignores_offset else offset
        return space[offset : offset + size].ljust(size, b"\0")

    async def stop_ring(self, index: int) -> int:
        return await super().stop_ring(index) + self.planted.base

    def create_inflight(self, num_queues: int, queue_size: int) -> tuple[int, int]:
        fd, size_bytes = super().create_inflight(num_queues, queue_size)
        return fd, self.planted.inflight_bytes or size_bytes

    def _start(self, ring: RunningRing, chains: Sequence[Chain]) -> None:
        self.batch = len(chains)
        self.planted.begun(self)
        self._sound_start(_Between(self, ring), chains)  # type: ignore[arg-type]


class _Between:
    """The ring, as the engine sees it."""

    def __init__(self, device: FaultyDevice, ring: RunningRing) -> None:
        self._device = device
        self._ring = ring

    def complete(self, chain: Chain, status: int, length: int) -> None:
        planted = self._device.planted
        planted.done(self._device, self._ring, chain)
        self._ring.complete(chain, planted.status(chain, status), planted.used(length))


Plant = Callable[[Running, FaultyDevice], None]


def _fields(**planted: Any) -> Plant:
    return lambda _, device: device.planted.__dict__.update(planted)


def _patched(layout: str, offset: int, value: int) -> Callable[[bytes], bytes]:
    """The configuration space with one field changed."""

    def patch(space: bytes) -> bytes:
        changed = bytearray(space)
        struct.pack_into(layout, changed, offset, value)
        return bytes(changed)

    return patch


def _spoil(chain: Chain) -> None:
    """Change the data that a read brings."""
    for view in chain[4]:
        if len(view):
            view[0] ^= 0xFF


def _spoils(when: Callable[[FaultyDevice, RunningRing, Chain], bool]) -> Plant:
    def done(device: FaultyDevice, ring: RunningRing, chain: Chain) -> None:
        if chain[1] == T_IN and when(device, ring, chain):
            _spoil(chain)

    return _fields(done=done)


def _answers(status: int, instead: int) -> Plant:
    return _fields(status=lambda _, given: instead if given == status else given)


def _fails(kind: int) -> Plant:
    return _fields(status=lambda chain, given: S_IOERR if chain[1] == kind else given)


def _target(change: Callable[[Running, Request], bool]) -> Plant:
    """A disk that does something else where `change` says that it has done it."""

    def plant(backend: Running, _: FaultyDevice) -> None:
        sound = backend.target.execute

        def execute(request: Request) -> None:
            if change(backend, request):
                backend.target.turn.finish(request)
            else:
                sound(request)

        backend.target.execute = execute  # type: ignore[method-assign]

    return plant


def _ignores(op: int, every: int = 1) -> Plant:
    """A disk that answers and does nothing, every so many times."""
    seen = 0

    def change(_: Running, request: Request) -> bool:
        nonlocal seen
        seen += request.op == op
        return request.op == op and seen % every == 0

    return _target(change)


def _one_block_more(backend: Running, request: Request) -> bool:
    if request.op in (DISCARD, WRITE_ZEROES):
        end = request.offset + request.length
        backend.target.data[end : end + BLOCK_BYTES] = bytes(BLOCK_BYTES)
    return False


def _flush_loses(backend: Running, request: Request) -> bool:
    if request.op == FLUSH:
        backend.target.data[:BLOCK_BYTES] = bytes(BLOCK_BYTES)
    return False


def _reads_noise(_: Running, request: Request) -> bool:
    if request.op == READ:
        for buffer in request.buffers:
            buffer[:] = os.urandom(len(buffer))
    return request.op == READ


def _new_serial(device: FaultyDevice) -> None:
    device._engine._serial = os.urandom(10).hex().encode()


def _behind_the_status(device: FaultyDevice, ring: RunningRing, chain: Chain) -> None:
    if chain[5] is not None:
        chain[5][chain[6] + 1] = 0


def _second_piece(device: FaultyDevice, ring: RunningRing, chain: Chain) -> None:
    if chain[1] == T_IN and len(chain[4]) > 1:
        chain[4][1][0] ^= 0xFF


def _deaf(_: Running, device: FaultyDevice) -> None:
    """It hears kicks and never looks into its rings."""
    sound = device.start_ring

    def start_ring(index: int, setup: RingSetup) -> None:
        sound(index, setup)
        ring = device._rings[index]
        ring._loop.remove_poller(ring)

    device.start_ring = start_ring  # type: ignore[method-assign]


def _offers_more_later(_: Running, device: FaultyDevice) -> None:
    """What it refuses is not what it did not offer."""
    device.planted.features = lambda bits: bits | (1 << 41 if device.sessions else 0)


PLANTS: dict[str, Plant] = {
    "features_refused": _offers_more_later,
    "features_version": _fields(features=lambda bits: bits & ~F_VERSION_1),
    "features_flush": _fields(features=lambda bits: bits & ~F_FLUSH),
    "features_disk": _fields(space=_patched("<I", 20, 1000)),
    "features_limits": _fields(space=_patched("<H", 34, 0)),
    "features_parts": _fields(ignores_offset=True),
    "session_queues": _fields(space=_patched("<H", 34, 9)),
    "request_read": _target(_reads_noise),
    "request_range": _answers(S_IOERR, S_OK),
    "request_length": _answers(S_IOERR, S_OK),
    "request_type": _answers(S_UNSUPP, S_IOERR),
    "request_id": _fields(begun=_new_serial),
    "request_flush": _fails(T_FLUSH),
    "request_read_only": _answers(S_IOERR, S_OK),
    "request_ranges": _answers(S_IOERR, S_OK),
    "chain_framing": _fields(done=_second_piece),
    "chain_bounds": _fields(done=_behind_the_status),
    "used_length": _fields(used=lambda length: length + 100),
    "ring_indirect": _spoils(lambda device, *_: bool(device.taken_features & F_INDIRECT)),
    "ring_event_idx": _spoils(lambda device, *_: bool(device.taken_features & F_EVENT_IDX)),
    "ring_packed": _spoils(lambda device, *_: bool(device.taken_features & F_RING_PACKED)),
    "ring_sizes": _spoils(lambda device, ring, _: device.start_of(ring).size == 4),
    "ring_indexes": _spoils(lambda device, ring, _: device.start_of(ring).base > 65000),
    "ring_depth": _spoils(lambda device, *_: device.batch > 40),
    "ring_queues": _spoils(lambda device, ring, _: device.index_of(ring) == 1),
    "notify_spurious": _deaf,
    "malformed_chains": _answers(S_IOERR, S_OK),
    "session_stop": _fields(base=1),
    "session_reconnect": _fails(T_IN),
    "inflight_region": _fields(inflight_bytes=64),
    "inflight_reconnect": _spoils(lambda device, ring, _: device.start_of(ring).base > 0),
    "data_written": _ignores(WRITE),
    "data_model": _ignores(WRITE, every=10),
    "data_queues": _spoils(lambda device, ring, _: device.index_of(ring) == 2),
    "data_kept": _target(_flush_loses),
    "data_write_cache": _fields(space=_patched("<B", 32, 1)),
    "data_end": _answers(S_IOERR, S_OK),
    "data_zeroes": _ignores(WRITE_ZEROES),
    "data_discard": _target(_one_block_more),
    "data_flush": _fails(T_FLUSH),
}
"""By rule: makes a device that breaks it."""
