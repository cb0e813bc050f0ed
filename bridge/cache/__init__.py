"""The local cache: a memory-mapped file between the guest and the server.

Life of a block: absent → clean ⇄ dirty → written (the server replied, not flushed) → clean.

- `layout`: what is on the file's first pages, and how it is checked; `file`: opening, locking,
  preallocating, mapping and closing one; `options`: the limits.
- `index`: granule → slot, and the bits of every block, in flat arrays; `eviction`: which clean
  granule goes when room is needed; `slots`: both in step.
- `cache`: the `Target` that joins everything; hits are served inside `submit()`.
- `reads`, `fetch`, `readahead`: reads that are no hit; `cold`: blocks that left the page cache.
- `store`: guest writes into the cache, and when each is complete.
- `writeback`, `ticket`, `flush`: dirty blocks to the server, those who wait for that, and the
  barrier after it.
- `ranges`, `exclusive`: discard and write-zeroes, ordered against everything in flight.
- `sample`: did somebody else write the image? `inspect`, `warm`: for the command line.

Life of a read: `Cache.read_hit` finds every block `ready` and copies it; else `reads` copies what
is there and has `fetch` bring the rest, which is filled in unless a write overtook it. Life of a
write: `Cache.write_hit` finds every block `open`, or has `store` open them, and copies into them;
else `store` marks, copies and puts the slot into `writeback`'s ring, from where age, a limit or a
flush sends it; it is clean when a flush succeeded that was sent after the reply.

Nothing here does I/O except `file` and `cold`; time comes from an injected clock, the end of a
turn from an injected `call_at_turn_end`, and whoever owns the cache calls `tick()`.
"""
