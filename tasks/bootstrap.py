"""What happens on a rented machine before the supervisor runs? Sent as text, run by whatever Python 3 is there.

    python3 -c "$(cat tasks/bootstrap.py)" --job label-1 --end slurm --sha256 HEX -- python -m tasks.supervisor ...

Standard library only. It makes sure that a job starts once, that the code is the run's own (by sha256), that Python has
the packages it needs, and that all of this is taken off the time the supervisor is given. When the job is over it says
so on the last line, and asks the provider to end the machine soon, should no client come and do it.

A job may be several stages, one after another (`--then` among the supervisor's words): each gets the environment that
it needs and a supervisor of its own, as long as the one before it is done.

Packages: a Python that has them is used as it is, be it in the image or in ~/.kdcloud/env. Else the environment that
the stage asked for is made from the locked file that came with the code, whole and by hash, in a folder named by what
is in it: two kinds of stages do not meet, a later one finds it ready, and half of one is never taken for whole.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import threading
import time
import urllib.request
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, NamedTuple, NoReturn

ENDED = "[kdcloud] job {job} ended with {rc}"  # the provisioner looks for this line
TWICE = 75  # EX_TEMPFAIL: this job was started before; the other one counts
NO_CODE = 66  # EX_NOINPUT
NO_PACKAGES = 69  # EX_UNAVAILABLE
BEAT_S = 2.0
LINGER_S = 60  # how long a machine whose job is over waits for its client
CODE_URL = "KDCLOUD_CODE_URL"  # a link that fetches the wheel without credentials; secret
PACKAGES = "KDCLOUD_PACKAGES"  # JSON: {module: requirement}
CONSTRAINTS = "KDCLOUD_CONSTRAINTS"  # JSON: lines of a constraints file, versions of what the packages need in turn
ENVIRONMENTS = "KDCLOUD_ENVIRONMENTS"  # names of locked environments, the one wanted most first; none: PACKAGES alone
THEN = "KDCLOUD_THEN"  # JSON: [{PACKAGES: ..., ENVIRONMENTS: [...]}, ...], of the stages after the first
SETUP = "KDCLOUD_SETUP"  # for the stage, JSON: which environment it got, in how many seconds, and why not the first
LOCKS = "environments"  # folder in the code's zip
OLDEST, NEWEST = (3, 11), (3, 13)  # the Pythons that tasks are written for and the locks hold for
UV = "uv==0.13.9"  # where a machine has none
READY = "kdcloud-ready.json"  # written last
VLLM = ("label", "label-box")  # environments with vLLM in them
EXTRA_MODULES = dict.fromkeys(VLLM, ("vllm",))  # beside those of PACKAGES

# NVIDIA, "CUDA Compatibility", minor version compatibility: 13.x runs on drivers from 580 on, 12.x from 525 on. CUDA 13
# has no code for cards below 7.5 any more (V100: 7.0); torch's build for CUDA 12.6 has, but none for 10.0 and above.
CUDA13_DRIVER, CUDA12_DRIVER = 580, 525
CUDA13_CARD, CUDA126_CARDS = (7, 5), ((5, 0), (9, 0))
VLLM_CARD = (7, 5)  # vLLM's installation page; fp16 below 8.0 by itself
OLDER_TORCH = "cu126"
TORCH_LINES = re.compile(r"(torch|triton|nvidia-|cuda-)")  # what another build of torch brings itself
FULL_DISK = 2.3  # bytes on the disk for each one fetched (9.47 GB from 4.27, 5.17 from 2.88)
SECRET = re.compile(r"AWS_|HF_|KDCLOUD_|.*(KEY|TOKEN|SECRET|PASSW|CREDENTIAL)", re.I)  # not for what installs


def main() -> NoReturn:
    began_s = clock_s()
    parser = argparse.ArgumentParser(prog="bootstrap")
    parser.add_argument("--job", required=True)
    parser.add_argument("--end", default="", help="who can end this machine: slurm, or nobody")
    parser.add_argument("--code", default="", help="path of the wheel, where machine and client share a file system")
    parser.add_argument("--sha256", default="")
    parser.add_argument("--gpu", action="store_true", help="the machine was ordered with a GPU")
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
    rc, wheel = NO_CODE, None
    try:
        if args.sha256:
            wheel = fetch(args.code, env.pop(CODE_URL, ""), args.sha256, own / "code")
            env["PYTHONPATH"] = str(wheel)
        rc = NO_PACKAGES
        heard: list[int] = []
        each = wanted_by_each(args.argv, env, wheel, args.gpu)
        for index, argv in enumerate(orders(args.argv)):
            if heard:  # it was to end while the stage before was ending by itself
                rc = 128 + heard[0]
                break
            rc, own_env = NO_PACKAGES, dict(env)
            left_s = limit_s(argv) - (clock_s() - began_s)
            python = make_ready(own, each[index], own_env, time.monotonic() + left_s)
            argv = [python if argv[0] == "python" else argv[0], *argv[1:]]
            rc = run(less_time(argv, clock_s() - began_s), own_env, work, heard)
            if rc:
                break
    except (OSError, ValueError, subprocess.SubprocessError, zipfile.BadZipFile) as error:
        say(str(error))
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


# --- one stage after another


def orders(argv: list[str]) -> list[list[str]]:
    """The command of each stage: with its own name, attempt and time, what later ones are to have left out of it."""
    if "--then" not in argv:
        return [argv]
    at = argv.index("--then")
    links = [part.split(":") for part in argv[at + 1].split(",")]
    first = argv[:at] + argv[at + 2 :]
    made = []
    for index in range(len(links) + 1):
        kept_s = sum(float(link[2]) for link in links[index:])
        words = with_value(first, "--remaining-s", f"{limit_s(argv) - kept_s:.3f}")
        if index:
            stage, attempt, _ = links[index - 1]
            words = with_value(with_value(words, "--stage", stage), "--attempt", attempt)
        made.append(words)
    return made


def with_value(argv: list[str], option: str, value: str) -> list[str]:
    if option not in argv:
        return argv
    at = argv.index(option) + 1
    return [*argv[:at], value, *argv[at + 1 :]]


def wanted_by_each(argv: list[str], env: dict[str, str], wheel: Path | None, gpu: bool) -> list[Wanted]:
    """What each stage was sent with; takes it out of `env`."""
    names, constraints = env.pop(ENVIRONMENTS, "").split(), json.loads(env.pop(CONSTRAINTS, "[]"))
    each = [(json.loads(env.pop(PACKAGES, "{}")), names)]
    each += [(one[PACKAGES], one[ENVIRONMENTS]) for one in json.loads(env.pop(THEN, "[]"))]
    each += each[:1] * (len(orders(argv)) - len(each))  # whoever sent no list wants the same for all
    locks = locks_in(wheel) if any(wanted for _, wanted in each) else {}
    return [Wanted(packages, constraints, wanted, locks, gpu) for packages, wanted in each]


# --- which environment: values in, a choice out


class Seen(NamedTuple):
    """What of a machine decides which packages can work on it."""

    driver: int | None = None  # NVIDIA's major version; None: no such GPU
    card: tuple[int, int] | None = None  # compute capability; None: not told
    compiler: bool = True  # Triton, which vLLM needs, compiles a launcher for each kernel
    kind: str = "linux x86_64"


class Choice(NamedTuple):
    environment: str  # "": none of the locked ones
    torch: str  # "": as locked; else PyTorch's name of another CUDA build
    why: str  # not the one wanted most


class Wanted(NamedTuple):
    """What the stage was sent with."""

    packages: dict[str, str]
    constraints: list[str]
    environments: list[str]
    locks: dict[str, str]
    gpu: bool


def choose(wanted: Wanted, seen: Seen) -> Choice:
    """The first environment that can work on the machine. Raises ValueError, with what to do, when none can."""
    if wanted.gpu and wanted.environments and seen.driver is None:
        raise ValueError(
            "this machine was ordered with a GPU, and nvidia-smi shows none: nothing was installed. Resume the run, "
            "which takes another machine, or leave this infra out"
        )
    reasons: list[str] = []
    for name in wanted.environments:
        if name not in wanted.locks or seen.kind != "linux x86_64":
            return Choice("", "", f"no locked environment {name} for {seen.kind}: packages are taken by version")
        reason = unfit(name, seen)
        if reason is None:
            return Choice(name, torch_build(name, seen), "; ".join(reasons))
        reasons.append(reason)
    if reasons:
        raise ValueError(f"{'; '.join(reasons)}. Nothing was installed: take other gpus, or a newer image")
    return Choice("", "", "")


def unfit(name: str, seen: Seen) -> str | None:
    """Why an environment cannot work on a machine."""
    card = ".".join(map(str, seen.card or ()))
    if name in VLLM:
        if seen.driver is None:
            return "vLLM needs an NVIDIA GPU, and there is none"
        if seen.driver < CUDA13_DRIVER:
            return f"vLLM's wheel is for CUDA 13, which needs NVIDIA driver {CUDA13_DRIVER}; this is {seen.driver}"
        if seen.card and seen.card < VLLM_CARD:
            return f"vLLM needs compute capability {VLLM_CARD[0]}.{VLLM_CARD[1]}; this card has {card}"
        return None if seen.compiler else "vLLM needs a C compiler, and there is none (apt install gcc)"
    if seen.driver is None or torch_build(name, seen) == "":
        return None
    if seen.driver < CUDA12_DRIVER:
        return f"NVIDIA driver {seen.driver} is too old: {CUDA12_DRIVER} or newer is needed"
    low, high = CUDA126_CARDS
    if seen.card and not low <= seen.card <= high:
        return f"no build of torch is for NVIDIA driver {seen.driver} and compute capability {card}"
    return None


def torch_build(name: str, seen: Seen) -> str:
    if name in VLLM or seen.driver is None:
        return ""
    new = seen.driver >= CUDA13_DRIVER and (seen.card is None or seen.card >= CUDA13_CARD)
    return "" if new else OLDER_TORCH


def look() -> Seen:
    """What this machine is, before anything is fetched for it. Of several GPUs the weakest counts."""
    kind = f"{sys.platform} {platform.machine()}"
    compiler = any(shutil.which(name) for name in (os.environ.get("CC") or "cc", "gcc", "clang"))
    ask = ["nvidia-smi", "--query-gpu=driver_version,compute_cap", "--format=csv,noheader"]
    try:
        told = subprocess.run(ask, stdout=subprocess.PIPE, text=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError):
        told = ""
    drivers = [int(found) for found in re.findall(r"^(\d+)\.[\d.]+\b", told, re.MULTILINE)]
    cards = [(int(major), int(minor)) for major, minor in re.findall(r", *(\d+)\.(\d+)\s*$", told, re.MULTILINE)]
    if not drivers:
        return Seen(None, None, compiler, kind)
    return Seen(min(drivers), min(cards, default=None), compiler, kind)


# --- making it


class Failed(ValueError):
    """A command did not do what it was called for."""


def make_ready(own: Path, wanted: Wanted, env: dict[str, str], until_s: float) -> str:
    """A Python that has what is wanted. Tells the stage in `env` what it got. Raises what main() reports."""
    began_s, seen = time.monotonic(), look()
    name, torch, why, made = "", "", "", False
    try:
        choice = choose(wanted, seen)
        name, torch, why = choice.environment, choice.torch, choice.why
        python = prepared(own, [*wanted.packages, *EXTRA_MODULES.get(name, ())])
    except ValueError:  # what the machine's owner laid ready may know better
        python = prepared(own, list(wanted.packages))
        if python is None:
            raise
    if why:
        say(why)
    if python is not None:
        got, torch = "the machine's own Python", ""
    elif name:
        (python, made), got = environment(own, name, torch, wanted, seen, until_s), name
    else:
        (python, made), got = by_version(own, wanted, until_s), "packages by version"
    took_s = time.monotonic() - began_s
    if wanted.packages:
        say(f"environment: {got}, {'made' if made else 'ready'} in {took_s:.0f} s ({python})")
    if python.startswith(str(own)):  # what is compiled on the way calls its tools by name
        folder = Path(python).parent.parent
        env["PATH"], env["VIRTUAL_ENV"] = f"{folder / 'bin'}{os.pathsep}{env.get('PATH', '')}", str(folder)
    env[SETUP] = json.dumps({"environment": got, "torch": torch, "seconds": round(took_s, 1), "why": why})
    return python


def prepared(own: Path, modules: list[str]) -> str | None:
    """A Python that has the modules without our doing: in ~/.kdcloud/env, or this one."""
    for candidate in (str(own / "env" / "bin" / "python"), sys.executable):
        if shutil.which(candidate) and has(candidate, modules):
            return candidate
    return None


def environment(own: Path, name: str, torch: str, wanted: Wanted, seen: Seen, until_s: float) -> tuple[str, bool]:
    """(Python of the locked environment, whether it was made just now)."""
    text = wanted.locks[name]
    modules = [*wanted.packages, *EXTRA_MODULES.get(name, ())]

    def install(folder: Path, uv: str) -> None:
        counts = re.search(r"(\d+) packages, (\d+) bytes", text)
        fetched = int(counts.group(2)) if counts else 0
        room = shutil.disk_usage(str(folder)).free
        if room < FULL_DISK * fetched:
            raise ValueError(
                f"environment {name} takes {FULL_DISK * fetched / 1e9:.0f} GB of disk, and {room / 1e9:.0f} are free: "
                "take a machine with a larger disk"
            )
        say(f"making environment {name}: {fetched / 1e9:.1f} GB to fetch")
        lock = folder / "lock.txt"
        lock.write_text(without_torch(text) if torch else text)
        strict = ["--quiet", "--require-hashes", "--no-build"]
        call([uv, "pip", "sync", *strict, "--python", python_of(folder), str(lock)], until_s)
        if torch:
            (pin,) = re.findall(r"^torch==[0-9.]+", text, re.MULTILINE)
            say(f"{pin} for {torch}, by version: its hashes are not in the lock (driver {seen.driver})")
            more = ["--quiet", "--no-build", "--torch-backend", torch]
            call([uv, "pip", "install", *more, "--python", python_of(folder), pin], until_s)
        check(python_of(folder), modules, gpu=seen.driver is not None)

    return made_once(own, name, f"{text}\n{torch}", install, until_s)


def by_version(own: Path, wanted: Wanted, until_s: float) -> tuple[str, bool]:
    """(Python with the packages in their locked versions, what they need constrained; whether it was made just now)."""

    def install(folder: Path, uv: str) -> None:
        versions = folder / "constraints.txt"
        versions.write_text("".join(f"{line}\n" for line in wanted.constraints))
        pinned = ["-c", str(versions), *wanted.packages.values()]
        call([uv, "pip", "install", "--quiet", "--python", python_of(folder), *pinned], until_s)

    return made_once(own, "packages", json.dumps([wanted.packages, wanted.constraints]), install, until_s)


def made_once(
    own: Path,
    name: str,
    contents: str,
    install: Callable[[Path, str], None],
    until_s: float,
    *,
    newest: tuple[int, int] = NEWEST,
) -> tuple[str, bool]:
    """The Python of the environment with such contents, made if need be: by one process at a time, ready at the end.

    `install` fills its folder, with the uv that it is told; `newest` is the last Python that the packages are for.
    """
    folder = own / "envs" / f"{name}-{hashlib.sha256(contents.encode()).hexdigest()[:16]}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{folder}.lock", "w") as lock:
        while not locked(lock):
            if time.monotonic() > until_s:
                raise ValueError(f"another job did not finish making environment {name} in time")
            time.sleep(0.5)
        if (folder / READY).exists() and has(python_of(folder), []):
            return python_of(folder), False
        shutil.rmtree(str(folder), ignore_errors=True)  # one that was interrupted
        began_s, uv = time.monotonic(), find_uv(own, until_s)
        make_venv(uv, folder, until_s, newest)
        try:
            install(folder, uv)
        except Failed as error:
            raise ValueError(
                f"environment {name} could not be made: {error}. What there is of it will not be used: resume the run, "
                "or take an image that has these packages"
            ) from error
        part = folder / f"{READY}.part"
        part.write_text(json.dumps({"seconds": round(time.monotonic() - began_s, 1)}))
        part.replace(folder / READY)
    return python_of(folder), True


def locked(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def find_uv(own: Path, until_s: float) -> str:
    """uv of the machine; else one installed with its pip beside our own things."""
    mine = own / "uv"
    for candidate in ("uv", str(Path.home() / ".local/bin/uv"), str(mine / "bin/uv")):
        found = shutil.which(candidate)
        if found:
            return found
    say(f"installing {UV}")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    try:
        call([*pip, "--target", str(mine), "--only-binary", ":all:", UV], until_s)
    except Failed as error:
        raise ValueError(
            f"this machine has no uv, and its Python has no pip that could install it ({error}): take an image with "
            "uv, or with pip (apt install python3-pip)"
        ) from error
    return str(mine / "bin" / "uv")


def make_venv(uv: str, folder: Path, until_s: float, newest: tuple[int, int] = NEWEST) -> None:
    """An environment on this Python where it is new enough and has its headers (Triton compiles against them), else on
    one that uv brings, else on any that it finds."""
    version = sys.version_info[:2]
    here = OLDEST <= version <= newest and (Path(sysconfig.get_path("include")) / "Python.h").exists()
    low, high = ".".join(map(str, OLDEST)), ".".join(map(str, (newest[0], newest[1] + 1)))
    some = [f">={low},<{high}"]
    tries = [[sys.executable]] if here else [["3.12", "--python-preference", "only-managed"], some]
    for last, words in enumerate(tries, 1 - len(tries)):
        try:
            call([uv, "venv", "--quiet", "--python", *words, str(folder)], until_s)
            return
        except Failed as error:
            if last == 0:
                raise ValueError(
                    f"no environment could be made ({error}): it takes a Python from {low} to below {high}, and uv "
                    "could not fetch one"
                ) from error
            say("uv could not fetch a Python of its own: trying one of the machine's, which may lack headers")
            shutil.rmtree(str(folder), ignore_errors=True)


def call(command: list[str], until_s: float) -> None:
    """Runs it without the job's secrets. Raises Failed, or ValueError when the time is up."""
    env = {name: value for name, value in os.environ.items() if not SECRET.match(name) and name != "PYTHONPATH"}
    env.setdefault("UV_HTTP_TIMEOUT", "120")
    try:
        subprocess.run(command, check=True, env=env, stdin=subprocess.DEVNULL, timeout=until_s - time.monotonic())
    except subprocess.TimeoutExpired as error:
        raise ValueError(f"the time was up before `{short(command)}` was done") from error
    except subprocess.CalledProcessError as error:
        raise Failed(f"`{short(command)}` ended with {error.returncode}, its words are above") from error


def short(command: list[str]) -> str:
    return " ".join([Path(command[0]).name, *command[1:3]])


def check(python: str, modules: list[str], *, gpu: bool) -> None:
    """Whether what was installed is what was wanted, and computes on the GPU. Raises ValueError."""
    if not has(python, modules):
        raise ValueError(f"the environment lacks one of {', '.join(modules)}: the lock does not fit this kdcloud")
    if gpu and "torch" in modules:
        code = "import torch; torch.zeros(8, device='cuda').add_(1).cpu()"
        if subprocess.run([python, "-c", code], timeout=600).returncode:
            raise ValueError("torch does not compute on this GPU (its words are above): take another machine or image")


def python_of(folder: Path) -> str:
    return str(folder / "bin" / "python")


def without_torch(text: str) -> str:
    """A lock less the lines of torch and of the CUDA that it brings."""
    kept = []
    keep = True
    for line in text.splitlines():
        if not line.startswith(" "):
            keep = TORCH_LINES.match(line) is None
        if keep:
            kept.append(line)
    return "\n".join(kept) + "\n"


def locks_in(wheel: Path | None) -> dict[str, str]:
    """Texts of the locked environments that came with the code; none from before there were any."""
    if wheel is None or not zipfile.is_zipfile(str(wheel)):
        return {}
    with zipfile.ZipFile(str(wheel)) as code:
        names = [name for name in code.namelist() if name.startswith(f"{LOCKS}/")]
        return {Path(name).stem: code.read(name).decode() for name in names}


def has(python: str, modules: list[str]) -> bool:
    code = (
        f"import sys, importlib.util as u; sys.exit(bool(sys.argv[1:]) and sys.version_info < {OLDEST}"
        " or any(u.find_spec(m) is None for m in sys.argv[1:]))"
    )
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    try:
        return subprocess.run([python, "-c", code, *modules], env=env, timeout=60).returncode == 0
    except OSError:
        return False


def say(text: str) -> None:
    print(f"[kdcloud] {text}", flush=True)


def limit_s(argv: list[str]) -> float:
    """Seconds the command has in all, if it says so."""
    return float(argv[argv.index("--remaining-s") + 1]) if "--remaining-s" in argv else 3600.0


def less_time(argv: list[str], spent_s: float) -> list[str]:
    """The same command with what was spent here taken off its `--remaining-s`."""
    if "--remaining-s" not in argv:
        return argv
    at = argv.index("--remaining-s") + 1
    return [*argv[:at], f"{float(argv[at]) - spent_s:.3f}", *argv[at + 1 :]]


def run(argv: list[str], env: dict[str, str], work: Path, heard: list[int]) -> int:
    """Exit status of the command, which hears the signals that were meant for it; they are added to `heard`, too."""
    child = subprocess.Popen(argv, env=env, cwd=work, stdin=subprocess.DEVNULL)

    def pass_on(number: int, frame: object) -> None:
        heard.append(number)
        child.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    rc = child.wait()
    for number, handler in before.items():
        signal.signal(number, handler)
    return rc if rc >= 0 else 128 - rc


def clock_s() -> float:
    """Seconds on a clock that nobody sets and that goes on while the machine sleeps."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


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
