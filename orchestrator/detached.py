"""How does a run go on without its terminal? Its client becomes a process of its own session, its talk a file."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from orchestrator.errors import UsageError
from orchestrator.ledger import Ledger

LOOK_S = 0.1


def start_client(run_id: str, words: Sequence[str], *, ledger: Ledger, log: Path) -> int | None:
    """None once another process drives the run; else the exit status of one that gave up before, see its `log`.

    The run must be in the ledger and its lease free. `words` are further options of `kdcloud run --resume`.
    Raises UsageError when no process can be started.
    """
    before = _resumes(ledger, run_id)
    argv = [sys.executable, "-P", "-m", "orchestrator.cli", "run", "--resume", run_id, *words]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}  # what is imported here
    try:
        log.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with open(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "ab") as out:
            child = subprocess.Popen(
                argv, env=env, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True
            )
    except OSError as error:
        raise UsageError(
            f"cannot start a client of its own: {error}", hint=f"run it here: `kdcloud run --resume {run_id}`"
        ) from error
    while _resumes(ledger, run_id) == before:
        if child.poll() is not None:
            return child.returncode
        time.sleep(LOOK_S)
    return None


def _resumes(ledger: Ledger, run_id: str) -> int:
    """How often somebody has taken the run over: written by a client that holds its lease."""
    return sum(entry.kind == "resumed" for entry in ledger.run(run_id).entries)
