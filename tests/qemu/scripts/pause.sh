# Reads and writes all the time. To each line that the host types it says for how long the disk has
# finished nothing, at most, since the line before: `GAP <word> <hundredths of a second>`. The word
# stands after a colon: a `read` that ends with its time limit may swallow what came just then.

wait_disk vda

load() {
    while :; do
        dd if=/dev/zero of=/dev/vda bs=64k count=512 oflag=direct || fail "a write failed"
        dd if=/dev/vda of=/dev/null bs=4k count=512 skip=$1 iflag=direct || fail "a read failed"
    done 2>/dev/null
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
dmesg | grep -q 'I/O error' && fail "$(dmesg | grep 'I/O error' | head -n 3)"
