"""`python -m bridge`: the same as the `nbd-bridge` command."""

from bridge.cli.main import main

main()
