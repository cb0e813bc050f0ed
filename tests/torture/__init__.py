"""A campaign against real processes: servers, bridges and guests that are killed, stopped and cut
off, while a checker knows what each sector may hold. docs/testing.md has the commands."""
