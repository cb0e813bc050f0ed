"""A real guest on a disk of the bridge, for the demo, the tests and the container image.

* `kernel` finds a Linux kernel and its virtio modules, or fetches them without installing them;
* `cpio` and `initramfs` pack them with busybox and the guest's scripts (`scripts/`) into an initrd;
* `accelerator` tests whether KVM works here, and falls back to software emulation;
* `qemu` makes QEMU's command line, `virtual_machine` runs it and reads the serial console;
  `report` parses the console's lines;
* `servers` starts and stops the NBD server (`small_server` where nbdkit is missing) and the bridge;
  `volume` is the volume that they serve, `image` checks its file from the server's side;
* `without_guest` plays the guest with the built-in front-end; `unwrap` unpacks exception groups;
* `demo` runs all of it.
"""
