"""virtio without I/O: guest memory, virtqueues, and the virtio-blk requests in them.

- `memory`: the regions that a front-end shares; `seals`: files that must keep their length;
- `chain`: a descriptor chain, checked; `long_chains`: a bound on the memory that chains take;
- `queue`: what every virtqueue can do; `split_queue`, `packed_queue`: the two kinds; `inflight`,
  `inflight_packed`: the same, recorded in an in-flight region;
- `blk`: virtio-blk requests executed; `blk_request`: one on its way, and its pieces; `blk_ranges`:
  what a discard asks for; `blk_config`: features and configuration space;
- `dirty_log`: what was written, for a migration.

Nothing here waits or opens anything but memory. Every value that a guest can write is untrusted:
it is read once into Python objects, checked, and only the copy is used.
"""
