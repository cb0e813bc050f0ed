"""A real guest on a disk of ours, in one call: for the demo, the tests and the container image.

* `kernel` finds a Linux kernel and its virtio modules, or fetches them without installing them;
* `cpio` and `initramfs` pack them with busybox and the guest's scripts (`scripts/`) into an initrd;
* `accelerator` finds out whether KVM works here, and falls back to software emulation;
* `qemu` writes QEMU's command line, `virtual_machine` runs it and reads the serial console;
  `report` holds what the guest said there;
* `servers` starts and stops the NBD server (`small_server` where nbdkit is missing) and the bridge;
  `volume` is what they serve, `image` looks at its file from the server's side;
* `without_guest` plays the guest with the built-in front-end; `unwrap` finds the error in a group;
* `demo` joins all of it.
"""
