"""Which locked environments does an image bring? Makes them where tasks/bootstrap.py looks on a rented machine.

python3 scripts/lay_environments.py label train      # in the home folder of whoever runs it; the Dockerfile does

The bootstrap itself makes them, so that name, place and contents are those it asks for; a lock of another version of
kdcloud has another name, and is then made on the machine. Needs no GPU.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MODULES = dict.fromkeys(("torch", "transformers", "peft", "safetensors", "psutil", "boto3"), "")
LIMIT_S = 3600.0


def main() -> None:
    sys.path.insert(0, str(ROOT))
    for name in sys.argv[1:]:
        print(f"environment {name}: {lay(name, Path.home() / '.kdcloud')}", flush=True)


def lay(name: str, own: Path) -> str:
    """The Python of that environment below `own`. Raises ValueError when it could not be made."""
    from tasks import bootstrap

    lock = (ROOT / "requirements" / f"{name}.txt").read_text()
    wanted = bootstrap.Wanted(MODULES, [], [name], {name: lock}, gpu=False)
    python, _ = bootstrap.environment(own, name, "", wanted, bootstrap.Seen(), time.monotonic() + LIMIT_S)
    return python


if __name__ == "__main__":
    main()
