"""Rules about what the device says of itself: features, configuration space, number of queues."""

from __future__ import annotations

from bridge.errors import ConnectionLost
from bridge.guest.vhost_user.messages import (
    F_PROTOCOL_FEATURES,
    P_CONFIG,
    P_MQ,
    P_REPLY_ACK,
    MessageType,
)
from bridge.peers.frontend import FrontEnd, Refused
from bridge.probe.rules import SPACE_BYTES, Broken, Device, NotOffered, Rule, rule
from bridge.spec.virtio_blk import (
    F_BLK_SIZE,
    F_CONFIG_WCE,
    F_DISCARD,
    F_FLUSH,
    F_MQ,
    F_SEG_MAX,
    F_WRITE_ZEROES,
)
from bridge.spec.virtqueue import F_VERSION_1
from bridge.units import SECTOR_BYTES

RULES: list[Rule] = []


@rule(RULES, "features_version", "VERSION_1, PROTOCOL_FEATURES and CONFIG are offered")
async def _version(device: Device) -> None:
    if not device.features & F_VERSION_1:
        raise Broken("VERSION_1 is not offered: this is a legacy device")
    if not device.features & F_PROTOCOL_FEATURES:
        raise Broken("PROTOCOL_FEATURES is not offered: QEMU could not read the configuration")
    if not device.protocol_features & P_CONFIG:
        raise Broken("the protocol feature CONFIG is not offered")


@rule(RULES, "features_flush", "a device that offers CONFIG_WCE offers FLUSH")
async def _flush(device: Device) -> None:
    device.need(F_CONFIG_WCE, "CONFIG_WCE")
    if not device.features & F_FLUSH:
        raise Broken("CONFIG_WCE is offered without FLUSH")


@rule(RULES, "features_refused", "features that were not offered are refused")
async def _refused(device: Device) -> None:
    device.need_protocol(P_REPLY_ACK, "REPLY_ACK")
    missing = next(1 << bit for bit in range(41, 64) if not device.features >> bit & 1)
    with await FrontEnd.connect(device.path, timeout_s=20.0) as front_end:
        await front_end.negotiate(device.features)
        try:
            await front_end.set_features(F_VERSION_1 | F_PROTOCOL_FEATURES | missing)
        except (Refused, ConnectionLost):
            return
    raise Broken(f"SET_FEATURES with bit {missing.bit_length() - 1} was accepted")


@rule(RULES, "features_disk", "the size is whole blocks, and the block size a power of two")
async def _disk(device: Device) -> None:
    config = device.config
    if not config.capacity_sectors:
        raise Broken("the disk has no sector")
    if device.features & F_BLK_SIZE:
        block_bytes = config.block_size_bytes
        if block_bytes < SECTOR_BYTES or block_bytes & (block_bytes - 1):
            raise Broken(f"the block size is {block_bytes}")
        if config.capacity_sectors * SECTOR_BYTES % block_bytes:
            raise Broken(f"{config.capacity_sectors} sectors are no whole blocks of {block_bytes}")


@rule(RULES, "features_limits", "a feature that has limits or counts says what they are")
async def _limits(device: Device) -> None:
    config = device.config
    named = {
        "num_queues": (F_MQ, config.num_queues),
        "seg_max": (F_SEG_MAX, config.seg_max),
        "max_discard_sectors": (F_DISCARD, config.max_discard_sectors),
        "max_discard_seg": (F_DISCARD, config.max_discard_segments),
        "max_write_zeroes_sectors": (F_WRITE_ZEROES, config.max_write_zeroes_sectors),
        "max_write_zeroes_seg": (F_WRITE_ZEROES, config.max_write_zeroes_segments),
    }
    for name, (feature, value) in named.items():
        if device.features & feature and not value:
            raise Broken(f"{name} is 0 although its feature is offered")
    if device.features & F_CONFIG_WCE and config.writeback > 1:
        raise Broken(f"writeback is {config.writeback}")


@rule(RULES, "features_parts", "a part of the configuration space is the same as in the whole")
async def _parts(device: Device) -> None:
    with await FrontEnd.connect(device.path, timeout_s=20.0) as front_end:
        await front_end.negotiate(device.features)
        for offset, size in ((0, 8), (20, 4), (32, 1), (34, 2), (0, 40)):
            found = await front_end.get_config(offset, size)
            if found != device.space[offset : offset + size]:
                raise Broken(f"{size} bytes at {offset} differ from those within {SPACE_BYTES}")


@rule(RULES, "session_queues", "GET_QUEUE_NUM allows as many queues as num_queues says")
async def _queues(device: Device) -> None:
    device.need_protocol(P_MQ, "the protocol feature MQ")
    if not device.features & F_MQ:
        raise NotOffered("VIRTIO_BLK_F_MQ is not offered")
    with await FrontEnd.connect(device.path, timeout_s=20.0) as front_end:
        await front_end.negotiate(device.features)
        allowed = await front_end.get_u64(MessageType.GET_QUEUE_NUM)
    if allowed < device.config.num_queues:
        raise Broken(f"num_queues is {device.config.num_queues}, GET_QUEUE_NUM says {allowed}")
