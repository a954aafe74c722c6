"""Which exact versions does an install take? Writes requirements/*.txt with uv; `--upgrade` moves to the newest ones.

Two serve pip as constraints on any machine: lock.txt is for everything but the sky extra (`make demo` and `make test`
use it), sky.txt for that too, since SkyPilot 0.14 holds click below 8.2 and with it a row of others. Five are whole
environments of rented machines, by the hashes of their files: train.txt in the versions of lock.txt, label.txt in those
that vLLM asks for; NAME-box.txt is NAME.txt with JupyterLab; chat.txt is Open WebUI for `kdcloud dev --chat`.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import tomllib
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

ROOT = Path(__file__).resolve().parents[1]
TORCH = "2.13.0"
LOCKS = {
    "lock.txt": ("local", "page", "notify", "quantized", "box", "s3", "dev"),
    "sky.txt": ("local", "page", "notify", "quantized", "box", "s3", "dev", "sky"),
}
# CUDA comes with the torch build that needs it, which names its exact versions itself; a CPU build needs none of it.
LEFT_OUT = re.compile(r"(nvidia|cuda)-|triton\b")

# --- whole environments of rented machines: extras, and the file whose versions are taken over. They hold CUDA too:
# a machine has to get the files that were resolved here and no others, and only what is named can have a hash.
MACHINES = {
    "train.txt": (("local", "quantized", "s3"), "lock.txt"),
    "label.txt": (("local", "s3", "label"), None),
    "train-box.txt": (("local", "quantized", "s3", "box"), "lock.txt"),
    "label-box.txt": (("local", "s3", "label", "box"), "label.txt"),
    "chat.txt": (("chat",), None),
}
# What reads pictures, speech and documents, and loads models for that: a box has Open WebUI for a talk with a student.
WITHOUT = {
    "chat.txt": (
        "torch", "accelerate", "faster-whisper", "opencv-python-headless", "rapidocr", "sentence-transformers",
        "transformers",
    )
}  # fmt: skip
PYTHONS = (11, 12, 13)  # CPython 3.x
GLIBC = 39  # 2.x, of Ubuntu 24.04: the newest that a file may ask for
OLD_PLATFORMS = ("manylinux2014_x86_64", "manylinux2010_x86_64", "manylinux1_x86_64", "linux_x86_64")
MACHINE = (
    "sys_platform == 'linux' and platform_machine == 'x86_64' and implementation_name == 'cpython' and "
    "platform_python_implementation == 'CPython' and python_full_version < '3.14'"
)


def main() -> None:
    """Writes each lock file from pyproject.toml, keeping versions that are still good unless asked to upgrade."""
    (ROOT / "requirements").mkdir(exist_ok=True)
    upgrade = "--upgrade" in sys.argv[1:]
    for name, extras in LOCKS.items():
        path = ROOT / "requirements" / name
        pins = compiled(path, extras, upgrade=upgrade)
        path.write_text(header(name, extras) + "".join(f"{pin}\n" for pin in pins))
        print(f"{path.relative_to(ROOT)}: {len(pins)} pins")
    for name, (extras, like) in MACHINES.items():
        path = ROOT / "requirements" / name
        path.write_text(machine_lock(path, extras, None if like is None else path.with_name(like), upgrade=upgrade))
        print(f"{path.relative_to(ROOT)}: {path.read_text().splitlines()[1].lstrip('# ')}")


def compiled(path: Path, extras: tuple[str, ...], *, upgrade: bool) -> list[str]:
    """Lines `name==version ; markers` that hold on Linux and macOS, for each supported Python."""
    command = compiling(extras, path) + ["--constraints", "-"] + ["--upgrade"] * upgrade
    subprocess.run(command, cwd=ROOT, input=f"torch=={TORCH}\n", text=True, check=True)
    pins = [line for line in path.read_text().splitlines() if line and not LEFT_OUT.match(line)]
    names = Counter(name_of(pin) for pin in pins)
    # A constraint on what is not needed harms nobody: a marker is kept only to choose between versions of one package.
    return [pin if names[name_of(pin)] > 1 else pin.partition(" ;")[0] for pin in pins]


def compiling(extras: Sequence[str], output: Path) -> list[str]:
    command = [sys.executable, "-m", "uv", "pip", "compile", "pyproject.toml", "--universal"]
    command += ["--python-version", f"3.{PYTHONS[0]}", "--no-header", "--no-annotate", "--quiet"]
    return [*command, "--output-file", str(output), *(f"--extra={extra}" for extra in extras)]


def name_of(pin: str) -> str:
    return re.split(r"[= ;]", pin, maxsplit=1)[0]


def header(name: str, extras: tuple[str, ...]) -> str:
    return (
        "# Locked versions for Linux and macOS, CPython 3.11 to 3.13; written by `make lock`.\n"
        f"#   pip install -c requirements/{name} -e '.[{','.join(extras)}]'\n"
    )


# --- environments of machines


def machine_lock(path: Path, extras: tuple[str, ...], like: Path | None, *, upgrade: bool) -> str:
    """The text of such a file: every package, with the hashes of the wheels that fit Linux on x86-64."""
    with tempfile.TemporaryDirectory() as folder:
        pins, lock, limits = Path(folder) / "pins.txt", Path(folder) / "pylock.toml", Path(folder) / "limits.txt"
        limits.write_text("" if like is None else "".join(f"{line}\n" for line in versions(like.read_text())))
        if path.exists() and not upgrade:  # uv keeps what stands in its output
            pins.write_text("".join(f"{line}\n" for line in versions(path.read_text())))
        wanted_by = (ROOT / "pyproject.toml").read_text().partition("[tool.uv]")[0]
        never = [f"{name} ; sys_platform == 'never'" for name in WITHOUT.get(path.name, ())]
        settings = f"environments = {json.dumps([MACHINE])}\noverride-dependencies = {json.dumps(never)}\n"
        (Path(folder) / "pyproject.toml").write_text(f"{wanted_by}[tool.uv]\n{settings}")
        for output, more in (
            (pins, ["--constraints", str(limits), *["--upgrade"] * upgrade]),
            (lock, ["--constraints", str(pins), "--format", "pylock.toml"]),
        ):
            subprocess.run([*compiling(extras, output), *more], cwd=folder, check=True)
        packages = tomllib.loads(lock.read_text())["packages"]
    blocks, smallest = [], 0
    for package in packages:
        block, size = locked(package)
        blocks.append(block)
        smallest += size
    newest = max(python for python in PYTHONS if 2 * sum(wanted(one, python) for one in packages) > len(packages))
    head = (
        f"# Environment {path.stem} of a rented machine, whole: Linux on x86-64, CPython 3.11 to 3.{newest}, "
        "wheels only.\n"
        f"# {len(packages)} packages, {smallest} bytes to fetch.\n"
        f"# From the extras {', '.join(extras)}; written by `make lock`, read by tasks/bootstrap.py:\n"
        f"#   uv pip sync --require-hashes --no-build requirements/{path.name}\n"
    )
    return head + "".join(blocks)


def versions(text: str) -> list[str]:
    """The lines of a lock with their markers, without hashes."""
    lines = (line.removesuffix(" \\") for line in text.splitlines())
    return [line for line in lines if re.match(r"[A-Za-z0-9]", line)]


def locked(package: Mapping[str, Any]) -> tuple[str, int]:
    """One package's lines, and the bytes that the machine fetches of it: those of the file that fits CPython 3.12."""
    pythons = [python for python in PYTHONS if wanted(package, python)]
    if not pythons:  # what the first releases of a Python lack (async-timeout: 3.11.0 to 3.11.2) harms no later one
        pythons = [python for python in PYTHONS if wanted(package, python, release=0)]
    fitting = {python: fits(package, python) for python in pythons}
    for python, wheels in fitting.items():
        if not wheels:
            sys.exit(f"{package['name']} {package['version']} has no wheel for CPython 3.{python} on Linux x86-64")
    hashes = sorted({wheel["hashes"]["sha256"] for wheels in fitting.values() for wheel in wheels})
    marker = condition(package, fitting)
    lines = [f"{package['name']}=={package['version']}{marker}", *(f"    --hash=sha256:{one}" for one in hashes)]
    size = fitting[12][0]["size"] if fitting.get(12) else 0
    return " \\\n".join(lines) + "\n", size


def wanted(package: Mapping[str, Any], python: int, release: int = 4) -> bool:
    """Whether CPython 3.`python`.`release` needs it."""
    from packaging.markers import Marker

    machine = {
        "sys_platform": "linux", "platform_system": "Linux", "os_name": "posix", "platform_machine": "x86_64",
        "python_version": f"3.{python}", "python_full_version": f"3.{python}.{release}",
        "implementation_name": "cpython", "platform_python_implementation": "CPython",
    }  # fmt: skip
    return "marker" not in package or Marker(package["marker"]).evaluate(machine)


def condition(package: Mapping[str, Any], fitting: Mapping[int, object]) -> str:
    """A marker where the package is for some Pythons only: these files are for one kind of machine anyway."""
    if tuple(fitting) == PYTHONS:
        return ""
    if not fitting:
        sys.exit(f"{package['name']} is for other machines: is `environments` in pyproject.toml right?")
    low, high = min(fitting), max(fitting)
    if tuple(fitting) != tuple(range(low, high + 1)):
        sys.exit(f"{package['name']} is wanted for some Pythons between others: {package['marker']}")
    return f" ; python_full_version >= '3.{low}' and python_full_version < '3.{high + 1}'"


def fits(package: Mapping[str, Any], python: int) -> list[Mapping[str, Any]]:
    """The wheels that CPython 3.`python` may take on Linux x86-64, the one it prefers first."""
    from packaging.tags import compatible_tags, cpython_tags
    from packaging.utils import parse_wheel_filename

    platforms = [*(f"manylinux_2_{minor}_x86_64" for minor in range(GLIBC, 4, -1)), *OLD_PLATFORMS]
    tags = [
        *cpython_tags((3, python), platforms=platforms),
        *compatible_tags((3, python), f"cp3{python}", platforms),
    ]
    rank = {tag: place for place, tag in enumerate(tags)}
    found = []
    for wheel in package.get("wheels", ()):
        name = wheel.get("name") or unquote(urlsplit(wheel["url"]).path.rsplit("/", 1)[1])
        places = [rank[tag] for tag in parse_wheel_filename(name)[3] if tag in rank]
        if places:
            found.append((min(places), name, wheel))
    return [wheel for _, _, wheel in sorted(found, key=lambda one: one[:2])]


if __name__ == "__main__":
    main()
