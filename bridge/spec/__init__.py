"""The numbers and layouts of the specifications, each once, for both sides of a conversation.

- `nbd`: the NBD protocol.

Nothing here decides anything, and nothing here imports anything of this package but `errors`.
"""
