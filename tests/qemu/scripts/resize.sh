# Waits for the disk to grow while it is in use, then writes and reads the new part.
# guest_new_sectors: the size it must have in the end.

sys=/sys/block/vda
wait_disk vda
old=$(cat $sys/size)
checkpoint before
tries=0
while [ "$(cat $sys/size)" = "$old" ]; do
    tries=$(( tries + 1 ))
    [ $tries -lt 300 ] || fail "the disk still has $old sectors after 30 s"
    sleep 0.1
done
expect sectors "$(cat $sys/size)" "$guest_new_sectors"
dd if=/dev/urandom of=/tmp/new bs=1M count=1 2>/dev/null
last=$(( guest_new_sectors / 2048 - 1 ))
dd if=/tmp/new of=/dev/vda bs=1M seek=$last conv=fsync 2>/dev/null || fail "write to the new part"
sum=$(md5sum </tmp/new)
[ "$(dd if=/dev/vda bs=1M skip=$last count=1 iflag=direct 2>/dev/null | md5sum)" = "$sum" ] ||
    fail "the new part reads wrong"
