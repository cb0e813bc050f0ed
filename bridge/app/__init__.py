"""Composition and life cycle: puts the parts together, serves a disk, stops it.

- `settings`: every option of every command, declared once; `settings_model`: the type of a setting;
- `serve`: one disk, from the start to the stop; `storage`: its client and its cache;
- `cache_tools`: flushes a cache file to its server, or fills one, without a guest;
- `info`: what a server offers;
- `logs`, `signals`, `bus_errors`, `malloc_tuning`, `descriptors`: the process.
"""
