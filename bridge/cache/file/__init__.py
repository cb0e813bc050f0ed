"""The cache file: its format, how it is opened, locked, mapped and closed, and where it lies.

- `layout`: what is on the file's first pages, and how it is checked;
- `locking`: its descriptor, locked and ours; `opening`: what may be believed and kept, what is made
  anew;
- `cache_file`: one in use: mapped, synced, marked and closed;
- `location`: which file belongs to an export;
- `inspect`: what a file says about itself, for an operator.
"""
