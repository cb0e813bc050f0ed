"""The local cache: a memory-mapped file between the guest and the server.

Life of a block: absent → clean ⇄ dirty → written (the server replied, not flushed) → clean.

- `layout`: what is on the file's first pages, and how it is checked.
- `file`: opening, locking, preallocating, mapping and closing a cache file.
- `index`: granule → slot, and the bits of every block, in flat arrays.
- `eviction`: which clean granule goes when room is needed.
- `cache`: the `Target` that joins them; hits are served inside `submit()`.
- `fetch`, `readahead`: reads from the server. `store`: guest writes into the cache.
- `writeback`, `flush`: dirty blocks to the server, and the barrier after them.
- `exclusive`: discard and write-zeroes against everything in flight.
- `cold`: blocks that left the page cache, read by threads.
- `inspect`, `warm`: what the command line does with a cache file.

Nothing here does I/O except `file`, `cold` and the edge `flusher`; time comes from an injected
clock, the end of a turn from an injected `call_at_turn_end`.
"""
