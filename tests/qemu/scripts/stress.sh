# Writes and verifies without a pause, in several processes, until the host types a line.
#
# guest_workers: processes (3), spread over the CPUs. guest_queues: how many the disk must have.
# One more process, the flood, keeps many large requests in flight, which the workers, busy with
# verifying, do not. Each worker has 16 slots of 1 MiB on the raw disk. A round rewrites one slot with bytes that no
# other round has, and reads it back past the page cache; before that it reads what the slot held
# since 16 rounds ago: a write that was lost, torn, misplaced or executed again later shows there.

disk=/dev/vda
workers=${guest_workers:-3} slots=16 flood_mib=8

wait_disk vda
expect queues "$(ls /sys/block/vda/mq | wc -l)" "$guest_queues"
mount -t tmpfs none /tmp
dd if=/dev/urandom of=/tmp/random bs=1M count=1 2>/dev/null

# make_round WORKER ROUND: the round's bytes, in /tmp/new.WORKER.
make_round() {
    { dd bs=$(( ($2 * workers + $1) * 4099 % 1048576 + 1 )) count=1 of=/tmp/skip.$1; cat; \
        cat /tmp/skip.$1; } </tmp/random >/tmp/new.$1 2>/dev/null
}

# read_slot SLOT: from the disk, not from the page cache.
read_slot() { dd if=$disk bs=256k skip=$(( $1 * 4 )) count=4 iflag=direct 2>/dev/null; }

# write_slot SLOT ROUND: in one of three ways.
write_slot() {
    case $(( $2 % 3 )) in
    0) dd of=$disk bs=256k seek=$(( $1 * 4 )) oflag=direct ;;
    1) dd of=$disk bs=16k seek=$(( $1 * 64 )) oflag=direct ;;
    2) dd of=$disk bs=1M seek=$1 conv=fsync ;;
    esac 2>/tmp/error.$1
}

bad() { echo "worker $1: $2" >>/tmp/failed; exit 1; }

# check_slot WORKER SLOT: it still holds what was written there last.
check_slot() {
    [ ! -e "/tmp/sum.$2" ] || [ "$(read_slot "$2" | md5sum)" = "$(cat "/tmp/sum.$2")" ] ||
        bad "$1" "slot $2 changed after it was verified"
}

worker() {
    round=0
    while [ ! -e /tmp/stop ]; do
        slot=$(( $1 * slots + round % slots ))
        check_slot "$1" $slot
        make_round "$1" $round
        write_slot $slot $round </tmp/new.$1 || bad "$1" "write: $(cat /tmp/error.$slot)"
        md5sum </tmp/new.$1 >/tmp/sum.$slot
        [ "$(read_slot $slot | md5sum)" = "$(cat /tmp/sum.$slot)" ] ||
            bad "$1" "slot $slot reads wrong after round $round"
        round=$(( round + 1 ))
        echo $round >/tmp/count.$1
    done
}

# flood: the same 8 MiB behind the slots over and over, in turn with two contents.
flood() {
    round=0
    at=$(( workers * slots ))
    while [ ! -e /tmp/stop ]; do
        round=$(( round + 1 ))
        dd if=/tmp/flood.$(( round % 2 )) of=$disk bs=8M seek=$(( at / 8 )) oflag=direct \
            2>/tmp/error.flood || bad flood "write: $(cat /tmp/error.flood)"
        [ $(( round % 4 )) != 0 ] || check_flood
    done
    check_flood
}

check_flood() {
    [ "$(dd if=$disk bs=8M skip=$(( at / 8 )) count=1 iflag=direct 2>/dev/null | md5sum)" = \
        "$(md5sum </tmp/flood.$(( round % 2 )))" ] || bad flood "wrong after round $round"
}

for each in 0 1; do
    dd if=/dev/urandom of=/tmp/flood.$each bs=1M count=$flood_mib 2>/dev/null
done
flood &

cpus=$(nproc)
w=0
while [ $w -lt $workers ]; do
    # The mask in hex: one CPU each, so that each CPU's queue is used.
    ( taskset -p $(printf '%x' $(( 1 << (w % cpus) ))) "$(cut -d ' ' -f 4 /proc/self/stat)" >/dev/null
      worker $w ) &
    w=$(( w + 1 ))
done

total=0
while [ ! -e /tmp/failed ]; do
    total=0
    for count in $(cat /tmp/count.* 2>/dev/null); do total=$(( total + count )); done
    echo "PROGRESS $total"
    read -r -t 0.2 _ && break
done
touch /tmp/stop
wait
[ ! -e /tmp/failed ] || fail "$(cat /tmp/failed)"
slot=0
while [ $slot -lt $(( workers * slots )) ]; do
    check_slot final $slot
    slot=$(( slot + 1 ))
done
dmesg | grep -q 'I/O error' && fail "$(dmesg | grep 'I/O error' | head -n 3)"
report rounds=$total
