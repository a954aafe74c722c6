"""What does the quickstart come to on this machine? Runs it, and keeps what came out beside earlier ones.

    python -m benchmarks.quickstart                    # as PyTorch computes here
    python -m benchmarks.quickstart --capability avx2  # with the instructions of older CPUs, which round otherwise

Two to three minutes on 2 cores. Writes a row into results/quickstart.json: accuracies of every seed of each model on
1,000 held-out problems, time, cost at the recipe's price, CPU, versions.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results" / "quickstart.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--capability", choices=("default", "avx2", "avx512"), help="of PyTorch's kernels")
    given = parser.parse_args().capability
    chosen = {"ATEN_CPU_CAPABILITY": given} if given else {}
    with tempfile.TemporaryDirectory(prefix="kdcloud-") as home:
        env = {**os.environ, **chosen, "KDCLOUD_HOME": home}
        words = [sys.executable, "-m", "orchestrator.cli"]
        began = time.monotonic()
        subprocess.run([*words, "run", "quickstart", "--yes"], env=env, check=True, cwd=home)
        seconds = time.monotonic() - began
        said = subprocess.run([*words, "report", "--json"], env=env, check=True, cwd=home, stdout=subprocess.PIPE)
    report = json.loads(said.stdout)
    row = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "cpu": cpu(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
        "capability": given or torch.backends.cpu.get_cpu_capability().lower(),
        "versions": {name: version(name) for name in ("torch", "transformers")} | {"python": platform.python_version()},
        "seconds": round(seconds, 1),
        "cost_micros_usd": report["spend_micros"],
        "accuracy": {name: found["accuracy"]["seeds"] for name, found in report["quality"].items() if found},
    }
    rows = json.loads(RESULTS.read_text())["rows"] if RESULTS.exists() else []
    text = {"command": "python -m benchmarks.quickstart [--capability NAME]", "problems": 1000, "rows": [*rows, row]}
    RESULTS.write_text(json.dumps(text, indent=1) + "\n")
    print(json.dumps(row, indent=1))


def cpu() -> str:
    """As Linux names it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    found = next((line.partition(":")[2] for line in lines if line.startswith("model name")), platform.processor())
    return found.strip()


if __name__ == "__main__":
    main()
