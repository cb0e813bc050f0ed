"""nbd-bridge: a virtual machine's virtio-blk disk that lives on a network block device.

One process serves one guest disk. On one side it is a vhost-user-blk back-end (QEMU, libvirt,
cloud-hypervisor, crosvm or libblkio connect to its socket), on the other an NBD client.

The map, and which way imports point:

    cli/                the commands: what an operator types and reads
    app/                the parts put together, served and stopped; the process
    guest/              the guest's side: vhost-user session, virtqueues, virtio-blk requests
    cache/              the local cache; `cache/file` is its file
    server/             the server's side: NBD client, reconnecting
    datapath/           what every request passes: the turn, requests, lanes, the disk's seam
    peers/              what plays the other side, for the demo, the benchmark and the tests
    demo/               a Linux guest on a disk, without any set-up
    errors, units       whose fault it is; sizes as operators write and read them

The life of a read. The guest puts a chain into the available ring and kicks. `Loop` has a turn:
`RunningRing.poll` takes every new chain from `SplitQueue.pop`, `BlkEngine.start` checks it and
makes a `BlkRequest` whose buffers are the guest's own memory, `Disk.submit` passes it on, and
the NBD client gives it a cookie and queues 28 bytes of header. At the turn's end one `sendmsg`
per connection carries all of them. When replies arrive, a later turn of the same loop receives
them (large payloads straight into the guest's memory) and notes the requests, found by cookie, as
finished. `Turn.end` tells their owners one after the other: `BlkEngine._finish` writes each status
byte, `RunningRing.complete` each used element, and what was put off to the end of the turn,
`RunningRing._publish`, stores the used index once and calls the guest at most once. Nothing is
finished within a call of `submit`, and nobody is told of it within a call of somebody else's:
`turn` has the rule.

With a cache the engine first asks for a hit (`Disk.hits`): the cache copies what it has between
its file and the guest's memory, and the chain is used without a request.

The life of a write is the same, with the guest's memory as the source of the `sendmsg`. It is
complete when the server has replied (or, where the guest turned the write cache off, when the
server has made it durable), and durable when a flush that came after it is complete.
"""

__version__ = "0.1.0"
