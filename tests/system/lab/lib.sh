# Shared helpers of the scripts beside it; source it. They need root on Debian 12, are quiet, and do nothing twice. What
# they keep lies in $LAB. The Debian mirror is the one that this machine's own apt sources use.
set -euo pipefail
: "${LAB:?a folder for what the scripts keep}"
export DEBIAN_FRONTEND=noninteractive
mkdir -p "$LAB"

# The first Debian (not -security) archive URL in the system's apt sources.
debian_mirror() {
    find /etc/apt -maxdepth 2 -type f \( -name '*.list' -o -name '*.sources' \) \
        -exec cat {} + |
        sed -n -E 's/^(URIs:|deb( +\[[^]]*\])?) +([^ ]+).*/\3/p' |
        sed 's:/*$::' | awk '/\/debian$/ && !n++'
}

# Install Debian packages only if one is missing; quiet unless it fails.
apt_need() {
    local p miss=()
    for p; do
        [ "$(dpkg-query -W -f='${db:Status-Status}' "$p" 2>/dev/null)" = installed ] ||
            miss+=("$p")
    done
    [ ${#miss[@]} -eq 0 ] && return 0
    quiet apt-get install -y -qq --no-install-recommends "${miss[@]}" || {
        quiet apt-get update -qq
        quiet apt-get install -y -qq --no-install-recommends "${miss[@]}"
    }
}

# Run a command; show its output only when it fails.
quiet() {
    local log rc=0
    log=$(mktemp)
    "$@" >"$log" 2>&1 </dev/null || { rc=$?; cat "$log" >&2; echo "failed ($rc): $*" >&2; }
    rm -f "$log"
    return $rc
}

# Daemons of ours, by a file that holds "PID START_TIME": a process that ended (even
# one that nobody has reaped) or another one that got its number is not ours.
proc_start() { sed -E -n 's/^.*\) ([^ZX]) //p' "/proc/$1/stat" 2>/dev/null | cut -d' ' -f19; }
alive() { # PIDFILE
    local pid t
    [ -s "$1" ] && read -r pid t <"$1" && [ -n "$t" ] && [ "$(proc_start "$pid")" = "$t" ]
}
# spawn PIDFILE OUTPUT COMMAND...: start it detached
spawn() {
    local pidfile=$1 out=$2
    shift 2
    setsid "$@" >>"$out" 2>&1 </dev/null &
    echo "$! $(proc_start $!)" >"$pidfile"
}
# end PIDFILE...: ask each to stop, in order; wait up to 10 s, then insist
end() {
    local f pid
    for f; do
        if alive "$f"; then
            read -r pid _ <"$f"
            kill "$pid" 2>/dev/null || true
            for _ in $(seq 100); do alive "$f" || break; sleep 0.1; done
            if alive "$f"; then kill -9 "$pid" 2>/dev/null || true; fi
        fi
        rm -f "$f"
    done
}
