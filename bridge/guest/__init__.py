"""The guest's side: a vhost-user-blk back-end and its virtqueues.

- `vhost_user`: the conversation with the front-end (QEMU, cloud-hypervisor, …);
- `virtio`: guest memory, virtqueues, and the virtio-blk requests in them;
- `device`: one disk's device, which joins both; `above`: what it tells and asks the storage side;
- `last_stop`: what is promised when the last ring has stopped; `remembered`: what the next process
  has to know of the guest; `write_cache`, `guest_faults`: turned off, and counted;
- `dirty_logs`: what rings mark while the guest migrates;
- `drain`: how long what stops is waited for; `regions`: the guest's memory, as messages change it;
- `ring_setup`, `ring`: a virtqueue that runs; `general`: why requests were not usual;
- `eventfds`: calls to the guest, on descriptors that a front-end may have made block.
"""
