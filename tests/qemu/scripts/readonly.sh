# A disk that may not be written: the kernel knows, and nothing gets through.

wait_disk vda
expect ro "$(cat /sys/block/vda/ro)" 1
dd if=/dev/vda of=/dev/null bs=1M 2>/dev/null || fail "read"
dd if=/dev/zero of=/dev/vda bs=4k count=1 oflag=direct 2>/dev/null && fail "a write got through"
expect ro "$(cat /sys/block/vda/ro)" 1
