"""The other side of what the bridge talks to: for the demo, the benchmark and the tests.

The guest's side, from the ring up:

- `split_driver`, `packed_driver`: the driver's side of a virtqueue;
- `shared_memory`: the memory that it shares with the device;
- `driver_queue`: one virtqueue with request slots, without waiting;
- `pending_requests`: which task waits for which request;
- `frontend`: the front-end's side of vhost-user;
- `blk_driver`, `disk_config`: all of it together, a guest without a virtual machine.

The server's side:

- `nbd_server`: a small NBD server with fault injection; `nbd_server_disk`: what it serves;
- `nbd_server_core`: one connection of it, without I/O; its parts: `nbd_server_settings` (what it
  offers), `nbd_server_options` (what a client asks), `nbd_server_rules` (what it refuses).

What the demo and the benchmark need lives here. Fakes that only tests use live in `tests`;
`tests/contracts` holds both, and the real things, to the same promises.
"""
