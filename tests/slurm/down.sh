#!/usr/bin/env bash
# Ends what up.sh started, each process by its id, and takes the account and the lines of /etc/hosts away again.
#
#     sudo bash tests/slurm/down.sh          # --purge: removes $KDSLURM_ROOT as well
set -uo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/settings.sh"
R=$KDSLURM_ROOT
export SLURM_CONF=$R/etc/slurm.conf
say_pid() { [ -s "$1" ] && cat "$1"; }

if [ -f "$R/env.sh" ]; then # SkyPilot ends only the server on the port in env.sh
    as_account bash -c '. "$1/env.sh"; cd "$1"; exec timeout 60 client-env/bin/python -c "from sky.client import sdk; sdk.api_stop()"' - "$R"
fi
if is_alive "$R/run/slurmctld.pid"; then
    timeout 10 scancel --user=$ACCOUNT
    for _ in $(seq 30); do [ -z "$(timeout 5 squeue -h)" ] && break; sleep 0.5; done
fi
sessions=$(pid=$(say_pid "$R/run/sshd.pid") && ps -o pid= --ppid "$pid")
for file in "$R"/run/slurmd.*.pid "$R/run/slurmctld.pid" "$R/run/sshd.pid" "$R/run/munge/munged.pid"; do
    is_alive "$file" && kill "$(say_pid "$file")" && echo "ended $(basename "$file" .pid)"
done
for pid in $sessions; do kill "$pid" 2>/dev/null; done
for folder in /tmp/kd-*; do # what a node that ended the hard way leaves behind
    [ -d "$folder/skypilot-runtime" ] && [ "$(stat -c %U "$folder")" = $ACCOUNT ] && rm -rf -- "$folder"
done
alive() { ps -o pid=,stat= -u $ACCOUNT 2>/dev/null | awk '$2 !~ /^Z/ {print $1}'; }
for signal in TERM KILL; do # what the account still runs: it has nothing else to do here
    for pid in $(alive); do kill -$signal "$pid" 2>/dev/null; done
    for _ in $(seq 20); do [ -z "$(alive)" ] && break; sleep 0.25; done
done
sleep 0.5
(   # one at a time, and never an empty file: two at once would leave this machine without a localhost
    flock 9
    if [ -w /etc/hosts ] && grep -q '# kdcloud-slurm$' /etc/hosts; then
        lines=$(grep -v '# kdcloud-slurm$' /etc/hosts)
        [ -z "$lines" ] || printf '%s\n' "$lines" > /etc/hosts
    fi
) 9< /etc/hosts
getent passwd $ACCOUNT >/dev/null && { userdel $ACCOUNT || userdel --force $ACCOUNT; }
[ "${1:-}" = --purge ] && rm -rf "${R:?}"
exit 0
