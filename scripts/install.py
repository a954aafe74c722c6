"""What does a checkout need before it runs? A virtual environment with kdcloud and its locked versions in it.

    python3 scripts/install.py local,page        # what `make demo` needs
    python3 scripts/install.py local,page,dev    # what `make test` needs
    python3 scripts/install.py local,s3,dev,sky    # what `make test-slurm` needs, in .venv-sky

Does nothing when that was done already and neither pyproject.toml nor the lock changed. Standard library only, and
readable for old Pythons, so that they can be told what is wrong.
"""

from __future__ import annotations

import hashlib
import platform
import re
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SKY = "sky" in (sys.argv[1].split(",") if len(sys.argv) > 1 else [])  # SkyPilot holds other versions: an own place
VENV = ROOT / (".venv-sky" if SKY else ".venv")
LOCK = ROOT / "requirements" / ("sky.txt" if SKY else "lock.txt")
STAMP = VENV / "kdcloud-installed.txt"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"  # PyTorch's builds without CUDA, for Linux
PROBE_S = 4.0
OLDEST = (3, 11)
PACKAGES = ("orchestrator", "tasks", "recipes")
CUDA_FREE_MACHINES = ("x86_64", "aarch64")


def main() -> None:
    """Leaves .venv with the extras named on the command line."""
    extras = set(sys.argv[1].split(",")) if len(sys.argv) > 1 else {"local"}
    refuse_what_cannot_work(extras)
    digest = fingerprint()
    done = installed(digest)
    if extras <= done and works(VENV):
        compile_own_code()
        return
    if not works(VENV):
        say(f"making {VENV.name} with Python {platform.python_version()}")
        call([sys.executable, "-m", "venv", "--clear", str(VENV)], "remove .venv and try again")
        done = set()
    if "local" in extras:
        install_torch_without_cuda()
    say(f"installing the locked versions ({', '.join(sorted(extras))})")
    # What builds: this package, and those that come as source (a new environment's own setuptools may be too old to).
    pip(["install", "-c", str(LOCK), "hatchling", "setuptools"])
    pip(["install", "-c", str(LOCK), "--no-build-isolation", "-e", f"{ROOT}[{','.join(sorted(extras | done))}]"])
    STAMP.write_text("\n".join([digest, *sorted(extras | done)]) + "\n")
    compile_own_code()


def compile_own_code() -> None:
    """pip compiles what it installs, but not what stays in its checkout: with PYTHONDONTWRITEBYTECODE (containers set
    it often) every command would compile kdcloud anew, a quarter of the time of `kdcloud plan`."""
    python = str(VENV / "bin" / "python")
    call([python, "-m", "compileall", "-q", *PACKAGES], "is the checkout writable? then run the same command again")


def refuse_what_cannot_work(extras: set[str]) -> None:
    """Ends with one clear sentence where the install could only fail later, in pip's words."""
    if sys.version_info < OLDEST:
        found = platform.python_version()
        stop(f"kdcloud needs Python 3.11 or newer, this is {found}", "install one, then: make demo PYTHON=python3.12")
    try:
        import ensurepip  # noqa: F401
        import venv  # noqa: F401
    except ImportError:
        stop("this Python cannot make virtual environments", "on Debian and Ubuntu: apt install python3-venv")
    if "local" in extras and (platform.system(), platform.machine()) == ("Darwin", "x86_64"):
        stop(
            "PyTorch has no builds for Intel Macs any more", "use a Linux machine or container, or an Apple silicon Mac"
        )


def fingerprint() -> str:
    """Changes whenever an install would come out differently."""
    digest = hashlib.sha256()
    for path in (LOCK, ROOT / "pyproject.toml", Path(__file__)):
        digest.update(path.read_bytes())
    digest.update(str(ROOT).encode())  # an editable install points at its folder
    return digest.hexdigest()


def installed(digest: str) -> set[str]:
    """The extras that .venv holds already, as of this fingerprint."""
    lines = STAMP.read_text().split() if STAMP.is_file() else []
    return set(lines[1:]) if lines[:1] == [digest] else set()


def works(venv: Path) -> bool:
    """Whether its Python starts: it may have been moved, or its base upgraded away."""
    python = venv / "bin" / "python"
    if not python.exists():
        return False
    return subprocess.run([str(python), "-c", "import pip"], capture_output=True, check=False).returncode == 0


def install_torch_without_cuda() -> None:
    """On Linux, PyTorch's CPU build (0.2 GB instead of several) where its index answers; else pip decides later."""
    if platform.system() != "Linux" or platform.machine() not in CUDA_FREE_MACHINES:
        return
    version = re.search(r"^torch==(\S+)", LOCK.read_text(), re.MULTILINE)
    if version is None or torch_is_there(version.group(1)) or not answers(CPU_INDEX + "/torch/", version.group(1)):
        return
    say(f"taking PyTorch without CUDA from {CPU_INDEX}")
    # Everything else comes from where pip always takes it. If this fails nothing is lost: the next step pins torch.
    command = [str(VENV / "bin" / "python"), "-m", "pip", "--disable-pip-version-check", "install", "--no-deps"]
    subprocess.run([*command, "--index-url", CPU_INDEX, f"torch=={version.group(1)}"], check=False)


def torch_is_there(version: str) -> bool:
    show = [str(VENV / "bin" / "python"), "-m", "pip", "show", "torch"]
    shown = subprocess.run(show, capture_output=True, text=True, check=False).stdout
    return re.search(rf"^Version: {re.escape(version)}(\+|$)", shown, re.MULTILINE) is not None


def answers(url: str, version: str) -> bool:
    """Whether the page lists that version, asked for at most PROBE_S seconds, name look-up included."""
    found = []

    def ask() -> None:
        try:
            with urllib.request.urlopen(url, timeout=PROBE_S) as page:
                found.append(f"torch-{version}" in page.read().decode("utf-8", "replace"))
        except (urllib.error.URLError, OSError, ValueError):
            pass  # no network, a proxy, a firewall: the plain pin works too

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PROBE_S)
    return found == [True]


def pip(arguments: list[str]) -> None:
    python = str(VENV / "bin" / "python")
    hint = "read pip's last lines above; behind a proxy set HTTPS_PROXY, then run the same command again"
    call([python, "-m", "pip", "--disable-pip-version-check", *arguments], hint)


def call(command: list[str], hint: str) -> None:
    if subprocess.run(command, cwd=str(ROOT), check=False).returncode != 0:
        stop(f"this failed: {' '.join(command)}", hint)


def say(text: str) -> None:
    print(f"kdcloud: {text}", flush=True)


def stop(message: str, hint: str) -> None:
    sys.exit(f"kdcloud: {message}\n         {hint}")


if __name__ == "__main__":
    main()
