"""A look at any vhost-user-blk device from a guest's side: how fast it is.

- `connecting`: a front-end at the device's socket;
- `bench`: a load, and how long its requests took; `latencies`: many durations in little room.
"""
