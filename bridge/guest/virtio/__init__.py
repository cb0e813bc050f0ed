"""virtio without I/O: guest memory, virtqueues, and the virtio-blk requests in them.

Nothing here waits or opens anything but memory. Every value that a guest can write is untrusted:
it is read once into Python objects, checked, and only the copy is used.
"""
