"""The live page: one file without anything from elsewhere. It reads `status` beside itself."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import trio

from bridge.api.http import Reply

_FILE: Final = Path(__file__).with_name("page.html")
_HEADERS: Final = (
    # Nothing but what is in the page, and it asks nobody but who it came from.
    (
        "Content-Security-Policy",
        "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
        "connect-src 'self'; img-src data:; base-uri 'none'; frame-ancestors 'none'",
    ),
    ("X-Content-Type-Options", "nosniff"),
    ("Referrer-Policy", "no-referrer"),
)


async def page() -> Reply:
    """The page; for one bridge, or for all of an exporter: it looks at what `status` is."""
    # In a thread: the disk that it is on may be slow, and ours is not to wait.
    body = await trio.to_thread.run_sync(_FILE.read_bytes)
    return Reply(body, content_type="text/html; charset=utf-8", headers=_HEADERS)
