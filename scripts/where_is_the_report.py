"""Where does one look after `make demo`? Prints the newest run, what it made, and the command that shows it again."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path


def main() -> None:
    kdcloud = Path(sys.executable).parent / "kdcloud"
    answer = subprocess.run([str(kdcloud), "report", "--json"], stdout=subprocess.PIPE, text=True, check=True)
    report = json.loads(answer.stdout)
    exported = [item for item in report["artifacts"] if item["stage"] == "export"]
    print(f"\nThe report again:  .venv/bin/kdcloud report {report['run']}")
    print("As a page:          .venv/bin/kdcloud report --html report.html --open")
    print(f"Everything it made: {report['bucket']}")
    print(f"The student:        {len(exported)} files, {sum(item['bytes'] for item in exported) / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
