# The guest switches the disk's write cache off and on again.

sys=/sys/block/vda
wait_disk vda
mount -t tmpfs none /tmp
dd if=/dev/urandom of=/tmp/new bs=64k count=16 2>/dev/null

# write_back_and_forth TYPE: switch, write, read.
write_back_and_forth() {
    echo "$1" >$sys/cache_type
    expect cache_type "$(cat $sys/cache_type)" "$1"
    expect write_cache "$(cat $sys/queue/write_cache)" "$1"
    checkpoint "$1"
    dd if=/tmp/new of=/dev/vda bs=64k oflag=direct 2>/dev/null || fail "write"
    checkpoint "$1 end"
    [ "$(dd if=/dev/vda bs=64k count=16 iflag=direct 2>/dev/null | md5sum)" = "$(md5sum </tmp/new)" ] ||
        fail "reads wrong after $1"
}

expect cache_type "$(cat $sys/cache_type)" "write back"
write_back_and_forth "write through"
write_back_and_forth "write back"
