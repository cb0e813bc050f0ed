"""The limit of open descriptors.

The usual soft limit of 1024 is for programs that use select(2). A front-end may send 509 memory
regions with a descriptor each, and a reconnect with several connections needs more.
"""

from __future__ import annotations

import resource

import structlog

_log = structlog.get_logger(__name__)


def allow_all_descriptors() -> None:
    """Raise the soft limit to the hard one. If that is not allowed, log it and keep the limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == hard:
        return
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    except (OSError, ValueError) as error:
        _log.warning("the limit of open descriptors stays", limit=soft, reason=str(error))
