# Reads and writes all the time. To each line that the host types it says for how long the disk has
# finished nothing, at most, since the line before: `GAP <word> <hundredths of a second>`. The word
# stands after a colon: a `read` that ends with its time limit may swallow what came just then.

wait_disk vda
mount -t tmpfs none /tmp

io_error() { dmesg | grep 'I/O error' | head -n 3; }

load() {
    while [ ! -e /tmp/stop ]; do
        dd if=/dev/zero of=/dev/vda bs=64k count=512 oflag=direct 2>/dev/null ||
            fail "a write failed: $(io_error)"
        dd if=/dev/vda of=/dev/null bs=4k count=512 skip=$1 iflag=direct 2>/dev/null ||
            fail "a read failed: $(io_error)"
    done
}
load 8192 &
load 16384 &

# Both without another process: an emulated processor is slow to make one.
read -r up _ </proc/uptime
last=${up%.*}${up#*.} longest=0 seen=
while :; do
    line=
    read -r -t 0.01 line
    read -r up _ </proc/uptime
    read -r reads _ _ _ writes _ </sys/block/vda/stat
    now=${up%.*}${up#*.}
    [ $(( now - last )) -le $longest ] || longest=$(( now - last ))
    [ "$reads $writes" = "$seen" ] || last=$now
    seen="$reads $writes"
    case ${line##*:} in
    '') ;;
    stop) break ;;
    *) echo "GAP ${line##*:} $longest"; longest=0 ;;
    esac
done
touch /tmp/stop
wait
[ -z "$(io_error)" ] || fail "$(io_error)"
