"""Is it good? Runs the named parts of the checks one after the other, and prints how long each took."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PARTS = {
    "lint": [["ruff", "check", "."], ["mypy"]],
    "unit": [["pytest", "-q", "-n", "auto", "--dist", "worksteal", "-m", "not slow and not kill and not slurm"]],
    "integration": [["pytest", "-q", "-m", "(slow or kill) and not slurm"]],
}


def main() -> None:
    """Ends with 1 if a part failed; the later ones run all the same, so that one look shows everything."""
    times: list[tuple[str, bool, float]] = []
    for part in sys.argv[1:] or list(PARTS):
        started = time.monotonic()
        codes = [run(command) for command in PARTS[part]]
        times.append((part, not any(codes), time.monotonic() - started))
    for part, good, seconds in times:
        print(f"{part:<12} {'ok' if good else 'FAILED':<7} {seconds:6.1f} s", flush=True)
    if not all(good for _, good, _ in times):
        sys.exit(1)


def run(command: list[str]) -> int:
    print(f"--- {' '.join(command)}", flush=True)
    return subprocess.run([sys.executable, "-m", *command], cwd=ROOT, check=False).returncode


if __name__ == "__main__":
    main()
