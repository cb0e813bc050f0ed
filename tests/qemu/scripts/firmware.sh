# Booted from the disk itself, by a firmware's driver: now the kernel's driver reads all of it.

wait_disk vda
report sectors=$(cat /sys/block/vda/size)
dd if=/dev/vda bs=1M of=/dev/null 2>/dev/null || fail "read"
