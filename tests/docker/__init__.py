"""`python -m tests.docker`: the containers, built, started, broken and repaired with a real engine.

`engine` finds or starts a Docker daemon, `base_image` finds or makes debian:bookworm-slim,
`staging` copies what the images are built from, `compose` drives either version of Compose,
`scenario` is the life of the service with its kills, `bad_input` what goes wrong at a start.
"""
