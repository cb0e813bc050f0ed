# For a later boot: checks that the file system of filesystem.sh is clean and has every byte.

disk=/dev/vda
wait_disk vda
mount -t tmpfs none /tmp
timed fsck 0 sh -c "/bin/e2fsck -fn $disk >/tmp/e2fsck 2>&1"
mount -t ext4 -o ro $disk /mnt || fail mount
cd /mnt
kib=$(du -k . | tail -n 1 | cut -f 1)
[ -s SUMS ] || fail "no SUMS"
timed read "$kib" sh -c 'cat file* >/dev/null'
timed verify "$kib" md5sum -cs SUMS
report files=$(wc -l <SUMS)
cd / && umount /mnt || fail umount
