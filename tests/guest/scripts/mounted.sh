# Booted from the disk itself: its FAT file system must be there, with this guest's initrd on it.

wait_disk vda
report sectors=$(cat /sys/block/vda/size)
dd if=/dev/vda bs=1M of=/dev/null 2>/dev/null || fail "read"
