"""The data path: the way of every request, and the turn in which it moves on.

- `request`: a request, from the guest to the server's reply;
- `loop`, `turn`: one epoll under one trio task; the order of work in one turn;
- `usual`: the usual case of a turn, in batches, over the flat state of `cells`; `rows`: what of it
  is in flight, and the way out of it; `merged`: commands for several of its requests; `flush_rows`:
  which flushes are; `spans`: which bytes it has to keep away from; `fence`: the memory barrier that
  it and the rings need;
- `engine`, `engine_names`: whether `usual` does that or the same in C, which is `native`, built as
  `_native`; `compiled`: whole turns in C;
- `crowding`: whether others want the processor, so that polling is at their cost;
- `buffers`: between a request's buffers and flat bytes;
- `deadlines`: when something without a task of its own is called next;
- `lanes`: large requests, some of them per turn;
- `disk`: the seam between the guest's side and the storage side, and the flush timer;
- `histogram`: of durations;
- `durability`: what the server acknowledged and may still lose.

What the C in `native` does file by file, and how it is built: docs/architecture.md, "The same,
compiled".
"""
