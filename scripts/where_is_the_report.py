"""Where does one look after `make demo`? Prints the newest run and the commands that show it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path


def main() -> None:
    kdcloud = Path(sys.executable).parent / "kdcloud"
    answer = subprocess.run([str(kdcloud), "report", "--json"], capture_output=True, text=True, check=True)
    report = json.loads(answer.stdout)
    print(f"\nrun {report['run']} is {report['state']}. Look at it again with")
    print(f"    .venv/bin/kdcloud report {report['run']}")
    print("What it made:")
    for artifact in report["artifacts"]:
        print(f"    {artifact if isinstance(artifact, str) else json.dumps(artifact)}")


if __name__ == "__main__":
    main()
