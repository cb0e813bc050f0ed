"""What every test shares."""

from __future__ import annotations

import os

# A bridge that a test starts has no cache unless the test says so: the default one is a large
# file in the system's cache directory.
os.environ["NBD_BRIDGE_SERVE_CACHE_MODE"] = "off"
