"""What one program is about, and which steps it takes: all of it drawn from its seed."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import Final

from bridge.cache.cache_options import OFF, WRITEBACK, WRITETHROUGH
from bridge.peers.nbd_server_settings import DEFAULT_FLAGS
from bridge.spec.nbd import TransmissionFlags as F
from bridge.spec.virtio_blk import F_CONFIG_WCE, F_FLUSH

VERSION: Final = 4
"""Of the programs: raised whenever a seed means another program than before."""


class OtherVersion(ValueError):
    """A seed of another version of the simulator means another program here."""


@dataclass(frozen=True)
class Seed:
    """One program; with `kept`, only these of its steps (what shrinking has left)."""

    number: int
    kept: tuple[int, ...] | None = None

    def __str__(self) -> str:
        steps = "" if self.kept is None else ":" + ",".join(map(str, self.kept))
        return f"sim{VERSION}:{self.number}{steps}"

    @classmethod
    def parse(cls, text: str) -> Seed:
        """Of the printed form, or of a number. Raises OtherVersion, or ValueError."""
        if text.isdecimal():
            return cls(int(text))
        version, _, rest = text.partition(":")
        if not version.startswith("sim") or not version[3:].isdecimal():
            raise ValueError(f"{text!r} is no seed: it looks like sim{VERSION}:17")
        if version != f"sim{VERSION}":
            raise OtherVersion(
                f"{text} is a seed of version {version[3:]}, this is version {VERSION}: check out "
                "the commit that printed it"
            )
        number, has_steps, steps = rest.partition(":")
        kept = tuple(map(int, filter(None, steps.split(","))))
        return cls(int(number), kept if has_steps else None)


class Config:
    """Guest, bridge, server and cache of one program."""

    def __init__(self, rng: Random) -> None:
        self.mode = rng.choice((OFF, OFF, WRITEBACK, WRITEBACK, WRITETHROUGH))
        self.plugin = rng.random() < 0.5
        self.sectors = rng.choice((40, 97, 160))
        self.queues = rng.choice((1, 1, 2, 3))
        self.packed = rng.random() < 0.4
        self.event_idx = rng.random() < 0.7
        self.indirect = rng.random() < 0.7
        self.keeps_in_flight = rng.random() < 0.8
        self.features_wanted = (1 << 64) - 1
        if rng.random() < 0.1:
            self.features_wanted &= ~(F_FLUSH | F_CONFIG_WCE)
        self.min_block = rng.choice((1, 512, 512, 1024, 4096)) if rng.random() < 0.5 else 1
        if self.min_block > 512:
            self.sectors = -(-self.sectors * 512 // self.min_block) * self.min_block // 512
        flags = DEFAULT_FLAGS & ~(F.SEND_CACHE | F.SEND_FAST_ZERO)
        self.structured = rng.random() < 0.5
        self.extended = self.structured and rng.random() < 0.5
        if not self.structured:
            flags &= ~F.SEND_DF
        if not self.plugin:
            for flag, chance in (
                (F.SEND_FUA, 0.35), (F.CAN_MULTI_CONN, 0.5),
                (F.SEND_TRIM, 0.2), (F.SEND_WRITE_ZEROES, 0.2),
            ):  # fmt: skip
                if rng.random() < chance:
                    flags &= ~flag
        self.flags = flags
        self.connections = rng.choice((1, 1, 2, 3))
        self.compiled = rng.random() < 0.5
        self.flush_interval_s = rng.choice((0, 5, 60))
        self.request_timeout_s = rng.choice((5, 60, 60))
        self.reconnect_timeout_s = rng.choice((0, 0, 0, 10))
        self.stop_timeout_s = rng.choice((2, 8, 30))
        self.drain_timeout_s = rng.choice((2, 30))
        self.grace_s = 5.0
        self.granule = rng.choice((2048, 4096, 16384))
        self.block = max(rng.choice((512, 1024)), self.min_block)
        if self.granule < self.block:
            self.granule = self.block
        if self.granule > 16 * self.block:
            self.granule = 16 * self.block
        self.slots = rng.choice((3, 4, 6, 12, 64))
        self.cold_ratio = rng.choice((0.0, 0.0, 0.3))
        self.cache_options = {
            "writeback_age_s": rng.choice((1, 5)),
            "dirty_background_ratio": rng.choice((0.1, 0.5)),
            "dirty_flush_ratio": rng.choice((0.3, 0.9)),
            "dirty_hard_ratio": rng.choice((0.5, 0.9, 1.0)),
            "roomy_ratios": rng.choice((None, (0.5, 0.9, 1.0))),
            "writeback_run_bytes": max(self.block, rng.choice((1024, 8192))),
            "writeback_requests": rng.choice((1, 3, 32)),
            "writeback_bytes": rng.choice((4096, 65536)),
            "fua_granules": rng.choice((0, 2, 64)),
            "fetch_run_bytes": max(self.block, rng.choice((1024, 8192))),
            "fetch_bytes": rng.choice((8192, 65536)),
            "readahead_bytes": rng.choice((0, 8192)),
            "bypass_bytes": rng.choice((0, 2048)),
            "bypass_after_bytes": rng.choice((0, 4096)),
            "exclusive_run_bytes": rng.choice((4096, 65536)),
            "zero_copy_bytes": rng.choice((0, 4096)),
            "cold_bytes": rng.choice((1024, 65536)),
        }
        self.service_s = rng.choice((0.0, 0.0002, 0.01, 0.3))
        """How long the server takes for a command, at most; its reply as long again."""
        self.steps = rng.choice((15, 30, 30, 60))
        self.migrates = self.plugin and rng.random() < 0.5
        """Bridges of two hosts are in one session."""
        self.filtered = self.plugin and not self.migrates and rng.random() < 0.35
        """nbdkit has a filter above the plugin, which holds what it has acknowledged until a flush,
        and loses it with its process."""
        if not self.plugin and not flags & F.SEND_FUA and self.mode == OFF and rng.random() < 0.5:
            # Every write is to be durable, which takes a write and a flush.
            self.features_wanted &= ~(F_FLUSH | F_CONFIG_WCE)
        self.flushes = self.plugin or rng.random() >= 0.12
        """The server can flush. If not, all that it answers is durable."""
        if not self.flushes:
            self.flags &= ~(F.SEND_FLUSH | F.SEND_FUA)
        self.read_only = rng.random() < 0.04
        if self.read_only:
            self.mode = OFF
            self.flags |= F.READ_ONLY * (rng.random() < 0.5)

    @property
    def splits_durable_writes(self) -> bool:
        """Each write of the guest is a write and a flush at the server."""
        is_durable = self.features_wanted != (1 << 64) - 1
        return is_durable and self.mode == OFF and self.flushes and not self.flags & F.SEND_FUA

    @property
    def kinds(self) -> list[str]:
        """What is unusual about all of the program, for the counts."""
        return [
            name
            for name, yes in (
                *(("read-only disks", self.read_only), ("filters", self.filtered)),
                ("servers that cannot flush", not self.flushes),
            )
            if yes
        ]

    def __str__(self) -> str:
        server = "plugin" if self.plugin else "foreign server"
        rings = f"{self.queues} {'packed' if self.packed else 'split'} queues"
        extras = [
            name
            for name, yes in (
                *(("in-flight region", self.keeps_in_flight), ("compiled", self.compiled)),
                *(("FUA", F.SEND_FUA & self.flags), ("multi-conn", F.CAN_MULTI_CONN & self.flags)),
                ("no flush feature", self.features_wanted != (1 << 64) - 1),
                *(("migrates", self.migrates), ("a filter", self.filtered)),
                *(("read-only", self.read_only), ("cannot flush", not self.flushes)),
            )
            if yes
        ]
        return (
            f"cache {self.mode}, {server}, {self.connections} connections, {rings}, "
            f"{self.sectors} sectors, blocks of {self.min_block}, {', '.join(extras)}, "
            f"reconnect timeout {self.reconnect_timeout_s}, flush interval {self.flush_interval_s}"
        )


STEPS: Final = {
    "burst": 34,
    "mixed": 10,
    "flush": 8,
    "wait": 12,
    "wait long": 3,
    "cut": 6,
    "cut one": 2,
    "silence": 2,
    "refuse": 2,
    "hang": 1,
    "server dies": 3,
    "server loses power": 3,
    "flush fails": 2,
    "no space": 2,
    "hang up on": 1,
    "stall": 2,
    "kill": 4,
    "kill at line": 6,
    "terminate": 2,
    "host loses power": 1,
    "stop ring": 3,
    "stop all": 2,
    "start": 4,
    "reset": 1,
    "write cache": 3,
    "front-end leaves": 1,
    "grow": 1,
    "everything at once": 2,
    "cache flush": 1,
    "migrate": 7,
    "cache disk full": 2,
    "resize": 1,
    "other host writes": 3,
    "other host takes over": 2,
}
"""The steps of a program, and how often each is taken."""

AMID_WRITES: Final = ("power lost amid writes", "cut amid writes", "flush fails amid writes")
"""Steps of programs without a cache, over a foreign server: the moment counts."""


DAMAGES: Final = ("cache file damaged", "cache file removed")
"""What befalls the cache file, in some programs, beside their other steps."""
_DAMAGED: Final = 0.04


def script(seed: Seed) -> tuple[Config, list[tuple[int, str, int]]]:
    """The program of a seed: its config, and its steps (number, name, a seed of its own)."""
    rng = Random(f"{VERSION} {seed.number}")
    config = Config(rng)
    names, weights = list(STEPS), list(STEPS.values())
    chosen = rng.choices(names, weights, k=config.steps)
    if config.splits_durable_writes:
        chosen = [AMID_WRITES[0] if rng.random() < 0.2 else name for name in chosen]
    elif config.mode == OFF and not config.plugin and not config.read_only:
        chosen = [rng.choice(AMID_WRITES) if rng.random() < 0.15 else name for name in chosen]
    steps = [(at, name, rng.getrandbits(32)) for at, name in enumerate(chosen)]
    # (From a generator of its own: the other steps, and their numbers, are what they were.)
    later = Random(f"damage {seed.number}")
    if config.mode != OFF and not config.migrates and later.random() < _DAMAGED:
        step = (len(steps), later.choice(DAMAGES), later.getrandbits(32))
        steps.insert(later.randrange(len(steps)), step)
    if seed.kept is not None:
        steps = [step for step in steps if step[0] in seed.kept]
    return config, steps
