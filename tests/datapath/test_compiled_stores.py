"""The compiled core dies after any of its stores: the same as `test_usual_stores`.

Built for this test it calls back after every store that outlives a process. What shared memory
holds then is kept, and for each of these moments a process follows that finds just that.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bridge.datapath.engine import Engine
from bridge.datapath.engine_names import COMPILED
from bridge.datapath.turn import Turn
from tests.cache.fakes import BLOCK, GRANULE, Rig
from tests.datapath.loopback import Loopback, at_hand
from tests.datapath.test_usual_chains import IMAGE_BYTES, OUT, Chains, spread
from tests.datapath.test_usual_stores import Ring, _Owner, serve_the_rest
from tests.guest.virtio.dying import Life

_NATIVE = Path(__file__).parent.parent.parent / "bridge" / "datapath" / "native"


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> Any:
    compiler = shutil.which("gcc") or shutil.which("clang")
    include = Path(sysconfig.get_paths()["include"])
    if compiler is None or not (include / "Python.h").exists():
        pytest.skip("no C compiler, or no headers of Python")
    library = tmp_path_factory.mktemp("native") / "_native.so"
    options = ["-std=c99", "-O1", "-shared", "-fPIC", "-D_GNU_SOURCE", "-DDP_TEST_STORES"]
    sources = sorted(str(each) for each in _NATIVE.glob("*.c"))
    subprocess.run([compiler, *options, f"-I{include}", *sources, "-o", str(library)], check=True)
    spec = importlib.util.spec_from_file_location("_native", library)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def native_engine(native: Any) -> Engine:
    return Engine(
        *(COMPILED, native.take_hits, native.take_commands, native.answers, native.publish)
    )


class _Moment:
    """What shared memory and the disk hold."""

    def __init__(self, ring: Ring) -> None:
        self.shared, self.region = bytes(ring.guest.shared), bytes(ring.region)
        self.image = bytes(ring.image)

    def return_to(self, ring: Ring) -> None:
        ring.guest.shared[:] = self.shared
        ring.region[:] = self.region
        ring.image[:] = self.image


def _hits(ring: Ring, engine: Engine) -> None:
    """Two batches, served from a cache."""
    queue = ring.queue(Life())
    cache = at_hand(ring.image)
    assert engine.take_hits(queue, ring.disk, cache) == (1, 2)
    engine.publish(queue)
    ring.add()
    assert engine.take_hits(queue, ring.disk, cache) == (1, 0)
    engine.publish(queue)


def _commands(ring: Ring, engine: Engine) -> None:
    """Two batches, sent to a server; answered in three, and in another order."""
    queue = ring.queue(Life())
    server = Loopback(Turn(), ring.image, late=True, engine=engine)
    assert server.rows.enter(queue, _Owner())

    def take() -> None:
        arguments = queue, ring.disk, server.route, server.transmission, server.rows
        assert sum(engine.take_commands(*arguments))

    take()
    server._flush()
    engine.publish(queue)
    ring.add()
    take()
    server._flush()
    engine.publish(queue)
    while queue.in_flight:
        server._answer()
    engine.publish(queue)
    assert server.rows.merged_total == (0 if ring.only is None else 2)


class _PlainRing(Ring):
    """Its shared memory is only memory, as compiled code takes it."""

    def queue(self, life: Life) -> Any:
        life.watch = lambda view: view  # type: ignore[method-assign]
        return super().queue(life)


class _Reads(_PlainRing):
    only = 0


class _Writes(_PlainRing):
    only = 1


@pytest.mark.parametrize("base", [0, 65533])
@pytest.mark.parametrize(
    ("life_of_a_process", "kind"),
    [(_hits, _PlainRing), (_commands, _PlainRing), (_commands, _Reads), (_commands, _Writes)],
)
def test_death_after_any_compiled_store_loses_nothing_and_repeats_no_answer(
    native: Any,
    life_of_a_process: Callable[[Ring, Engine], None],
    kind: type[_PlainRing],
    base: int,
) -> None:
    ring = kind(base)
    for _ in range(3):
        ring.add()
    moments: list[tuple[int, _Moment]] = []
    native.on_store(lambda: moments.append((ring.n_tokens, _Moment(ring))))
    life_of_a_process(ring, native_engine(native))
    assert len(moments) > 30
    for number, (n_tokens, moment) in enumerate(moments):
        later = kind(base)
        for _ in range(n_tokens):
            later.add()
        moment.return_to(later)
        answered = later.poll()
        for token in answered:
            assert later.done(token), (number, "answered, and not done")
        queue = later.start(Life())
        serve_the_rest(later, queue)
        answered += later.poll()
        assert sorted(answered) == list(range(1, n_tokens + 1)), number
        assert queue.in_flight == 0
        assert all(map(later.done, answered)), number


@pytest.mark.parametrize("there_blocks", [0, 7, 40], ids=["absent", "partly there", "clean"])
def test_death_after_any_compiled_store_leaves_a_cache_file_that_says_what_the_server_lacks(
    native: Any, there_blocks: int
) -> None:
    """A write of many segments, over two granules of a cache, to blocks that are clean, absent, or
    both: whatever differs from the server is marked dirty, at every moment."""
    rig, chains = Rig(granules=IMAGE_BYTES // GRANULE), Chains()
    rig.server.image[:] = chains.image
    for block in range(there_blocks):
        rig.read(BLOCK * block, BLOCK)
    first, n_blocks = 3, 30
    data = spread(n_blocks * 2, BLOCK // 2)
    for address, length in data:
        chains.rig.write(address, bytes([0xA5]) * length)
    chains.put(chains.chain(OUT, first * BLOCK // 512, data), indirect=True)
    index = rig.cache.index
    differed = moments = 0

    def died() -> None:
        nonlocal differed, moments
        moments += 1
        for granule in range(3):
            slot = index.find(granule)
            for block in range(GRANULE // BLOCK if slot else 0):
                at = slot * GRANULE + BLOCK * block
                here, there = index.data[at : at + BLOCK], granule * GRANULE + BLOCK * block
                if index.valid(slot) >> block & 1 and here != chains.image[there : there + BLOCK]:
                    assert index.dirty(slot) >> block & 1, (moments, granule, block)
                    differed += 1

    native.on_store(died)
    served = native_engine(native).take_hits(chains.queue, chains.disk, rig.cache.hits.resident)
    died()
    assert served == (0, 1)
    assert differed
    assert chains.rig.read(chains.status, 1) == b"\0"
    assert rig.flush() == 0
    written = rig.server.image[first * BLOCK : (first + n_blocks) * BLOCK]
    assert written == bytes([0xA5]) * (n_blocks * BLOCK)
