# Where is the test cluster, and on which ports? Sourced by up.sh, down.sh and run.sh; every value can be set before.
KDSLURM_ROOT=${KDSLURM_ROOT:-/var/tmp/kdcloud-slurm}  # everything lives below it
KDSLURM_VENV=${KDSLURM_VENV:-.venv}                   # the client's environment: kdcloud with its sky extra
KDSLURM_NODE_VENV=${KDSLURM_NODE_VENV:-$KDSLURM_VENV} # what the nodes compute with: torch and the rest
KDSLURM_SSH_PORT=${KDSLURM_SSH_PORT:-22022}
KDSLURM_API_PORT=${KDSLURM_API_PORT:-46690}
ACCOUNT=kdslurm                                       # the unix account of the one who rents, here and on the nodes
NODES=(rtx-0 rtx-1 a10g-0 a100-0 l4-0)

is_alive() { [ -s "$1" ] && kill -0 "$(<"$1")" 2>/dev/null; } # PIDFILE
as_account() { setpriv --reuid "$ACCOUNT" --regid "$ACCOUNT" --clear-groups env -i PATH=/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin LANG=C.UTF-8 "$@"; }
