"""A look at any vhost-user-blk device from a guest's side: does it keep its promises, is it fast?

- `connecting`: a driver at the device's socket;
- `check`: tries all rules; `rules`: what a rule is. They are in `feature_rules`, `request_rules`,
  `ring_rules`, `session_rules`, and those that write in `data_rules`;
- `bench`: a load, and how long its requests took; `latencies`: many durations in little room.
"""
