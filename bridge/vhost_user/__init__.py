"""vhost-user, both sides: how a virtual machine hands its disk's virtqueues to another process.

| module | what it is | I/O |
|---|---|---|
| `device` | what a session asks of the device behind it (a Protocol) | none |
| `messages` | wire formats: header, requests, payloads, sizes and descriptor counts | none |
| `session` | the back-end's state machine: one front-end's conversation | none |
| `backend` | the back-end's socket: listen, receive, answer, listen again | trio |
| `frontend` | the client side: negotiate, share memory, set up rings | trio |

Source of the rules: QEMU's docs/interop/vhost-user.rst, called "vhost-user" here.
"""
