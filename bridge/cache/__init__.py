"""The local cache: a memory-mapped file between the guest and the server.

Life of a block: absent → clean ⇄ dirty → written (the server replied, not flushed) → clean.

- `file`: the mapped file, its format and its place; `cache_options`: the limits.
- `blocks`: the bits of every block, the states that they stand for, and the only code that changes
  them; `index`: granule → slot, in flat arrays; `eviction`: which clean granule goes when room is
  needed; `slots`: both in step.
- `cache`: the `Target` that joins everything, and the stage of the loop's turn: hits are served in
  `submit()`, a request that has to wait stands in a queue of one of the parts, and `advance()` has
  each part do what it can do now (`Cache.waiting` shows what waits for what).
- `reads`, `fetch`, `readahead`: reads that are no hit; `cold`: blocks that left the page cache.
- `store`: guest writes into the cache, and when each is complete.
- `writeback`, `dirty_ring`, `wait`, `flush`: dirty blocks to the server, in which order, what
  waits for that, and the barrier after it.
- `range_requests`, `exclusive`, `discards`: discard and write-zeroes, ordered against everything in
  flight.
- `sample`: did another client write the image? `warm`: for the command line.

Life of a read: `Cache.read_hit` finds every block `ready` and copies it; else `reads` copies what
is there and has `fetch` bring the rest, which is filled in unless a write overtook it. Life of a
write: `Cache.write_hit` finds every block `open`, or has `store` open them, and copies into them;
else `store` marks, copies and puts the slot into `writeback`'s ring, from where age, a limit or a
flush sends it; it is clean when a flush succeeded that was sent after the reply.

`upstream`: what the cache needs of the server. Nothing here does I/O except `file` and `cold`; time
comes from an injected clock, turns from an injected `Turn`, and the owner of the cache calls
`tick()` at `next_deadline()`.
"""
