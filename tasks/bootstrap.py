"""What happens on a rented machine before the supervisor runs? Sent as text, run by whatever Python 3 is there.

    python3 -c "$(cat tasks/bootstrap.py)" --job label-1 --end slurm --sha256 HEX -- python -m tasks.supervisor ...

Standard library only. It makes sure that a job starts once, that the code is the run's own (by sha256), that Python has
the packages it needs, and that all of this is taken off the time the supervisor is given. When the job is over it says
so on the last line, and asks the provider to end the machine soon, should no client come and do it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path
from typing import NoReturn

ENDED = "[kdcloud] job {job} ended with {rc}"  # the provisioner looks for this line
TWICE = 75  # EX_TEMPFAIL: this job was started before; the other one counts
NO_CODE = 66  # EX_NOINPUT
NO_PACKAGES = 69  # EX_UNAVAILABLE
BEAT_S = 2.0
LINGER_S = 60  # how long a machine whose job is over waits for its client
CODE_URL = "KDCLOUD_CODE_URL"  # a link that fetches the wheel without credentials; secret
PACKAGES = "KDCLOUD_PACKAGES"  # JSON: {module: requirement}
CONSTRAINTS = "KDCLOUD_CONSTRAINTS"  # JSON: lines of a constraints file, versions of what the packages need in turn
OLDEST = (3, 11)  # the Python that tasks are written for


def main() -> NoReturn:
    began_s = time.monotonic()
    parser = argparse.ArgumentParser(prog="bootstrap")
    parser.add_argument("--job", required=True)
    parser.add_argument("--end", default="", help="who can end this machine: slurm, or nobody")
    parser.add_argument("--code", default="", help="path of the wheel, where machine and client share a file system")
    parser.add_argument("--sha256", default="")
    parser.add_argument("argv", nargs="+")
    args = parser.parse_args()
    own = Path.home() / ".kdcloud"
    mark = own / "jobs" / args.job
    if not starts_now(mark):
        say_ended(args.job, TWICE)
        sys.exit(TWICE)
    threading.Thread(target=beat, args=(mark / "beat",), daemon=True).start()
    work = own / "work" / args.job
    work.mkdir(parents=True, exist_ok=True)
    env = dict(os.environ)
    rc = NO_CODE
    try:
        if args.sha256:
            env["PYTHONPATH"] = str(fetch(args.code, env.pop(CODE_URL, ""), args.sha256, own / "code"))
        rc = NO_PACKAGES
        packages, constraints = json.loads(env.pop(PACKAGES, "{}")), json.loads(env.pop(CONSTRAINTS, "[]"))
        python = choose_python(own, packages, constraints, limit_s(args.argv))
        argv = [python if args.argv[0] == "python" else args.argv[0], *args.argv[1:]]
        rc = run(less_time(argv, time.monotonic() - began_s), env, work)
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        print(f"[kdcloud] {error}", flush=True)
    (mark / "rc.part").write_text(str(rc))
    (mark / "rc.part").replace(mark / "rc")
    end_soon(args.end)
    say_ended(args.job, rc)
    sys.exit(rc)


def starts_now(mark: Path) -> bool:
    """Whether this is the first start of the job on this machine."""
    mark.parent.mkdir(parents=True, exist_ok=True)
    try:
        mark.mkdir()
    except FileExistsError:
        return False
    return True


def beat(file: Path) -> NoReturn:
    """Shows on a shared file system that this process is alive."""
    while True:
        file.touch()
        time.sleep(BEAT_S)


def fetch(path: str, url: str, sha256: str, folder: Path) -> Path:
    """The wheel, verified. Raises ValueError when its bytes are not the run's, OSError when it cannot be had."""
    if path:
        data = Path(path).read_bytes()
    else:
        if not url.startswith(("https://", "http://127.0.0.1", "http://localhost")):
            raise ValueError("no link to the code was given")
        with urllib.request.urlopen(url, timeout=60) as answer:
            data = answer.read()
    if hashlib.sha256(data).hexdigest() != sha256:
        raise ValueError("the code in the bucket is not what the run was started with")
    folder.mkdir(parents=True, exist_ok=True)
    wheel = folder / f"{sha256}.whl"
    part = wheel.with_suffix(f".{os.getpid()}")
    part.write_bytes(data)
    part.replace(wheel)
    return wheel


def choose_python(own: Path, packages: dict[str, str], constraints: list[str], limit_s: float) -> str:
    """A Python that has `packages`: one made ready before, this one, or a new environment. Raises SubprocessError."""
    oldest = ".".join(map(str, OLDEST))
    ready = own / "env" / "bin" / "python"
    for candidate in (str(ready), sys.executable):
        if shutil.which(candidate) and has(candidate, list(packages)):
            return candidate
    uv = shutil.which("uv") or shutil.which(str(Path.home() / ".local/bin/uv"))
    if not ready.exists():
        venv = [uv, "venv", "--quiet", "--python", f">={oldest}"] if uv else [sys.executable, "-m", "venv"]
        subprocess.run([*venv, str(own / "env")], check=True, timeout=limit_s)
    versions = own / "constraints.txt"
    versions.write_text("".join(f"{line}\n" for line in constraints))
    install = [uv, "pip", "install", "--python", str(ready)] if uv else [str(ready), "-m", "pip", "install"]
    subprocess.run([*install, "--quiet", "-c", str(versions), *packages.values()], check=True, timeout=limit_s)
    return str(ready)


def has(python: str, modules: list[str]) -> bool:
    code = (
        f"import sys, importlib.util as u; sys.exit(bool(sys.argv[1:]) and sys.version_info < {OLDEST}"
        " or any(u.find_spec(m) is None for m in sys.argv[1:]))"
    )
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run([python, "-c", code, *modules], env=env, timeout=60).returncode == 0


def limit_s(argv: list[str]) -> float:
    """Seconds the command has in all, if it says so."""
    return float(argv[argv.index("--remaining-s") + 1]) if "--remaining-s" in argv else 3600.0


def less_time(argv: list[str], spent_s: float) -> list[str]:
    """The same command with what was spent here taken off its `--remaining-s`."""
    if "--remaining-s" not in argv:
        return argv
    at = argv.index("--remaining-s") + 1
    return [*argv[:at], f"{float(argv[at]) - spent_s:.3f}", *argv[at + 1 :]]


def run(argv: list[str], env: dict[str, str], work: Path) -> int:
    """Exit status of the command, which hears the signals that were meant for it."""
    child = subprocess.Popen(argv, env=env, cwd=work, stdin=subprocess.DEVNULL)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda number, frame: child.send_signal(number))
    rc = child.wait()
    return rc if rc >= 0 else 128 - rc


def end_soon(who: str) -> None:
    """Brings the machine's end nearer, by the provider's own clock: nothing of ours has to stay alive for it."""
    job = os.environ.get("SLURM_JOB_ID")
    if who == "slurm" and job:
        order = ["scontrol", "update", f"JobId={job}", f"EndTime=now+{LINGER_S}"]
        done = subprocess.run(order, capture_output=True, text=True, timeout=30)
        if done.returncode:
            print(f"[kdcloud] this machine cannot end itself: {done.stderr.strip()}", flush=True)


def say_ended(job: str, rc: int) -> None:
    print(ENDED.format(job=job, rc=rc), flush=True)


if __name__ == "__main__":
    main()
