"""The rows of `./run bench full`: what is asked of both sides, and what ratio is required."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

KIB: Final = 1 << 10
MIB: Final = 1 << 20
READ, WRITE, MIXED = "read", "write", "mixed"
"""MIXED is 70 reads to 30 writes."""
QEMU_IMG, FRONT_END = "qemu-img", "front-end"
"""`qemu-img bench` over libblkio, which knows strides and one queue; `nbd-bridge bench`,
which knows random places, mixtures and several queues, and costs more."""
NO_CACHE, WARM, COLD = "", "warm", "cold"


@dataclass(frozen=True)
class Server:
    """What both sides are clients of: nbdkit."""

    delay_ms: float = 0.0
    """0: nbdkit's memory plugin. Otherwise every command takes so much more."""
    transport: str = "unix"
    """Or tcp, or tls."""


@dataclass(frozen=True)
class Row:
    """One row of the table."""

    group: str
    name: str
    kind: str
    block_bytes: int
    depth: int
    """Requests in flight, per queue and disk."""
    count: int
    """Requests of one measurement, per disk."""
    required: float
    """The ratio below which it is a defect."""
    step_blocks: int = 5
    """From one request to the next; 1: sequential; 0: random places."""
    flush_every: int = 0
    generator: str = QEMU_IMG
    queues: int = 1
    disks: int = 1
    server: Server = Server()
    cache: str = NO_CACHE
    beside_null: bool = False
    """The other side has no storage at all: the limit of its engine."""


def _blocks(size_bytes: int) -> str:
    return f"{size_bytes // MIB} MiB" if size_bytes >= MIB else f"{size_bytes // KIB} KiB"


def _row(
    group: str,
    kind: str,
    block_bytes: int,
    depth: int,
    count: int,
    required: float = 0.95,
    **more: object,
) -> Row:
    step = more.get("step_blocks", 5)
    order = {0: "random ", 1: "sequential "}.get(step, "")  # type: ignore[call-overload]
    cache = f"{more['cache']} " if "cache" in more else ""
    name = f"{cache}{order}{_blocks(block_bytes)} {kind}, depth {depth}"
    if more.get("flush_every"):
        name += ", each flushed"
    if more.get("beside_null"):
        name += ", beside null-co"
    for what in ("queues", "disks"):
        if what in more:
            name += f", {more[what]} {what}"
    return Row(group, name, kind, block_bytes, depth, count, required, **more)  # type: ignore[arg-type]


def _engine() -> list[Row]:
    rows = [
        _row("engine", READ, 4 * KIB, 1, 20_000, 1.3),
        _row("engine", READ, 4 * KIB, 4, 60_000),
        _row("engine", READ, 4 * KIB, 32, 120_000, 1.8),
        _row("engine", READ, 4 * KIB, 128, 120_000),
        _row("engine", WRITE, 4 * KIB, 1, 20_000, 1.4),
        _row("engine", WRITE, 4 * KIB, 4, 60_000),
        _row("engine", WRITE, 4 * KIB, 32, 120_000, 2.0),
        _row("engine", WRITE, 4 * KIB, 128, 120_000),
        _row("engine", READ, 4 * KIB, 32, 120_000, 2.5, step_blocks=1),
        _row("engine", WRITE, 4 * KIB, 32, 120_000, 2.5, step_blocks=1),
    ]
    for kind in (READ, WRITE):
        rows += [
            _row("engine", kind, 16 * KIB, 32, 60_000),
            _row("engine", kind, 128 * KIB, 8, 15_000),
            _row("engine", kind, MIB, 8, 3_000, 1.0),
        ]
    for kind in (READ, WRITE, MIXED):
        rows.append(_row("engine", kind, 4 * KIB, 32, 40_000, step_blocks=0, generator=FRONT_END))
    rows.append(
        _row("engine", MIXED, 4 * KIB, 32, 40_000, step_blocks=0, generator=FRONT_END, queues=4)
    )
    rows += [_row("engine", kind, 4 * KIB, 32, 40_000, disks=4) for kind in (READ, WRITE)]
    return rows


def _transports() -> list[Row]:
    return [
        _row(transport, kind, block_bytes, depth, count, server=Server(transport=transport))
        for transport in ("tcp", "tls")
        for kind, block_bytes, depth, count in (
            (READ, 4 * KIB, 1, 15_000),
            (READ, 4 * KIB, 32, 80_000),
            (WRITE, 4 * KIB, 32, 80_000),
            (READ, MIB, 8, 1_500),
            (WRITE, MIB, 8, 1_500),
        )
    ]


_COLD_READS: Final = 2_000
"""Of 128 KiB: not more than the disk has. What is read once more is no cold read."""


def _cache() -> list[Row]:
    return [
        _row("cache", READ, 4 * KIB, 32, 200_000, 9, cache=WARM),
        _row("cache", READ, 4 * KIB, 32, 200_000, 0.9, cache=WARM, beside_null=True),
        _row("cache", READ, 4 * KIB, 1, 40_000, 6, cache=WARM),
        _row("cache", READ, 4 * KIB, 1, 40_000, 3, cache=WARM, beside_null=True),
        _row("cache", WRITE, 4 * KIB, 32, 150_000, 6, cache=WARM),
        _row("cache", WRITE, 4 * KIB, 1, 40_000, 5, cache=WARM),
        _row("cache", MIXED, 4 * KIB, 32, 40_000, step_blocks=0, generator=FRONT_END, cache=WARM),
        _row("cache", READ, 128 * KIB, 8, _COLD_READS, step_blocks=1, cache=COLD),
    ]


def _far() -> list[Row]:
    rows = []
    for delay_ms, count, required in (
        (0.2, 3_000, (20, 20, 3, 1.3)),
        (1, 1_000, (50, 50, 6, 1.7)),
        (10, 150, (50, 50, 6, 1.7)),
    ):
        group, server = f"far, {delay_ms:g} ms", Server(delay_ms=delay_ms)
        read, write, cold, flushed = required
        reads = min(count, _COLD_READS)
        rows += [
            _row(group, READ, 4 * KIB, 1, count, read, cache=WARM, server=server),
            _row(group, WRITE, 4 * KIB, 1, count, write, cache=WARM, server=server),
            _row(group, READ, 128 * KIB, 1, reads, cold, cache=COLD, step_blocks=1, server=server),
            _row(
                group, WRITE, 4 * KIB, 1, count, flushed, cache=WARM, flush_every=1, server=server
            ),
        ]
    return rows


ROWS: Final = (*_engine(), *_transports(), *_cache(), *_far())
