"""Composition and life cycle: the parts put together, served, and stopped.

- `settings`: every option of every command, declared once; `settings_model`: what a setting is;
- `serve`: one disk, from the start to the stop; `storage`: its client and its cache;
- `cache_tools`: a cache file brought to its server, or filled, without a guest;
- `info`: what a server offers;
- `logs`, `signals`, `bus_errors`, `malloc_tuning`, `descriptors`: the process.
"""
