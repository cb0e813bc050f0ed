"""nbd-bridge: a virtual machine's virtio-blk disk that lives on a network block device.

    cli/                the commands: what an operator types and reads
    app/                puts the parts together, serves a disk, stops it; the process
    api/                the control socket: status, metrics, actions
    guest/              the guest's side: vhost-user session, virtqueues, virtio-blk requests
    cache/              the local cache; `cache/file` is its file
    server/             the server's side: the NBD client, and reconnecting
    datapath/           the way of every request: the turn, requests, lanes, the disk
    peers/              a driver and a server to talk to, for the demo, benchmark and tests
    demo/               a Linux guest on a disk, without any set-up
    spec/               the numbers and layouts of the specifications
    errors, units       error classes, by who is to blame; sizes as operators write them
    host                facts about this host

The picture, one turn, the life of a request and the glossary: docs/architecture.md.
"""

__version__ = "0.1.0"
