"""Files of a front-end's that must keep their length while they are mapped.

A store beyond the end of a mapped file is a SIGBUS, which Python cannot survive. A memory file
(memfd) can be sealed against that; of any other file the front-end has to be trusted.
"""

from __future__ import annotations

import fcntl


def keep_length(fd: int) -> bool:
    """Seal the file, so that no process can make it shorter; False if that cannot be had."""
    try:
        if fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK:
            return True
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    except OSError:
        return False  # no memory file, or one that may not be sealed
    return True
