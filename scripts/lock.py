"""Which exact versions does an install take? Writes requirements/*.txt with uv; `--upgrade` moves to the newest ones.

Two files, since SkyPilot 0.14 holds click below 8.2 and with it a row of others: lock.txt is for everything but the sky
extra (`make demo` and `make test` use it), sky.txt for all extras together. Both serve pip as constraints.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TORCH = "2.13.0"
LOCKS = {"lock.txt": ("local", "quantized", "s3", "dev"), "sky.txt": ("local", "quantized", "s3", "dev", "sky")}
# CUDA comes with the torch build that needs it, which names its exact versions itself; a CPU build needs none of it.
LEFT_OUT = re.compile(r"(nvidia|cuda)-|triton\b")


def main() -> None:
    """Writes each lock file from pyproject.toml, keeping versions that are still good unless asked to upgrade."""
    (ROOT / "requirements").mkdir(exist_ok=True)
    for name, extras in LOCKS.items():
        path = ROOT / "requirements" / name
        pins = compiled(path, extras, upgrade="--upgrade" in sys.argv[1:])
        path.write_text(header(name, extras) + "".join(f"{pin}\n" for pin in pins))
        print(f"{path.relative_to(ROOT)}: {len(pins)} pins")


def compiled(path: Path, extras: tuple[str, ...], *, upgrade: bool) -> list[str]:
    """Lines `name==version ; markers` that hold on Linux and macOS, for each supported Python."""
    command = [
        sys.executable,
        "-m",
        "uv",
        "pip",
        "compile",
        "pyproject.toml",
        "--universal",
        "--python-version",
        "3.11",
    ]
    command += ["--no-header", "--no-annotate", "--quiet", "--constraints", "-", "--output-file", str(path)]
    command += [f"--extra={extra}" for extra in extras] + ["--upgrade"] * upgrade
    subprocess.run(command, cwd=ROOT, input=f"torch=={TORCH}\n", text=True, check=True)
    pins = [line for line in path.read_text().splitlines() if line and not LEFT_OUT.match(line)]
    names = Counter(name_of(pin) for pin in pins)
    # A constraint on what is not needed harms nobody: a marker is kept only to choose between versions of one package.
    return [pin if names[name_of(pin)] > 1 else pin.partition(" ;")[0] for pin in pins]


def name_of(pin: str) -> str:
    return pin.partition("==")[0]


def header(name: str, extras: tuple[str, ...]) -> str:
    return (
        "# Locked versions for Linux and macOS, CPython 3.11 to 3.13; written by `make lock`.\n"
        f"#   pip install -c requirements/{name} -e '.[{','.join(extras)}]'\n"
    )


if __name__ == "__main__":
    main()
