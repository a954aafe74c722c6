#!/usr/bin/env bash
# Brings the cluster up, runs the tests that need it as the one who rents, and takes it down: `make test-slurm`.
#
#     sudo bash tests/slurm/run.sh [pytest arguments]      # KEEP=1 leaves the cluster up, AT_ONCE=1 one by one
#     sudo bash tests/slurm/run.sh --measure               # the figures of README.md
set -euo pipefail
here=$(dirname "$(realpath "${BASH_SOURCE[0]}")")
. "$here/settings.sh"
[ -n "${KEEP:-}" ] || trap 'bash "$here/down.sh"' EXIT
trap 'exit 143' HUP INT TERM # by way of EXIT
bash "$here/up.sh"
# A copy of the sources: the account may not read the checkout.
mkdir -p "$KDSLURM_ROOT/src" "$KDSLURM_ROOT/tmp"
(cd "$here/../.." && rsync -a --delete --exclude __pycache__ orchestrator tasks tests recipes requirements pyproject.toml "$KDSLURM_ROOT/src/")
"$KDSLURM_ROOT/client-env/bin/python" -m compileall -q "$KDSLURM_ROOT/src"
chmod -R a+rX "$KDSLURM_ROOT/src"
chown $ACCOUNT:$ACCOUNT "$KDSLURM_ROOT/tmp"
cd "$KDSLURM_ROOT/src"
python() { # as the one who rents, below the cluster's own environment
    as_account TMPDIR="$KDSLURM_ROOT/tmp" PYTHONDONTWRITEBYTECODE=1 PYTHONPATH="$KDSLURM_ROOT/src" ${KDSLURM_WHOLE:+KDSLURM_WHOLE=1} \
        bash -c '. "$1/env.sh"; shift; exec "$@"' - "$KDSLURM_ROOT" "$KDSLURM_ROOT/client-env/bin/python" "$@"
}
began=$(date +%s)
python -c 'from sky.client import sdk; sdk.api_start()' >/dev/null
echo "SkyPilot's API server after $(($(date +%s) - began)) s"
if [ "${1:-}" = --measure ]; then
    python -m tests.slurm.measure
    exit
fi
scenarios() {
    python -m pytest -m slurm -o cache_dir="$KDSLURM_ROOT/tmp/cache" -p tests.slurm.table -W ignore::DeprecationWarning \
        -q --dist load --maxschedchunk 1 tests/test_sky_slurm.py tests/test_box_slurm.py "$@"
}
scenarios -n "${AT_ONCE:-3}" "$@" && exit
echo "What failed is tried once more, one by one: on a busy machine SkyPilot is slower than the scenarios allow for."
status=0
scenarios -n 1 --again "$@" --last-failed --last-failed-no-failures none || status=$?
[ "$status" = 0 ] || [ "$status" = 5 ] || exit "$status" # 5: no scenario had failed
echo "How soon machines leave is measured with nothing beside them."
python -m tests.slurm.measure
