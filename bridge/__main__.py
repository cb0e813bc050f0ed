"""`python -m bridge`: the same as the `nbd-bridge` command."""

from bridge.cli import main

main()
