"""`bench`: the load is the one that was asked for, and its figures are true."""

from __future__ import annotations

import json
import random
import subprocess
from errno import EIO
from itertools import count
from pathlib import Path

import pytest
import trio

from bridge.datapath.request import FLUSH, READ, WRITE
from bridge.errors import ConfigError, ConnectionLost
from bridge.probe.bench import MIXED, PATTERNS, RANDREAD, READ_SHARE, Load, bench
from bridge.probe.bench import READ as SEQUENTIAL_READ
from bridge.probe.bench import WRITE as SEQUENTIAL_WRITE
from bridge.probe.latencies import Latencies
from tests.guest.vhost_user.backends import running_backend
from tests.processes import bridge_argv
from tests.tools import until

SHORT_S = 0.2


@pytest.fixture(autouse=True)
def _own_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A millisecond passes with each look: a run is as long on a busy machine."""
    looks = count(step=1_000_000)
    monkeypatch.setattr("bridge.probe.bench.perf_counter_ns", lambda: next(looks))


@pytest.mark.parametrize("scale", [1, 31, 33, 1000, 10**6, 10**10])
def test_quantiles_are_at_most_3_percent_above_the_true_ones(scale: int) -> None:
    chance = random.Random(scale)
    values = [1 + int(chance.expovariate(1) * scale) for _ in range(2000)]
    latencies = Latencies()
    for each in values:
        latencies.add(each)
    values.sort()

    for share in (0.01, 0.5, 0.95, 0.99, 0.999, 1.0):
        true = values[round(share * len(values)) - 1]
        assert true <= latencies.quantile_ns(share) <= true * 1.0313
    assert latencies.mean_ns == pytest.approx(sum(values) / len(values))
    assert latencies.max_ns == values[-1]


def test_merged_latencies_are_those_of_both() -> None:
    one, other = Latencies(), Latencies()
    one.add(5)
    other.add(7)
    other.add(9)
    one.merge(other)

    assert (one.count, one.mean_ns, one.max_ns, one.quantile_ns(0.5)) == (3, 7, 9, 7)
    assert Latencies().quantile_ns(0.5) == 0


@pytest.mark.parametrize("pattern", PATTERNS)
async def test_load_is_what_was_asked_for(directory: Path, pattern: str) -> None:
    load = Load(pattern=pattern, block_bytes=8192, depth=4, queues=2, runtime_s=SHORT_S)
    async with running_backend(directory) as backend:
        result = await bench(str(backend.path), load)

    seen = backend.target.seen
    total = sum(each.latencies.count for each in result.kinds.values())
    assert total == len(seen) > 0
    assert {length for _, _, length in seen} == {8192}
    assert all(offset % 8192 == 0 and offset + 8192 <= 16 << 20 for _, offset, _ in seen)
    assert {op for op, _, _ in seen} == {
        "mixed": {READ, WRITE},
        "read": {READ},
        "randread": {READ},
        "write": {WRITE},
        "randwrite": {WRITE},
    }[pattern]
    if pattern == MIXED:
        assert abs(result.kinds["read"].latencies.count / total - READ_SHARE) < 0.2
    if pattern in (SEQUENTIAL_READ, SEQUENTIAL_WRITE):
        halves = [[o for _, o, _ in seen if o // (8 << 20) == half] for half in (0, 1)]
        for half, offsets in enumerate(halves):
            assert offsets[:3] == [(half << 23) + step * 8192 for step in range(3)]


async def test_flushes_come_as_often_as_they_were_asked_for(directory: Path) -> None:
    load = Load(pattern="randwrite", depth=4, runtime_s=SHORT_S, flush_every=10)
    async with running_backend(directory) as backend:
        result = await bench(str(backend.path), load)

    ops = [op for op, *_ in backend.target.seen]
    assert [index for index, op in enumerate(ops) if op == FLUSH] == list(range(10, len(ops), 11))
    assert result.kinds["flush"].latencies.count == ops.count(FLUSH) > 1
    assert result.kinds["write"].latencies.count == ops.count(WRITE)


async def test_errors_are_counted_and_move_no_bytes(directory: Path) -> None:
    async with running_backend(directory) as backend:
        backend.target.error = EIO
        result = await bench(str(backend.path), Load(runtime_s=SHORT_S))

    read = result.kinds["read"]
    assert read.errors == read.latencies.count > 0
    assert read.moved_bytes == 0


async def test_device_that_hangs_up_ends_the_run(directory: Path) -> None:
    async with running_backend(directory) as backend, trio.open_nursery() as nursery:

        async def hang_up() -> None:
            await until(lambda: backend.target.seen)
            backend.scope.cancel()

        nursery.start_soon(hang_up)
        with pytest.raises(BaseExceptionGroup) as caught:
            await bench(str(backend.path), Load(runtime_s=600))
    assert caught.group_contains(ConnectionLost, match="hung up")


@pytest.mark.parametrize(
    ("load", "geometry", "says"),
    [
        (Load(queues=9), {}, "device offers 4"),
        (Load(block_bytes=512), {"block_size_bytes": 4096}, "no multiple"),
        (Load(pattern="write"), {"read_only": True}, "read-only"),
        (Load(block_bytes=8 << 20, queues=4, depth=1), {}, "less than one block"),
    ],
)
async def test_load_that_the_device_cannot_have_is_refused(
    directory: Path, load: Load, geometry: dict[str, object], says: str
) -> None:
    async with running_backend(directory, geometry=geometry) as backend:
        with pytest.raises(ConfigError, match=says):
            await bench(str(backend.path), load)


async def run(*arguments: str) -> subprocess.CompletedProcess[bytes]:
    return await trio.run_process(
        bridge_argv("bench", *arguments), capture_stdout=True, capture_stderr=True, check=False
    )


async def test_command_writes_only_when_told_to(directory: Path) -> None:
    async with running_backend(directory) as backend:
        path = str(backend.path)
        refused = await run("--rw", "randwrite", "--runtime", "0.2", path)
        assert refused.returncode == 2
        assert b"--destructive" in refused.stderr
        assert not backend.target.seen
        done = await run("--rw", "randwrite", "--runtime", "0.2", "--destructive", "--json", path)
        found = json.loads(done.stdout)
        assert found["requests"]["write"]["count"] == len(backend.target.seen) > 0
        assert found["requests"]["write"]["p50_s"] <= found["requests"]["write"]["p99.9_s"]
        done = await run("--rw", RANDREAD, "--runtime", "0.2", path)
        lines = done.stdout.decode().splitlines()
    assert lines[1].split() == [
        *("IOPS", "MB/s", "mean", "p50", "p95", "p99", "p99.9", "max", "errors"),
    ]
    assert lines[2].startswith("read ")
    assert lines[2].endswith(" 0")


async def test_command_without_a_device_says_so(directory: Path) -> None:
    done = await run(str(directory / "none.sock"))

    assert done.returncode == 1
    assert done.stderr.decode().count("\n") == 1
    assert "none.sock: No such file" in done.stderr.decode()
