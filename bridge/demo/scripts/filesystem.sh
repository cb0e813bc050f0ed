# An ext4 file system on the disk, used the way a guest uses one; leaves files and SUMS behind.
#
# guest_mib: how much to write. guest_sectors, guest_serial, guest_cache, guest_queues,
# guest_block: properties that the disk must have (not checked when not given). The file system
# leaves out the last 32 MiB of the disk, which are written and discarded raw.

disk=/dev/vda sys=/sys/block/vda tail_mib=32
total_mib=${guest_mib:-16}
chunk_mib=$(( total_mib / 4 < 16 ? total_mib / 4 : 16 ))
files=$(( total_mib / chunk_mib ))

wait_disk vda
expect sectors "$(cat $sys/size)" "$guest_sectors"
expect serial "$(cat $sys/serial)" "$guest_serial"
expect write_cache "$(cat $sys/queue/write_cache)" "${guest_cache:-write back}"
expect queues "$(ls $sys/mq | wc -l)" "$guest_queues"
expect block_bytes "$(cat $sys/queue/logical_block_size)" "$guest_block"
for limit in discard_granularity discard_max_bytes write_zeroes_max_bytes physical_block_size; do
    report $limit="$(cat $sys/queue/$limit)"
done
[ "$(cat $sys/queue/discard_max_bytes)" != 0 ] || fail "the disk offers no discard"

# write_file NAME SHIFT: random bytes, no two files with the same block at the same place.
write_file() {
    { dd bs=$(( $2 * 4099 + 1 )) count=1 of=/tmp/skipped; cat; cat /tmp/skipped; } \
        </tmp/random >"$1" 2>/dev/null
}

write_files() {
    i=1
    while [ $i -le $files ]; do
        write_file "file$i" $i || return 1
        i=$(( i + 1 ))
    done
    sync
}

mkdir -p /mnt
mount -t tmpfs none /tmp
dd if=/dev/urandom of=/tmp/random bs=1M count=$chunk_mib 2>/dev/null

fs_kib=$(( $(cat $sys/size) / 2 - tail_mib * 1024 ))
timed mkfs 0 /bin/mke2fs -q -F -t ext4 -E lazy_itable_init=0,lazy_journal_init=0 $disk ${fs_kib}k
mount -t ext4 -o discard $disk /mnt || fail "mount -o discard"
cd /mnt
checkpoint formatted
timed write $(( files * chunk_mib * 1024 )) write_files
md5sum file* >SUMS
sync
rm file1 && sync
cd / && umount /mnt || fail umount
/bin/e2fsck -fn $disk >/tmp/e2fsck 2>&1 || fail "e2fsck: $(tail -n 3 /tmp/e2fsck)"

mount -t ext4 $disk /mnt || fail "second mount"
cd /mnt
timed read $(( (files - 1) * chunk_mib * 1024 )) sh -c 'cat file* >/dev/null'
write_file file1 1
timed verify $(( files * chunk_mib * 1024 )) md5sum -cs SUMS
checkpoint written

for file in file*[13579]; do
    rm "$file"
done
for file in file*; do
    grep " $file\$" SUMS
done >SUMS.new
mv SUMS.new SUMS
checkpoint deleted
timed fstrim 0 fstrim /mnt
checkpoint trimmed
cd / && umount /mnt || fail "second umount"

raw_mib=$(( fs_kib / 1024 ))
dd if=/tmp/random of=$disk bs=1M seek=$raw_mib count=$chunk_mib conv=fsync 2>/dev/null || fail "raw write"
checkpoint raw_written
timed blkdiscard 0 blkdiscard -o ${raw_mib}M -l ${chunk_mib}M $disk
checkpoint raw_discarded

timed fsck 0 sh -c "/bin/e2fsck -fn $disk >/tmp/e2fsck 2>&1"
