# Hands the disk to guest_agent, which is told over the second serial port what to do.
# guest_number: of the disk. What the bridge's cache and the server's are for shows only in a guest
# that flushes: so the disk must have a write cache.

wait_disk vda
queue=/sys/block/vda/queue
expect write_cache "$(cat $queue/write_cache)" "write back"
/scripts/guest_agent /dev/vda /dev/ttyS1 "$guest_number" "$(cat $queue/discard_max_bytes)" ||
    fail "the agent ended with $?"
