"""Machines that are processes of this machine: the embedded default behind the seam.

A "machine" is a folder `<home>/machines/<name>/`; its job is a process group of its own, watched through a lock that
the job inherits: whoever can take the lock knows the job is dead, with no race on process ids. Money, deadline and
watchdog act as they do on a cloud.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from orchestrator.provision import (
    NAME_PREFIX,
    Job,
    JobState,
    Latencies,
    Need,
    NotYetGone,
    Observation,
    Offer,
    Order,
    ProvisionError,
    Reach,
    Status,
)

LOCAL_LATENCIES = Latencies(tick_s=1, flush_s=15, api_s=2, provision_s=3, handover_s=2, slack_s=5)
MARKER = "KDCLOUD_MACHINE"  # in the environment of every process of a machine, so that none is overlooked

# Runs the job and keeps its exit status, in plain sh so that it costs milliseconds. Arguments arrive as "$@", unparsed.
_SHIM = 'rc="$1"; log="$2"; shift 2; "$@" >>"$log" 2>&1 </dev/null; s=$?; echo "$s" >"$rc.tmp"; mv "$rc.tmp" "$rc"'


class LocalProvisioner:
    """`root` is kdcloud's home; `price_micros_per_hour` what the recipe says an hour of this machine costs."""

    def __init__(self, root: Path | None = None, *, price_micros_per_hour: int = 0) -> None:
        home = root or Path(os.environ.get("KDCLOUD_HOME") or Path.home() / ".kdcloud")
        self._machines = home / "machines"
        self._price = price_micros_per_hour

    def offers(self, need: Need) -> list[Offer]:
        if need.gpus or (need.infra and "local" not in need.infra):
            return []
        return [local_offer(self._price)]

    def launch(self, order: Order) -> None:
        folder = self._machines / order.name
        try:
            self._machines.mkdir(parents=True, exist_ok=True, mode=0o700)
            if folder.exists():
                return
            making = self._machines / f".{order.name}.making"
            making.mkdir(exist_ok=True, mode=0o700)
            (making / "order.json").write_text(json.dumps(_order_to_dict(order)))
            try:
                making.rename(folder)
            except OSError:
                if not folder.exists():
                    raise
        except OSError as error:
            raise ProvisionError(
                f"cannot make {folder}: {error.strerror}", hint="check disk space and rights of KDCLOUD_HOME"
            ) from error

    def observe(self, name: str) -> Observation:
        folder = self._machines / name
        try:
            order = json.loads((folder / "order.json").read_text())
        except FileNotFoundError:
            return Observation(name, Status.ABSENT, None, None, Job(), _now())
        offer = Offer(
            **{
                **order["offer"],
                "as_of": datetime.fromisoformat(order["offer"]["as_of"]),
                "latencies": Latencies(**order["offer"]["latencies"]),
            }
        )
        job = self._job(folder)
        return Observation(
            name,
            Status.STOPPING if (folder / "ending").exists() else Status.RUNNING,
            offer,
            datetime.fromtimestamp((folder / "order.json").stat().st_mtime, UTC),
            job,
            _now(),
            ended_at=_ended_at(folder, job),
        )

    def run(self, name: str, job_id: str, argv: Sequence[str], env: Mapping[str, str]) -> None:
        folder = self._machines / name
        if not folder.exists():
            raise ProvisionError(f"{name} is gone")
        job = folder / "jobs" / job_id
        job.mkdir(parents=True, exist_ok=True)
        with _lock(job) as lock:
            if lock is None or (job / "started").exists():
                return
            (job / "started").write_text(_now().isoformat())
            command = [sys.executable if argv[0] == "python" else argv[0], *argv[1:]]
            subprocess.Popen(
                ["/bin/sh", "-c", _SHIM, "kd-job", str(job / "rc"), str(job / "output.txt"), *command],
                cwd=folder,
                env={**os.environ, **env, MARKER: name},
                pass_fds=(lock,),
                start_new_session=True,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )

    def logs(self, name: str, job_id: str) -> Iterator[str]:
        try:
            with open(self._machines / name / "jobs" / job_id / "output.txt", errors="replace") as lines:
                yield from (line.rstrip("\n") for line in lines)
        except FileNotFoundError:
            return

    def reach(self, name: str, job_id: str) -> Reach:
        return Reach((str(self._machines / name),))

    def terminate(self, name: str) -> None:
        """First call: SIGTERM, so that the supervisor saves what there is; after its flush limit SIGKILL to all."""
        folder = self._machines / name
        if not folder.exists():
            return
        processes = _processes_of(name)
        if processes:
            _press(folder, processes)
            raise NotYetGone(f"{name} is saving what it has")
        grave = self._machines / f".{name}.gone"
        try:
            folder.rename(grave)
        except FileNotFoundError:
            return
        shutil.rmtree(grave, ignore_errors=True)

    def ours(self) -> list[Observation]:
        if not self._machines.exists():
            return []
        for grave in self._machines.glob(".*.gone"):  # left by a client that was killed while it cleared up
            shutil.rmtree(grave, ignore_errors=True)
        return [self.observe(f.name) for f in sorted(self._machines.iterdir()) if f.name.startswith(NAME_PREFIX)]

    def _job(self, folder: Path) -> Job:
        jobs = (
            sorted((folder / "jobs").iterdir(), key=lambda j: j.stat().st_mtime) if (folder / "jobs").exists() else []
        )
        if not jobs:
            return Job()
        job = jobs[-1]
        try:
            return Job(job.name, JobState.DONE, int((job / "rc").read_text()))
        except FileNotFoundError:
            pass
        with _lock(job) as lock:
            if lock is None:
                return Job(job.name, JobState.RUNNING)
            if not (job / "started").exists():
                return Job()
            try:  # it may have ended between the two looks
                return Job(job.name, JobState.DONE, int((job / "rc").read_text()))
            except FileNotFoundError:
                return Job(job.name, JobState.LOST)


def local_offer(price_micros_per_hour: int) -> Offer:
    """This machine as an offer: no GPU, the memory that is there, the price the recipe gives."""
    return Offer(
        infra="local",
        region=None,
        instance=f"{os.cpu_count() or 1} cores",
        gpu=None,
        gpus=0,
        vram_gib=os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30,
        spot=False,
        price_micros_per_hour=price_micros_per_hour,
        as_of=_now(),
        source="the recipe",
        latencies=LOCAL_LATENCIES,
    )


class _lock:
    """The job's lock without waiting: the file descriptor, or None while the job (or its maker) holds it."""

    def __init__(self, job: Path) -> None:
        self._path = job / "lock"

    def __enter__(self) -> int | None:
        self._file = os.open(self._path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return None
        return self._file

    def __exit__(self, *exc: object) -> None:
        os.close(self._file)


def _processes_of(name: str) -> list[Any]:
    """Every process with this machine's marker in its environment, whatever group or session it moved to."""
    import psutil

    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARKER) == name and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess, OSError):
            continue
    return found


def _is_supervisor(process: Any) -> bool:
    import psutil

    try:
        return "tasks.supervisor" in process.cmdline()
    except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
        return False


def _press(folder: Path, processes: list[Any]) -> None:
    """SIGTERM to every supervisor once (to all processes where there is none), SIGKILL to all when time is up."""
    ending = folder / "ending"
    told: dict[str, Any] = {"since": time.monotonic(), "pids": []}
    if ending.exists():
        told = json.loads(ending.read_text())
    waited = time.monotonic() - told["since"]
    if _overdue(folder) or not 0 <= waited <= LOCAL_LATENCIES.flush_s + LOCAL_LATENCIES.tick_s:
        _signal(processes, signal.SIGKILL)
        return
    supervisors = [p for p in processes if _is_supervisor(p)]
    fresh = [p for p in supervisors or processes if p.pid not in told["pids"]]
    _signal(fresh, signal.SIGTERM)
    temporary = folder / "ending.part"
    temporary.write_text(json.dumps({**told, "pids": [*told["pids"], *(p.pid for p in fresh)]}))
    temporary.replace(ending)


def _overdue(folder: Path) -> bool:
    """Whether the supervisor should have ended by itself long ago: nothing is worth waiting for."""
    order = json.loads((folder / "order.json").read_text())
    age = time.time() - (folder / "order.json").stat().st_mtime
    return bool(age > order["lifetime_s"] + LOCAL_LATENCIES.tick_s + LOCAL_LATENCIES.flush_s)


def _signal(processes: list[Any], number: int) -> None:
    import psutil

    for process in processes:
        try:
            process.send_signal(number)
        except psutil.NoSuchProcess:
            continue


def _ended_at(folder: Path, job: Job) -> datetime | None:
    """When it stopped costing: its last job's end, or its making when it never had one; None while it works."""
    if job.state in (JobState.RUNNING, JobState.QUEUED):
        return None
    if job.state is JobState.NONE:
        return datetime.fromtimestamp((folder / "order.json").stat().st_mtime, UTC)
    last = max(f.stat().st_mtime for f in (folder / "jobs" / str(job.id)).iterdir())
    return datetime.fromtimestamp(last, UTC)


def _order_to_dict(order: Order) -> dict[str, Any]:
    raw = asdict(order)
    raw["deadline_at"] = order.deadline_at.isoformat()
    raw["offer"]["as_of"] = order.offer.as_of.isoformat()
    return raw


def _now() -> datetime:
    return datetime.now(UTC)
