"""What plays the other side: for the demo, the benchmark and the tests.

- `split_driver`, `packed_driver`: the driver's side of a virtqueue; `shared_memory`: the memory it
  shares; `frontend`: the front-end's side of vhost-user; `guest`, `guest_queue`: all of them
  together, a guest without a virtual machine;
- `nbd_server`, `nbd_server_core`, `nbd_server_disk`: a small NBD server, with fault injection.
"""
