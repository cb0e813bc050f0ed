"""The cache file: its format, how it is opened, locked, mapped and closed, and where it lies.

- `layout`: what is on the file's first pages, and how it is checked;
- `cache_file`: opening, locking, preallocating, mapping and closing one;
- `location`: which file belongs to an export;
- `inspect`: what a file says about itself, for an operator.
"""
