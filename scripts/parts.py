"""Is it good? Runs the named parts of the checks one after the other, and prints how long each took."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ELSEWHERE = "slurm or export"  # in parts of their own
PARTS = {
    "lint": [["ruff", "check", "."], ["mypy"]],
    "unit": [["pytest", "-q", "-n", "auto", "--dist", "worksteal", "-m", f"not ({ELSEWHERE} or slow or kill)"]],
    "integration": [  # a file's tests stay together: what they share is made once
        ["pytest", "-q", "-n", "2", "--dist", "loadscope", "-m", f"(slow or kill) and not ({ELSEWHERE} or alone)"],
        ["pytest", "-q", "-m", f"(slow or kill) and alone and not ({ELSEWHERE})"],
    ],
}
ON_REQUEST = {
    "slurm": [["bash", "tests/slurm/run.sh"]],  # Debian and root; with .venv-sky
    "export": [["pytest", "-q", "-s", "-m", "export", "tests/test_llama_cpp.py"]],  # with .venv-export
}


def main() -> None:
    """Ends with 1 if a part failed; the later ones run all the same, so that one look shows everything."""
    times: list[tuple[str, bool, float]] = []
    for part in sys.argv[1:] or list(PARTS):
        started = time.monotonic()
        codes = [run(command) for command in {**PARTS, **ON_REQUEST}[part]]
        times.append((part, not any(codes), time.monotonic() - started))
    for part, good, seconds in times:
        print(f"{part:<12} {'ok' if good else 'FAILED':<7} {seconds:6.1f} s", flush=True)
    if not all(good for _, good, _ in times):
        sys.exit(1)


def run(command: list[str]) -> int:
    print(f"--- {' '.join(command)}", flush=True)
    argv = command if command[0] == "bash" else [sys.executable, "-m", *command]
    env = {"KDSLURM_VENV": str(ROOT / ".venv-sky"), **os.environ}
    return subprocess.run(argv, cwd=ROOT, env=env, check=False).returncode


if __name__ == "__main__":
    main()
