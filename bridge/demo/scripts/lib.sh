# Functions for all guest scripts.

fail() { echo "FAIL $*"; sync; poweroff -f; sleep 60; }
report() { echo "REPORT $*"; }

# now_ms: milliseconds since the kernel started.
now_ms() { read -r up _ </proc/uptime; echo "$(( ${up%.*} * 1000 + 1${up#*.} * 10 - 1000 ))"; }

# checkpoint NAME: the host checks its side, then sends a line; without a host go on after 20 s.
checkpoint() { sync; echo "CHECKPOINT $1"; read -r -t 20 _; }

# rate NAME KIB MS: report a time and a throughput.
rate() {
    report "$1_ms=$3"
    [ "$2" = 0 ] || report "$1_mib_s=$(( $2 * 1000 / ($3 + 1) / 1024 ))"
}

# timed NAME KIB COMMAND...: run it, report how long it took and how fast that was.
timed() {
    name=$1 kib=$2 began=$(now_ms)
    shift 2
    "$@" || fail "$name: $* gave $?"
    rate "$name" "$kib" $(( $(now_ms) - began ))
}

# wait_disk NAME: until the driver has made /dev/NAME.
wait_disk() {
    tries=0
    while [ ! -b "/dev/$1" ]; do
        tries=$(( tries + 1 ))
        [ $tries -lt 100 ] || fail "no /dev/$1 after 10 s"
        sleep 0.1
    done
}

# expect NAME ACTUAL WANTED: report it; fail if WANTED is given and differs.
expect() {
    report "$1=$2"
    [ -z "$3" ] || [ "$2" = "$3" ] || fail "$1 is '$2', should be '$3'"
}
