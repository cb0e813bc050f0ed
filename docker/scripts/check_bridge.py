"""The bridge's health: it serves its disk and has its server, as its control socket says.

Connecting to the vhost-user socket would take the place of a virtual machine. Prints one line;
exit status 0 or 1.
"""

from __future__ import annotations

import os
import sys

from control import NoAnswer, readiness, socket_path


def main() -> None:
    try:
        is_ready, reason = readiness(socket_path(os.environ.get("NBD_VOLUME") or "disk"))
    except NoAnswer as problem:
        is_ready, reason = False, f"it does not answer: {problem}"
    if not is_ready:
        print(f"bridge is unhealthy: {reason}")
        sys.exit(1)
    print("it serves the disk and has its server")


if __name__ == "__main__":
    main()
