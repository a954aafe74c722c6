#!/usr/bin/env bash
# Brings the cluster up, runs the tests that need it as the one who rents, and takes it down: `make test-slurm`.
#
#     sudo bash tests/slurm/run.sh [pytest arguments]      # KEEP=1 leaves the cluster up
set -euo pipefail
here=$(dirname "$(realpath "${BASH_SOURCE[0]}")")
. "$here/settings.sh"
bash "$here/up.sh"
[ -n "${KEEP:-}" ] || trap 'bash "$here/down.sh"' EXIT
# A copy of the sources: the account may not read the checkout.
mkdir -p "$KDSLURM_ROOT/src" "$KDSLURM_ROOT/tmp"
(cd "$here/../.." && rsync -a --delete --exclude __pycache__ orchestrator tasks tests recipes pyproject.toml "$KDSLURM_ROOT/src/")
chmod -R a+rX "$KDSLURM_ROOT/src"
chown $ACCOUNT:$ACCOUNT "$KDSLURM_ROOT/tmp"
cd "$KDSLURM_ROOT/src"
as_account TMPDIR="$KDSLURM_ROOT/tmp" PYTHONDONTWRITEBYTECODE=1 PYTHONPATH="$KDSLURM_ROOT/src" bash -c '. "$1/env.sh"; shift; exec "$@"' - "$KDSLURM_ROOT" \
    "$KDSLURM_ROOT/client-env/bin/python" -m pytest -m slurm -p no:cacheprovider --durations=0 --durations-min=1 tests/test_sky_slurm.py "$@"
