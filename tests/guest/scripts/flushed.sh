# `stress`, then a flush, then the checksums of all that was written: the host compares them with
# what the server has, and ends the servers before it lets the guest go on.

. /scripts/stress.sh
dd if=/dev/null of=$disk conv=fsync,notrunc 2>/dev/null || fail "flush"
slot=0
while [ $slot -lt $(( workers * slots )) ]; do
    [ ! -e /tmp/sum.$slot ] || echo "SUM $slot $(cat /tmp/sum.$slot)"
    slot=$(( slot + 1 ))
done
checkpoint flushed
