"""vhost-user: how a virtual machine hands its disk's virtqueues to another process.

| module | what it is | I/O |
|---|---|---|
| `device_interface` | what a front-end session asks of the device behind it (a Protocol) | none |
| `messages` | wire formats: header, message numbers, payloads | none |
| `shapes` | the legal sizes, descriptor counts and replies of every message | none |
| `reader` | cuts bytes and descriptors into messages | none |
| `session` | the back-end's state machine: one conversation with a front-end | none |
| `rings`, `memory_table` | the session's virtqueues and guest memory | none |
| `handover` | a conversation on its way to the next program of this process | none |
| `reply` | replies, and the type of a message's handler | none |
| `unshared` | tells the operator when the guest's memory is not shared | files in /proc |
| `transport` | messages over a non-blocking unix socket | trio |
| `listener` | the back-end's socket file | sockets |
| `backend` | the back-end's socket: listen, receive, answer, listen again | trio |

Source of the rules: QEMU's docs/interop/vhost-user.rst, called "vhost-user" here.
"""
