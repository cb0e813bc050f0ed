"""vhost-user: how a virtual machine hands its disk's virtqueues to another process.

| module | what it is | I/O |
|---|---|---|
| `device_interface` | what a session asks of the device behind it (a Protocol) | none |
| `messages` | wire formats: header, request numbers, payloads | none |
| `shapes` | what every request must look like: sizes, descriptor counts, replies | none |
| `reader` | cuts bytes and descriptors into messages | none |
| `session` | the back-end's state machine: one front-end's conversation | none |
| `rings`, `memory_table` | its parts about virtqueues and guest memory | none |
| `reply` | what a request is answered with | none |
| `unshared` | guest memory that is not shared: what to tell the operator | |
| `transport` | messages over a non-blocking unix socket | trio |
| `listener` | the back-end's socket file | |
| `backend` | the back-end's socket: listen, receive, answer, listen again | trio |

Source of the rules: QEMU's docs/interop/vhost-user.rst, called "vhost-user" here.
"""
