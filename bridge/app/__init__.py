"""Composition and life cycle: puts the parts together, serves a disk, stops it.

- `settings`: every option of `serve`, declared once; `command_settings`: those of the other
  commands; `settings_model`: the type of a setting;
- `serve`: one disk, from the start to the stop; `storage`: its client and its cache;
- `listening`: where a front-end connects; `first_connection`: a server that is not up yet;
  `service_manager`: what systemd is told;
- `upgrade`: another program takes over a running disk;
- `targets`: what the disk and the cache submit to; `answers`: waiting for what is submitted;
- `open_cache`: a cache file in use; `departure`: the guest stops, and perhaps comes back to it;
- `cache_names`: where the cache file of an export is; `cache_ownership`: whether what it holds may
  still be believed, and sent;
- `cache_files`: all cache files of this user, and whether their disks still exist; `cache_prune`:
  removes those that nobody needs;
- `cache_flush`, `cache_warm`: a cache file flushed to its server, or filled, without a guest;
- `info`: what a server offers;
- `unit_files`: what makes bridges services of a host, from the files in `bridge/share`;
- `logs`, `signals`, `bus_errors`, `malloc_tuning`, `descriptors`: the process.
"""
