"""The storage side: an nbdkit plugin that serves volumes.

    plugin.py        nbdkit's callbacks, nothing else
    settings.py      nbdkit's command line parameters
    service.py       joins the parts below; knows nothing of nbdkit
    names.py         export names: volume, snapshot, session
    session.py       who may write a volume, and when
    store.py         the seam: stores have volumes, a volume opens as a disk
    keepalive.py     vanished clients              connections.py  silent and idle clients
    last_seen.py     what others did to a file     filters.py      what stands above the plugin
    file_store.py    volumes as sparse files       file_disk.py    a disk on a file descriptor
    memory_store.py  volumes in memory             fallocate.py    holes
    rbd_store.py     volumes as Ceph RBD images    rbd_disk.py     an open image
    rbd_lock.py      its exclusive lock            deadline.py     time limits for librbd
    rbd_seen.py      whether others locked it      volume_state.py what is remembered, as text
    thread_state.py  nbdkit's threads in Python    sparse_copy.py  snapshots of files
    errors.py        errors and their errnos       sizes.py        sizes as people write them
    resizing.py      a volume's new size           volume_file.py such a file while it is open
    __main__.py      the command line: create, list, resize, remove, snapshot

It runs in nbdkit's own interpreter: the standard library, and Debian's python3-rbd for the rbd
store, are all it may import. A request goes `plugin.pread` → `Disk.pread`; a connection goes
`plugin.open` → `Service.open` → `Fence.enter` → `Store.open`.
"""
