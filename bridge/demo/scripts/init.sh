#!/bin/sh
# The guest's first process: loads the drivers, runs /scripts/$guest_script.sh, powers off.
# Parameters are words of the kernel's command line without a dot (guest_script=verify): the
# kernel puts what it does not know itself into this process's environment.
/bin/busybox mkdir -p /sbin /usr/bin /usr/sbin
/bin/busybox --install -s /bin
export PATH=/bin

mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev 2>/dev/null
exec </dev/console >/dev/console 2>&1

. /scripts/lib.sh

for module in /modules/*.ko; do
    [ -e "$module" ] || continue
    insmod "$module" || fail "insmod ${module##*/}"
done

echo
report boot_ms=$(now_ms)
script=/scripts/${guest_script:-none}.sh
[ -e "$script" ] || fail "no script $script"
. "$script"
echo PASS
sync
poweroff -f
sleep 60
