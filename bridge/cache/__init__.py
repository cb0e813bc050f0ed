"""The local cache: a memory-mapped file between the guest and the server.

- `cache`: the `Target` that joins everything, and the stage of the loop's turn; `hits`: what is
  served on the spot; `common`: what its parts share; `cache_options`: the limits; `upstream`: what
  it needs of the server.
- `blocks`: the states of a block, and the only code that changes them; `index`: granule → slot, in
  flat arrays; `eviction`: which clean granule goes when room is needed; `slots`: both in step.
- `reads`, `fetch`, `readahead`: reads that miss; `cold`: blocks that left the page cache.
- `writes`: guest writes into the cache, and when each is complete; `waiting_writes`: what the
  others wait for.
- `writeback`, `dirty_ring`, `runs`, `pace`, `in_flight`: dirty blocks to the server, in which
  order, which in one command, when, and what is on the way; `wait`, `awaited`, `flush`: what waits
  for that, for which slots, and the barrier after it.
- `range_requests`, `range_operations`, `busy_ranges`: discard and write-zeroes, ordered against
  everything in flight.
- `resize`: the disk grows; `foreign`, `sample`: did another host write the image? `warm`:
  preloading.
- `file`: the mapped file, its format and its place.

Nothing here does I/O except `file` and `cold`. Time comes from an injected clock, turns from an
injected `Turn`; the owner of a cache calls `tick()` at `next_deadline()`. How a read, a write and a
flush pass through: docs/architecture.md.
"""
