"""The numbers and layouts of the specifications, each once, for both sides of a conversation.

- `nbd`: the NBD protocol;
- `virtqueue`, `virtio_blk`: virtio's rings, and its block device.

Nothing here decides anything, or imports anything of this package.
"""
