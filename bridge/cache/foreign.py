"""Did the export change without us, and which part of the cache may still be believed?

Clean blocks are copies: they are dropped when another host wrote. Dirty blocks never are.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from bridge.cache.busy_ranges import BusyRanges
from bridge.cache.common import Common
from bridge.cache.fetch import Fetcher
from bridge.cache.file.layout import BITS
from bridge.cache.sample import Sample, check_sample, compare
from bridge.datapath.request import Request
from bridge.datapath.turn import Outcome

_COUNT = 64
_THOROUGH_COUNT = 256
"""Blocks compared before dirty data goes out: a small cache wholly, and a few seconds at worst."""


class ForeignChanges:
    """What the owner of a cache asks and says about them."""

    def __init__(self, common: Common, busy_ranges: BusyRanges, fetcher: Fetcher) -> None:
        self.index = common.index
        self._common = common
        self._image = common.image
        self._busy_ranges = busy_ranges
        self._fetcher = fetcher
        self._samples = False
        """A sample is being compared, or about to be."""
        self._sample_asked: list[Callable[[int], None]] = []
        """Who is to be told of the next one."""

    def foreign_change(self, generation: int, written: int, identity: bytes) -> str:
        """Why the export is not what this cache left behind, "" if it is.

        The server counts its writable sessions: ours is `generation`, the last one that wrote was
        `written`. `identity` is the volume's, b"" where the server gives none.
        """
        header = self._image.header
        known = header.export_generation
        renamed = identity and header.export_identity and identity != header.export_identity
        if renamed or generation < known:
            return "the export is another volume now, of the same name"
        if written > known:
            return "another host wrote the export since"
        return ""

    def note_export(self, generation: int, written: int, identity: bytes) -> int:
        """Take the server's counters over: call it before serving, and after each reconnect
        before anything is sent again.

        Drops every clean block if there was a `foreign_change`; returns how many. The number is
        stored before this session can write anything.
        """
        dropped = self.drop_clean() if self.foreign_change(generation, written, identity) else 0
        header = self._image.header
        if (generation, identity) != (header.export_generation, header.export_identity):
            self._image.save_header(export_generation=generation, export_identity=identity)
        return dropped

    def check_sample(self, done: Callable[[int], None]) -> None:
        """Compare some clean cached blocks with the server; if any differs drop all clean blocks.
        `done(differences)`, -1 if the server did not answer.

        Later in this turn: after a reconnect what had no answer is sent again first, so that a
        server that hangs up on some of it is found out (see `bridge.server.suspects`). If a sample
        is being compared, its reads are sent again, too: the next one begins when it ends.
        """
        self._sample_asked.append(done)
        if not self._samples:
            self._samples = True
            self._common.turn.finish(Outcome(self._begin_sample))

    def _begin_sample(self, _: Outcome | None = None) -> None:
        asked, self._sample_asked = self._sample_asked, []
        check_sample(
            self,
            self._common.upstream,
            partial(self._sampled, asked),
            _COUNT,
            witness=self._witness,
            discarded=self._image.header.discarded,
        )

    def _sampled(self, asked: list[Callable[[int], None]], differing: int) -> None:
        self._samples = bool(self._sample_asked) and differing >= 0
        if self._samples:
            self._begin_sample()
        else:  # If the server answers nothing, it does not answer the next one either.
            asked, self._sample_asked = asked + self._sample_asked, []
        for done in asked:
            done(differing)

    def check_before_writing(self, done: Callable[[int], None]) -> None:
        """Before dirty data of an earlier run goes to the server: the same, and more thoroughly.

        Nothing is dropped, so that the next try finds the same. What differs is remembered
        in the file: the next sample, which is another one, has it too.
        """

        self._compare(self._common.upstream.submit, done, _THOROUGH_COUNT)

    def check_server(self, submit: Callable[[Request], None], done: Callable[[int], None]) -> None:
        """The same for the server that has just come back, to which `submit` leads: before anything
        goes there, and while the guest waits. What is being discarded proves nothing."""
        self._compare(submit, done, _COUNT, only_zeroes=False)

    def _compare(
        self,
        submit: Callable[[Request], None],
        done: Callable[[int], None],
        count: int,
        *,
        only_zeroes: bool = True,
    ) -> None:
        def compared(sample: Sample) -> None:
            # What differed before has not been looked at again, perhaps, if not all was.
            if sample.differing or not sample.partial:
                self._remember(sample.witness + 1 if sample.differing else 0)
            done(-1 if sample.unknown else sample.differing)

        compare(
            self.index,
            submit,
            compared,
            count,
            beside_dirty=True,
            witness=self._witness,
            discarded=self._image.header.discarded,
            only_zeroes=only_zeroes,
        )

    @property
    def _witness(self) -> int | None:
        witness = self._image.header.witness
        return witness - 1 if witness else None

    def _remember(self, witness: int) -> None:
        if witness != self._image.header.witness:
            self._image.save_header(witness=witness)

    def drop_clean(self) -> int:
        """Forget every clean block (another client changed the image); returns how many blocks.

        Fetches in flight are not filled in either. Dirty blocks stay.
        """
        self._common.turn.want()
        index = self.index
        self._remember(0)
        self._busy_ranges.nothing_older(self._common.durability.epoch)
        before = index.valid_blocks
        for granule in list(self._fetcher.fetching):
            self._fetcher.overtaken(granule, BITS)
        for slot in index.used_slots():
            clean = index.valid(slot) & ~index.dirty(slot)
            if clean:
                self._common.slots.drop(slot, clean)
        return before - index.valid_blocks
