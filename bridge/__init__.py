"""nbd-bridge: a virtual machine's virtio-blk disk that lives on a network block device.

    cli/                the commands: what an operator types and reads
    app/                the parts put together, served and stopped; the process
    guest/              the guest's side: vhost-user session, virtqueues, virtio-blk requests
    cache/              the local cache; `cache/file` is its file
    server/             the server's side: the NBD client, and reconnecting
    datapath/           what every request passes: the turn, requests, lanes, the disk
    peers/              what plays the other side, for the demo, the benchmark and the tests
    demo/               a Linux guest on a disk, without any set-up
    spec/               the numbers and layouts of the specifications
    errors, units       whose fault it is; sizes as operators write and read them
    host                what this machine is

The picture, one turn, the life of a request and the glossary: docs/architecture.md.
"""

__version__ = "0.1.0"
