# `stress`, some more writes, a flush at once, then the checksums of all that was written: the host
# compares them with what the server has, and ends the servers before it lets the guest go on.

. /scripts/stress.sh
slot=0
while [ $slot -lt 6 ]; do
    make_round 0 $(( 30000 + slot ))
    md5sum </tmp/new.0 >/tmp/sum.$slot
    write_slot $slot 0 </tmp/new.0 || fail "write: $(cat /tmp/error.$slot)"
    slot=$(( slot + 1 ))
done
dd if=/dev/null of=$disk conv=fsync,notrunc 2>/dev/null || fail "flush"
slot=0
while [ $slot -lt $(( workers * slots )) ]; do
    [ ! -e /tmp/sum.$slot ] || echo "SUM $slot $(cat /tmp/sum.$slot)"
    slot=$(( slot + 1 ))
done
checkpoint flushed
