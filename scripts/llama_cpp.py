"""Where does the llama.cpp that exports are compared with come from? Built from PyPI's source, once, into a cache.

Leaves .venv-export with it. The wheel is kept in $KDCLOUD_WHEELS (~/.cache/kdcloud-wheels), by version, options and
machine. Needs a C++ compiler; cmake and ninja come from PyPI where the machine has none.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VENV = ROOT / ".venv-export"
VERSION = "0.3.36"  # llama-cpp-python; its source holds the llama.cpp of its day
# A CPU build without server, tools, tests and network. Little optimization: the models are tiny, compiling takes
# minutes. Not for this very CPU: the cache may move to another.
OPTIONS = (
    "-DGGML_NATIVE=OFF -DGGML_OPENMP=OFF -DLLAVA_BUILD=OFF -DLLAMA_CURL=OFF -DLLAMA_OPENSSL=OFF "
    "-DLLAMA_BUILD_TOOLS=OFF -DLLAMA_BUILD_SERVER=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_TESTS=OFF "
    "-DCMAKE_C_FLAGS_RELEASE=-O1 -DCMAKE_CXX_FLAGS_RELEASE=-O1"
)


def main() -> None:
    """Does nothing where it is there already and starts."""
    python = VENV / "bin" / "python"
    if python.exists() and works(python):
        return
    wheel = built()
    call([sys.executable, "-m", "venv", "--clear", str(VENV)])
    call([str(python), "-m", "pip", "--disable-pip-version-check", "install", "--quiet", str(wheel)])
    if not works(python):
        sys.exit(f"kdcloud: llama.cpp was built and does not start\n         remove {wheel.parent} and try again")


def works(python: Path) -> bool:
    code = f"import llama_cpp; assert llama_cpp.__version__ == '{VERSION}'; llama_cpp.llama_backend_init()"
    return subprocess.run([str(python), "-c", code], capture_output=True, check=False).returncode == 0


def built() -> Path:
    """The wheel, from the cache where it is in it."""
    cache = Path(os.environ.get("KDCLOUD_WHEELS") or Path.home() / ".cache" / "kdcloud-wheels")
    libc = " ".join(platform.libc_ver())
    key = hashlib.sha256(f"{OPTIONS} {platform.system()} {platform.machine()} {libc}".encode()).hexdigest()[:12]
    folder = cache / f"llama-cpp-python-{VERSION}-{key}"
    found = sorted(folder.glob("*.whl"))
    if found:
        return found[0]
    if not any(map(shutil.which, ("c++", "g++", "clang++"))):
        sys.exit(
            "kdcloud: llama.cpp is built from source and needs a C++ compiler\n         apt install g++, or the like"
        )
    print(f"kdcloud: building llama-cpp-python {VERSION}, which takes minutes, once", flush=True)
    started = time.monotonic()
    making = cache / f"{folder.name}.{os.getpid()}"
    env = {**os.environ, "CMAKE_ARGS": OPTIONS, "CMAKE_BUILD_PARALLEL_LEVEL": str(os.cpu_count() or 1)}
    # pip's own cache would give a wheel of other options.
    requirement = f"llama-cpp-python=={VERSION}"
    pip = [
        sys.executable,
        "-m",
        "pip",
        "--disable-pip-version-check",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-cache-dir",
    ]
    call([*pip, "--no-binary", "llama-cpp-python", "--wheel-dir", str(making), requirement], env)
    shutil.rmtree(folder, ignore_errors=True)
    making.rename(folder)  # whole or not at all
    print(f"kdcloud: built in {time.monotonic() - started:.0f} s", flush=True)
    return next(folder.glob("*.whl"))


def call(command: list[str], env: dict[str, str] | None = None) -> None:
    if subprocess.run(command, cwd=ROOT, env=env, check=False).returncode != 0:
        sys.exit(f"kdcloud: this failed: {' '.join(command)}\n         read its last lines above")


if __name__ == "__main__":
    main()
