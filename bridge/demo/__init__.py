"""A real guest on a disk of ours, in one call: for the demo, the tests and the container image.

* `kernel` finds a Linux kernel and its virtio modules, or fetches them without installing them;
* `cpio` and `initramfs` pack them with busybox and the guest's scripts (`scripts/`) into an initrd;
* `accelerator` finds out whether KVM works here, and falls back to software emulation;
* `qemu` writes QEMU's command line, `guest` runs it and reads the serial console, `report` holds
  what the guest said there;
* `servers` starts and stops the NBD server and the bridge, `image` looks at the disk image from
  the server's side;
* `demo` joins all of it.
"""
