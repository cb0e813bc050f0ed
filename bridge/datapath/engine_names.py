"""The engines by name: see `engine`. Nothing else is imported: the command line needs this."""

from __future__ import annotations

from typing import Final

AUTO: Final = "auto"
PURE: Final = "pure"
COMPILED: Final = "compiled"
ENGINES: Final = (AUTO, PURE, COMPILED)
