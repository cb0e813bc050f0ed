# A disk that is used for a while and kept: run it again and it finds what it left.
#
# guest_seconds: how long to write at least, if no line on the console ends it; guest_files: how
# many files, over and over; guest_mib: the size of each. An ext4 file system is made when there
# is none. SUMS has the MD5 of files that were completely written and synced, computed from the
# source of the bytes and not from the disk. A file is replaced by one with another name, and
# SUMS by a rename: at any moment of a crash what SUMS says is there.

disk=/dev/vda
seconds=${guest_seconds:-10} files=${guest_files:-8} mib=${guest_mib:-4}

wait_disk vda
report sectors="$(cat /sys/block/vda/size)"
report write_cache="$(cat /sys/block/vda/queue/write_cache)"
mount -t tmpfs none /tmp
dd if=/dev/urandom of=/tmp/random bs=1M count="$mib" 2>/dev/null

if [ "$(dd if=$disk bs=1 skip=1080 count=2 2>/dev/null | hexdump -e '2/1 "%02x"')" != 53ef ]; then
    timed mkfs 0 /bin/mke2fs -q -F -t ext4 -E lazy_itable_init=0,lazy_journal_init=0 $disk
    report made=yes
fi
mount -t ext4 -o discard $disk /mnt || fail mount
cd /mnt
if [ -s SUMS ]; then
    timed verify_found 0 md5sum -cs SUMS
    report found="$(wc -l <SUMS)"
    report newest="$(tail -n 1 SUMS | cut -d ' ' -f 3)"
fi

# content ROUND: random bytes, no two rounds with the same byte at the same place.
content() {
    shift_bytes=$(( $1 * 4099 % (mib << 20) + 1 ))
    { dd bs=$shift_bytes count=1 of=/tmp/skipped; cat; cat /tmp/skipped; } </tmp/random 2>/dev/null
}

# check SLOT: what the disk has is what SUMS says; from the disk, not from memory.
check() {
    echo 3 >/proc/sys/vm/drop_caches
    grep "  file$1-" SUMS | md5sum -cs || fail "file $1 has other bytes than were written"
}

# errors: what the kernel said about the disk.
errors() { dmesg | grep -Ei 'I/O error|EXT4-fs (error|warning)|remounting|Buffer I/O' | head -n 3; }

round=0 boot=$(cut -c 1-8 /proc/sys/kernel/random/uuid)
end=$(( $(now_ms) + seconds * 1000 ))
while [ "$(now_ms)" -lt $end ] && ! read -r -t 0.1 _; do
    round=$(( round + 1 ))
    slot=$(( round % files ))
    name=file$slot-$boot.$round
    sum=$(content $round | tee "$name" | md5sum) && sync "$name" || fail "write $name"
    { grep -v "  file$slot-" SUMS 2>/dev/null; echo "${sum%% *}  $name"; } >SUMS.new
    sync SUMS.new && mv SUMS.new SUMS && sync || fail "write SUMS"
    for old in file$slot-*; do
        [ "$old" = "$name" ] || rm "$old"
    done
    [ $(( round % 4 )) != 0 ] || check $(( (round - 1) % files ))
    report round=$round
done
cd / && umount /mnt || fail umount
timed fsck 0 sh -c "/bin/e2fsck -fn $disk >/tmp/e2fsck 2>&1"
mount -t ext4 -o ro $disk /mnt || fail "second mount"
cd /mnt
timed verify $(( files * mib * 1024 )) md5sum -cs SUMS
report files="$(wc -l <SUMS)"
cd / && umount /mnt || fail "second umount"
said=$(errors)
[ -z "$said" ] || fail "the kernel said: $said"
