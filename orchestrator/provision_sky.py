"""Machines of every infra that SkyPilot knows, behind the seam: one pinned candidate a launch, bare, ending by itself.

What SkyPilot's words mean is decided by `SkyProvisioner` and the pure functions below it; `SkyApi` talks to SkyPilot,
and is the only place that imports it; `SlurmQueue` hears what Slurm itself says. Each machine has a note,
`<home>/sky/<name>.json`, so that a client that was killed finds its request again.
"""

from __future__ import annotations

import io
import json
import math
import os
import re
import shlex
import stat
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime, timedelta
from decimal import ROUND_CEILING, Decimal
from pathlib import Path
from typing import Any

from orchestrator.access import identity_of
from orchestrator.catalog import GPUS
from orchestrator.provision import (
    NAME_PREFIX,
    Job,
    JobState,
    Latencies,
    Need,
    NoCapacity,
    NotYetGone,
    Observation,
    Offer,
    Order,
    ProvisionError,
    Reach,
    Status,
)
from tasks.contract import install_hint

BOOTSTRAP = "bootstrap.py"  # of tasks: sent as text
SLURM_LATENCIES = Latencies(tick_s=5, flush_s=60, api_s=40, provision_s=60, handover_s=45, slack_s=90)
LIMITED_LATENCIES = Latencies(tick_s=5, flush_s=120, api_s=60, provision_s=90, handover_s=60, slack_s=90)
CLOUD_LATENCIES = replace(LIMITED_LATENCIES, unguarded_s=570)  # no time limit at create: a reaper may be that late
SLURM_LATE_S = 90  # Slurm looks at time limits once a minute, and then gives a job KillWait (30 s)
SLURM = "slurm"
LATENCIES = {SLURM: SLURM_LATENCIES, "kubernetes": LIMITED_LATENCIES}  # where `time_to_live` says something
# SkyPilot cannot make these end a machine by themselves (clouds/<name>.py: AUTODOWN is unsupported).
NO_AUTODOWN = frozenset({"hyperbolic", "primeintellect", "verda", "yotta"})
ONE_PRICE = frozenset({SLURM, "lambda", "hyperbolic"})  # no spot
COUNTED = frozenset({SLURM, "kubernetes", "ssh"})  # as many GPUs as asked for; elsewhere the instance type says it
SILENT_S = 15.0  # a bootstrap that was not heard of for longer may be dead
DOWN_WAIT_S = 15.0  # a teardown is usually done by then
COLOURS = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
LOG_LINE = re.compile(r"^\(([^()]*), (?:rank=\d+, )?pid=\d+(?:, ip=[^)]*)?\) ?(.*)$")
JOB_RC = re.compile(r"^\[kdcloud\] job (\S+) ended with (\d+)$")
CLOUDS_WITH_LABELS = frozenset({"aws", "gcp", "azure", "kubernetes"})
MOVING = frozenset({"PENDING", "WAITING", "RUNNING"})  # of a request
JOB_STATES = {
    "INIT": JobState.QUEUED,
    "PENDING": JobState.QUEUED,
    "SETTING_UP": JobState.QUEUED,
    "RUNNING": JobState.RUNNING,
    "SUCCEEDED": JobState.DONE,
    "FAILED": JobState.DONE,
    "FAILED_SETUP": JobState.DONE,
    "FAILED_DRIVER": JobState.LOST,
    "CANCELLED": JobState.LOST,
}


def from_env() -> SkyProvisioner:
    """KDCLOUD_PROVIDER=orchestrator.provision_sky:from_env"""
    return SkyProvisioner(Path(os.environ.get("KDCLOUD_HOME") or Path.home() / ".kdcloud"))


@dataclass
class Note:
    """What this client asked SkyPilot for, written before it asks."""

    name: str
    order: dict[str, Any] | None = None
    asked_at: str | None = None
    request: str | None = None  # of the launch
    timer: int | None = None  # minutes after which SkyPilot was told to tear it down
    trouble: str | None = None  # why the launch failed
    up: dict[str, Any] | None = None  # SkyPilot's row of it, read back when it was first up
    ending: bool = False
    ended: bool = False  # seen gone after an end was asked for: the name is used up
    down: str | None = None  # request of the teardown
    jobs: dict[str, dict[str, Any]] = field(default_factory=dict)  # by job id: {"request", "rc"}
    provider: dict[str, Any] | None = None  # how SkyPilot's own code reaches it once its record is gone


@dataclass(frozen=True)
class Record:
    """A row of `sky status`."""

    name: str
    status: str  # INIT | UP | STOPPED
    launched_at: datetime
    price_micros_per_hour: int | None
    infra: str
    region: str | None
    zone: str | None
    instance: str
    gpu: str | None
    gpus: int
    spot: bool
    timer_minutes: int | None  # when SkyPilot tears it down; None: its timer is not armed, or only stops it
    provider: dict[str, Any] | None


@dataclass(frozen=True)
class SlurmJob:
    """A row of `squeue`: an allocation, which is a machine."""

    id: str
    name: str
    state: str
    began_at: datetime | None
    cluster: str
    work: tuple[Trace, ...] = ()  # only when a machine was named


@dataclass(frozen=True)
class Trace:
    """What one job left on the shared file system: its exit status, or how long ago its bootstrap was alive."""

    job_id: str
    rc: int | None
    silent_s: float


class SkyProvisioner:
    """`home`: kdcloud's own folder; `allow_account_key`: the recipe's word. `api`, `slurm`: replaced in tests."""

    def __init__(
        self,
        home: Path,
        *,
        allow_account_key: bool = False,
        api: SkyApi | None = None,
        slurm: SlurmQueue | None = None,
    ) -> None:
        self._folder, self._allow_account_key = home / "sky", allow_account_key
        self._api = api or SkyApi(self._folder)
        self._slurm = slurm or SlurmQueue(self._folder)

    # -- the seven calls ---------------------------------------------------------------------------------------------

    def offers(self, need: Need) -> list[Offer]:
        """From SkyPilot's catalogue, of the infra named or of all that are enabled. Slurm is asked live."""
        named = need.infra or tuple(self._api.enabled())
        found: list[Offer] = []
        for infra in named:
            cloud, _, place = infra.lower().partition("/")
            if cloud == "local":
                continue
            if cloud in NO_AUTODOWN:
                if need.infra:
                    refuse(infra)
                continue
            for where in [place] if place else (self._slurm.clusters() if cloud == SLURM else [""]):
                found += [o for o in self._of(cloud, where) if serves(o, need)]
        return found

    def launch(self, order: Order) -> None:
        refuse(order.offer.infra)
        if not order.offer.price_micros_per_hour:
            raise ProvisionError(
                f"the price of {order.offer.instance} is not known", hint="choose an offer with a price"
            )
        note = self._read(order.name)
        if note.ended or note.ending:
            raise ProvisionError(f"{order.name} was ended before", hint="a name is used once: order another machine")
        if note.request is not None:
            return
        if note.asked_at is not None:  # the last client was killed while it asked
            note.request = self._api.find("launch", order.name)
        if note.request is None:
            self._keep_keys()
            note.order, note.asked_at = order_to_dict(order), now().isoformat()
            note.timer = timer_minutes(order)
            self._write(note)
            note.request = self._api.launch(launch_task(order), order.name, note.timer)
        self._write(note)

    def observe(self, name: str) -> Observation:
        note = self._read(name)
        request, record, allocation = self._look(note)
        exists = self._exists(note, record, allocation)
        trouble = why_failed(note, request, record)
        if trouble is not None and note.trouble is None:
            note.trouble = trouble
            self._write(note)
        state = decide(note, request[0] if request else None, record, exists)
        if state is Status.ABSENT and record is not None and not note.ending:
            self._api.records([name], force=True)  # lets SkyPilot see it too, and drop its row
        if state is Status.RUNNING and record is not None and note.up is None:
            note.up, note.provider = record_to_dict(record), record.provider
            self._write(note)
        return Observation(
            name=name,
            state=state,
            landed_offer=landed(note, record) if state in (Status.RUNNING, Status.STOPPING) else None,
            created_at=created_at(record, allocation),
            job=self._job(note, allocation) if state is Status.RUNNING else Job(),
            read_at=now(),
        )

    def run(self, name: str, job_id: str, argv: Sequence[str], env: Mapping[str, str]) -> None:
        note = self._read(name)
        if note.ending or note.ended:
            raise ProvisionError(f"{name} is being ended")
        before = note.jobs.get(job_id)
        if before is not None:
            request = before.get("request") or self._api.find("exec", name)
            if request is not None and self._request(request)[0] not in ("FAILED", "CANCELLED"):
                note.jobs[job_id] = {**before, "request": request}
                self._write(note)
                return
        if self._has(note, job_id):
            return
        note.jobs[job_id] = {"request": None}
        self._write(note)
        request = self._api.exec(job_task(note, job_id, argv, env), name)
        note.jobs[job_id] = {"request": request}
        self._write(note)

    def logs(self, name: str, job_id: str) -> Iterator[str]:
        numbers = [row[0] for row in self._api.queue(name) if row[1] == job_id]
        if numbers:
            yield from printed(self._api.log(name, min(numbers)))

    def reach(self, name: str, job_id: str) -> Reach:
        """Over SkyPilot's own SSH; on Slurm a shell within the allocation, with the machine's home or the account's."""
        slurm = self._is_slurm(self._read(name))
        homes = ["~", *([f"~/.sky_clusters/{shlex.quote(name)}-????????"] if slurm else [])]
        config = self._api.ssh_config(name)
        key = config.parent.parent / "ssh-keys" / f"{name}.key"  # there as ~, which ssh does not take from HOME
        own = ("-i", str(key)) if key.is_file() else ()
        folders = tuple(f"{home}/.kdcloud/work/{shlex.quote(job_id)}" for home in homes)
        return Reach(folders, ("ssh", "-F", str(config), *own), name)

    def terminate(self, name: str) -> None:
        """Cancels a launch in progress, asks SkyPilot for the teardown, then the provider itself. Drops no record."""
        note = self._read(name)
        if not note.ending:
            note.ending = True
            self._write(note)
        finished = self._cancel_finished(note)
        if note.request is not None and self._request(note.request)[0] in MOVING:
            self._api.cancel(note.request)
            if self._request(note.request)[0] in MOVING:
                raise NotYetGone(f"the launch of {name} is being cancelled")
        record = next(iter(self._api.records([name], force=False)), None)
        if record is not None:
            self._down(note, wait_s=0.0 if finished else DOWN_WAIT_S)
        left = [j for j in self._slurm.jobs(self._clusters_of(note)) if is_named(j.name, name)]
        for job in left:  # SkyPilot does not know it (any more): a launch that was cancelled half-way
            if job.state not in ("COMPLETING",):
                self._slurm.cancel(job)
        if left or (record is None and self._exists(note, None, None)):
            raise NotYetGone(f"{name} is still listed by its provider")
        if note.order is not None:
            note.ended = True
            self._write(note)
        else:
            self._path(name).unlink(missing_ok=True)

    def ours(self) -> list[Observation]:
        """By name prefix, from SkyPilot and from every Slurm it knows. Their jobs are not asked for."""
        records = {r.name: r for r in self._api.records(None, force=True) if r.name.startswith(NAME_PREFIX)}
        listed = [j for j in self._slurm.jobs(self._slurm.clusters()) if j.name.startswith(NAME_PREFIX)]
        allocations = {re.sub(r"-[0-9a-f]{8}$", "", job.name): job for job in listed}
        found = []
        for name in sorted({*records, *allocations, *self._being_made()}):
            note, record, allocation = self._read(name), records.get(name), allocations.get(name)
            request = self._request(note.request)[0] if note.request and record is None else None
            state = decide(note, request, record, self._exists(note, record, allocation))
            if record is None and state is Status.CREATING and allocation is not None and note.order is None:
                state = Status.RUNNING  # SkyPilot has forgotten it
            found.append(Observation(name, state, landed(note, record), created_at(record, allocation), Job(), now()))
        return found

    # -- helpers -----------------------------------------------------------------------------------------------------

    def _look(self, note: Note) -> tuple[tuple[str, str] | None, Record | None, SlurmJob | None]:
        """How the launch fares, SkyPilot's row and Slurm's. Of a machine that was up before, Slurm alone is asked."""
        clusters = self._clusters_of(note)
        known = record_from_dict(note.up) if note.up and self._slurm.knows(clusters) else None
        with ThreadPoolExecutor(2) as pool:
            asks = note.request and not note.trouble and known is None
            asked = pool.submit(self._request, str(note.request)) if asks else None
            listed = pool.submit(self._slurm.jobs, clusters, note.name)
            request = asked.result() if asked else None
            record = known
            if known is None and (request is None or request[0] not in MOVING):  # a row before that says nothing
                record = next(iter(self._api.records([note.name], force=not clusters)), None)
            return request, record, next((job for job in listed.result() if is_named(job.name, note.name)), None)

    def _being_made(self) -> list[str]:
        """Machines this client asked for that nobody lists yet."""
        notes = [self._read(path.stem) for path in self._folder.glob(f"{NAME_PREFIX}*.json")]
        asked = [note for note in notes if note.request is not None and not note.ended and note.trouble is None]
        return [note.name for note in asked if self._request(str(note.request))[0] in MOVING]

    def _keep_keys(self) -> None:
        """Raises ProvisionError when SkyPilot would copy keys of an account to the machine and nobody allowed it."""
        keys = [] if self._allow_account_key else self._api.keys_that_travel()
        if keys:
            raise ProvisionError(
                f"SkyPilot would copy {', '.join(keys)} to the machine, and whoever owns it could use your account",
                hint="move them away while this runs, or set `allow_account_key: true` in the recipe",
            )

    def _of(self, cloud: str, where: str) -> Iterator[Offer]:
        as_of = now() if cloud in COUNTED else self._api.catalogue_date(cloud)
        for row in self._api.accelerators(cloud, where):
            yield from offers_of(cloud, where, row, as_of)

    def _cancel_finished(self, note: Note) -> bool:
        """Has Slurm itself end a machine at once that has nothing to save any more: SkyPilot takes its time."""
        try:
            listed = self._slurm.jobs(self._clusters_of(note), note.name)
            mine = [job for job in listed if is_named(job.name, note.name)]
            idle = [job for job in mine if job.work and all(trace.rc is not None for trace in job.work)]
            for job in idle:
                if job.state != "COMPLETING":
                    self._slurm.cancel(job)
        except ProvisionError:
            return False  # SkyPilot may still reach it
        return bool(idle)

    def _down(self, note: Note, *, wait_s: float) -> None:
        """Asks for the teardown, waits a little. Raises NotYetGone while it goes on, ProvisionError when it failed."""
        if note.down is None or self._request(note.down)[0] not in MOVING:
            note.down = self._api.down(note.name)
            self._write(note)
        until_s = time.monotonic() + wait_s
        while (seen := self._request(note.down))[0] in MOVING:
            if time.monotonic() > until_s:
                raise NotYetGone(f"{note.name} is being torn down")
            time.sleep(0.25)
        if seen[0] == "FAILED" and "does not exist" not in seen[1]:
            for job in self._slurm.jobs(self._clusters_of(note)):
                if is_named(job.name, note.name):
                    self._slurm.cancel(job)
            raise ProvisionError(f"SkyPilot could not tear {note.name} down: {seen[1]}", hint="it is asked again")

    def _exists(self, note: Note, record: Record | None, allocation: SlurmJob | None) -> bool:
        """Whether the provider itself has it; where only SkyPilot's word can be had, that."""
        if allocation is not None:
            return True
        if record is not None:
            return not (record.infra == SLURM and self._slurm.knows([record.region or ""]))
        if self._is_slurm(note) and self._slurm.knows(self._clusters_of(note)):
            return False
        return note.provider is not None and self._api.instances(note.name, note.provider) > 0

    def _has(self, note: Note, job_id: str) -> bool:
        """Whether the machine knows the job."""
        listed = self._slurm.jobs(self._clusters_of(note), note.name)
        if any(trace.job_id == job_id for job in listed if is_named(job.name, note.name) for trace in job.work):
            return True
        return note.jobs.get(job_id) is not None and job_id in [row[1] for row in self._api.queue(note.name)]

    def _job(self, note: Note, allocation: SlurmJob | None) -> Job:
        """The newest job: by its own traces where they are fresh, else by SkyPilot's table, which takes seconds."""
        if not note.jobs:
            return Job()
        newest = list(note.jobs)[-1]
        trace = next((t for t in (allocation.work if allocation else ()) if t.job_id == newest), None)
        if trace is not None and trace.rc is not None:
            return Job(newest, JobState.DONE, trace.rc)
        if trace is not None and trace.silent_s < SILENT_S:
            return Job(newest, JobState.RUNNING)
        request = note.jobs[newest]["request"]
        if request is not None and self._request(request)[0] in MOVING:
            return Job(newest, JobState.QUEUED)
        rows = [row for row in self._api.queue(note.name) if row[1] == newest]
        if not rows:
            return Job()
        number, _, status = min(rows)  # a second start of it does nothing
        state = JOB_STATES.get(status, JobState.LOST)
        rc = self._rc(note, newest, number, status) if state is JobState.DONE else None
        return Job(newest, JobState.LOST if state is JobState.DONE and rc is None else state, rc)

    def _rc(self, note: Note, job_id: str, number: int, status: str) -> int | None:
        """Exit status of a job that is over: SkyPilot says only whether it failed, the job's last line says how."""
        if status == "SUCCEEDED":
            return 0
        known = note.jobs[job_id].get("rc")
        if known is None:
            said = [JOB_RC.match(line) for line in printed(self._api.log(note.name, number))]
            found = [int(match[2]) for match in said if match and match[1] == job_id]
            known = found[-1] if found else None  # killed before it could say so
            note.jobs[job_id]["rc"] = known
            self._write(note)
        return known

    def _request(self, request: str) -> tuple[str, str]:
        """(status, why it failed); LOST when the server does not know it any more."""
        return self._api.request(request)

    def _clusters_of(self, note: Note) -> list[str]:
        """Slurm clusters to look at: the one ordered, or all when nothing is known of the machine."""
        if note.order is None:
            return self._slurm.clusters()
        cloud, _, place = str(note.order["offer"]["infra"]).partition("/")
        if cloud != SLURM:
            return []
        return [place] if place else self._slurm.clusters()

    def _is_slurm(self, note: Note) -> bool:
        return bool(self._clusters_of(note))

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}.json"

    def _read(self, name: str) -> Note:
        try:
            return Note(**json.loads(self._path(name).read_text()))
        except FileNotFoundError:
            return Note(name)

    def _write(self, note: Note) -> None:
        try:
            write_private(self._path(note.name), json.dumps(asdict(note)))
        except OSError as error:
            raise ProvisionError(
                f"cannot write {self._path(note.name)}: {error.strerror}", hint="check disk space and KDCLOUD_HOME"
            ) from error


# -- pure: what is asked for, and what the answers mean --------------------------------------------------------------


def decide(note: Note, request: str | None, record: Record | None, exists: bool) -> Status:
    """What a machine is: by what was asked for, how its request fares, SkyPilot's row and the provider's word."""
    if note.ending:
        return Status.STOPPING if exists or request in MOVING else Status.ABSENT
    if request in MOVING:
        return Status.CREATING
    if note.trouble is not None:
        return Status.FAILED
    if record is not None and record.status == "UP":
        return Status.RUNNING if exists else Status.ABSENT
    if record is not None and exists:
        return Status.FAILED if request is not None else Status.CREATING
    if exists:
        return Status.CREATING if note.request is not None else Status.STOPPING if note.ended else Status.CREATING
    return Status.ABSENT


def why_failed(note: Note, request: tuple[str, str] | None, record: Record | None) -> str | None:
    """Why this machine must not be used, as it was launched; None when nothing speaks against it."""
    if request is not None and request[0] == "FAILED":
        return request[1]
    is_up = record is not None and record.status == "UP" and (request is None or request[0] not in MOVING)
    if is_up and record is not None and note.timer is not None:
        armed = record.timer_minutes
        if armed is None or armed > note.timer:
            said = "not armed" if armed is None else f"set to {armed} min"
            return f"SkyPilot's timer is {said}, {note.timer} min were ordered"
    return None


def record_to_dict(record: Record) -> dict[str, Any]:
    return {**asdict(record), "launched_at": record.launched_at.isoformat(), "provider": None}


def record_from_dict(raw: Mapping[str, Any]) -> Record:
    return Record(**{**raw, "launched_at": datetime.fromisoformat(raw["launched_at"])})


def launch_task(order: Order) -> dict[str, Any]:
    """SkyPilot's task for a bare machine of exactly this offer, with the provider's own time limit where it has one."""
    offer = order.offer
    cloud, _, place = offer.infra.partition("/")
    resources: dict[str, Any] = {"infra": "/".join(part for part in (cloud, place, offer.region or "") if part)}
    if cloud not in COUNTED:
        resources["instance_type"] = offer.instance
    if offer.gpu is not None:
        resources["accelerators"] = f"{offer.gpu}:{offer.gpus}"
    if offer.spot:
        resources["use_spot"] = True
    if cloud in CLOUDS_WITH_LABELS:
        resources["labels"] = {"kdcloud-name": order.name, "kdcloud-run": order.run, "kdcloud-stage": order.stage}
    task: dict[str, Any] = {"name": order.name, "num_nodes": 1, "resources": resources}
    limits = time_to_live(cloud, order)
    return {**task, "config": limits} if limits else task


def time_to_live(cloud: str, order: Order) -> dict[str, Any]:
    """SkyPilot configuration by which the provider itself ends the machine in time; empty where none can be passed."""
    whole_s = order.lifetime_s + order.offer.latencies.total_s
    if cloud == SLURM:
        return {SLURM: {"sbatch_options": {"time": str(max(1, int((whole_s - SLURM_LATE_S) // 60)))}}}
    if cloud == "kubernetes":
        return {"kubernetes": {"pod_config": {"spec": {"activeDeadlineSeconds": int(whole_s)}}}}
    return {}


def timer_minutes(order: Order) -> int:
    """SkyPilot's own timer, as a lifetime: late enough that the supervisor's last upload is never cut short by it."""
    late_s = order.lifetime_s + order.offer.latencies.tick_s + order.offer.latencies.flush_s
    return max(1, math.ceil((late_s + order.offer.latencies.handover_s) / 60))


def job_task(note: Note, job_id: str, argv: Sequence[str], env: Mapping[str, str]) -> dict[str, Any]:
    """SkyPilot's task for one job: the bootstrap, which becomes the supervisor. Every value is quoted or a secret."""
    offer = (note.order or {}).get("offer", {})
    wheel = Path(env.get("PYTHONPATH", ""))
    sha256 = wheel.stem if wheel.suffix == ".whl" else ""
    command = ["python3", "-c", bootstrap_text(), "--job", job_id]
    if str(offer.get("infra", "")).partition("/")[0] == SLURM:
        command += ["--end", SLURM]
    if offer.get("gpu"):
        command.append("--gpu")
    if sha256:
        command += ["--sha256", sha256]
        bucket = value_after(argv, "--bucket")
        if bucket.startswith("file:"):
            command += ["--code", f"{bucket.removeprefix('file:')}/code/{sha256}.whl"]
    task: dict[str, Any] = {"name": job_id, "num_nodes": 1, "run": "exec " + shlex.join([*command, "--", *argv])}
    if offer.get("gpu"):
        task["resources"] = {"accelerators": f"{offer['gpu']}:{offer['gpus']}"}
    secrets = {key: value for key, value in env.items() if key != "PYTHONPATH"}
    return {**task, "secrets": secrets} if secrets else task


def bootstrap_text() -> str:
    import tasks

    return (Path(tasks.__file__).parent / BOOTSTRAP).read_text()


def value_after(argv: Sequence[str], option: str) -> str:
    words = list(argv)
    return words[words.index(option) + 1] if option in words[:-1] else ""


def refuse(infra: str) -> None:
    """Raises ProvisionError for an infra whose machines cannot be made to end by themselves."""
    if infra.partition("/")[0].lower() in NO_AUTODOWN:
        raise ProvisionError(
            f"machines on {infra} cannot end themselves: if this computer dies they go on costing money",
            hint="leave it out of `infra:` in the recipe",
        )


def serves(offer: Offer, need: Need) -> bool:
    cloud = offer.infra.partition("/")[0]
    enough = offer.gpus == need.gpu_count if cloud in COUNTED else offer.gpus >= need.gpu_count
    return (
        enough
        and (not need.gpus or offer.gpu in need.gpus)
        and (need.spot is None or offer.spot == need.spot)
        and offer.vram_gib >= need.vram_gib
    )


def offers_of(cloud: str, where: str, row: Any, as_of: datetime) -> Iterator[Offer]:
    """One row of SkyPilot's catalogue (InstanceTypeInfo) as one offer, or two where it has a spot price."""
    gpu, gpus = str(row.accelerator_name), int(row.accelerator_count)
    known = GPUS.get(gpu)
    region = str(row.region).rstrip("*") or None  # Slurm marks its default partition
    offer = Offer(
        infra=f"{cloud}/{where}" if cloud == SLURM and where else cloud,
        region=region,
        instance=str(row.instance_type) if row.instance_type else f"{gpus}x {gpu}",
        gpu=gpu,
        gpus=gpus,
        vram_gib=known.vram_gib.value if known else number(row.device_memory) or 0.0,
        spot=False,
        price_micros_per_hour=micros(row.price),
        as_of=as_of,
        source="slurm.pricing of SkyPilot's configuration" if cloud == SLURM else "SkyPilot's catalogue",
        minimum_s=60 if cloud == "aws" else 0,
        latencies=LATENCIES.get(cloud, CLOUD_LATENCIES),
    )
    if where and cloud != SLURM and region != where.partition("/")[0]:
        return
    yield offer
    if cloud not in ONE_PRICE and micros(row.spot_price) is not None:
        spot = micros(row.spot_price)
        yield replace(offer, spot=True, price_micros_per_hour=spot, ceiling_micros_per_hour=offer.price_micros_per_hour)


def micros(price_usd: Any) -> int | None:
    """Micro-USD, rounded up; None for what is no price: missing, NaN, infinite, 0."""
    price = number(price_usd)
    return None if price is None else int((Decimal(str(price)) * 1_000_000).to_integral_value(ROUND_CEILING))


def number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) and value > 0 else None


def landed(note: Note, record: Record | None) -> Offer | None:
    """What was really launched, at its own price; None when SkyPilot does not say."""
    if record is None:
        return None
    ordered = note.order["offer"] if note.order else None
    slurm = record.infra == SLURM
    return Offer(
        infra=f"{SLURM}/{record.region}" if slurm else record.infra,
        region=record.zone if slurm else record.region,
        instance=ordered["instance"] if ordered else record.instance,
        gpu=record.gpu,
        gpus=record.gpus,
        vram_gib=ordered["vram_gib"] if ordered else 0.0,
        spot=record.spot,
        price_micros_per_hour=record.price_micros_per_hour,
        as_of=now(),
        source="SkyPilot, for what was launched",
        quantum_s=ordered["quantum_s"] if ordered else 1,
        minimum_s=ordered["minimum_s"] if ordered else 0,
        latencies=Latencies(**ordered["latencies"]) if ordered else CLOUD_LATENCIES,
    )


def created_at(record: Record | None, allocation: SlurmJob | None) -> datetime | None:
    if allocation is not None and allocation.began_at is not None:
        return allocation.began_at
    return record.launched_at if record is not None else None


def printed(text: str) -> Iterator[str]:
    """What the job itself printed: without colours, SkyPilot's own remarks and the mark before each line."""
    for line in COLOURS.sub("", text).splitlines():
        match = LOG_LINE.match(line)
        if match:
            yield match[2]


def is_named(listed: str, name: str) -> bool:
    """Whether a provider's name is ours: SkyPilot adds eight digits that stand for the user."""
    return listed == name or re.fullmatch(re.escape(name) + r"-[0-9a-f]{8}", listed) is not None


def order_to_dict(order: Order) -> dict[str, Any]:
    raw = asdict(order)
    raw["deadline_at"] = order.deadline_at.isoformat()
    raw["offer"]["as_of"] = order.offer.as_of.isoformat()
    return raw


def now() -> datetime:
    return datetime.now(UTC)


def write_private(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    with os.fdopen(handle, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


# -- the edges -------------------------------------------------------------------------------------------------------


class SkyApi:
    """SkyPilot's SDK as plain values. A call may start its API server. Raises ProvisionError for whatever it raises."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def enabled(self) -> list[str]:
        sdk = self._sdk()
        with translated("ask which infras are enabled"):
            return [str(cloud).lower() for cloud in sdk.get(sdk.enabled_clouds())]

    def accelerators(self, cloud: str, where: str) -> list[Any]:
        """Rows of the catalogue; for Slurm those of one cluster, asked live."""
        sdk = self._sdk()
        with translated(f"list what {cloud} offers"):
            if cloud == SLURM:  # answers at once, with no request to wait for
                found = sdk.list_accelerators(True, None, where or None, None, SLURM, True, False)
            else:
                found = sdk.list_accelerators(True, None, None, None, cloud, True, False)
            found = found if isinstance(found, dict) else sdk.get(found)
        return [row for rows in found.values() for row in rows]

    def catalogue_date(self, cloud: str) -> datetime:
        """When the prices were really fetched: a failed refresh touches the table, not its checksum."""
        home = Path.home() / ".sky" / "catalogs"
        for pattern in (f"*/.meta/{cloud}/vms.csv.md5", f"*/{cloud}/vms.csv"):
            dates = [path.stat().st_mtime for path in home.glob(pattern)]
            if dates:
                return datetime.fromtimestamp(max(dates), UTC)
        return now()

    def launch(self, task: dict[str, Any], name: str, timer_minutes: int) -> str:
        sdk, sky = self._sdk(), self._sky()
        from sky import skypilot_config
        from sky.skylet import autostop_lib

        own = skypilot_config.override_skypilot_config(identity_of(str(task["resources"]["infra"])))
        with translated(f"launch {name}"), redirect_stdout(io.StringIO()), own:  # it greets where our data goes
            return str(
                sdk.launch(
                    sky.Task.from_yaml_config(task),
                    cluster_name=name,
                    down=True,
                    idle_minutes_to_autostop=timer_minutes,
                    wait_for=autostop_lib.AutostopWaitFor.NONE,
                )
            )

    def exec(self, task: dict[str, Any], name: str) -> str:
        sdk, sky = self._sdk(), self._sky()
        with translated(f"start a job on {name}"):
            return str(sdk.exec(sky.Task.from_yaml_config(task), cluster_name=name))

    def down(self, name: str) -> str:
        sdk = self._sdk()
        with translated(f"tear {name} down"):
            return str(sdk.down(name))

    def cancel(self, request: str) -> None:
        sdk = self._sdk()
        with translated("cancel a launch"):
            sdk.get(sdk.api_cancel([request], silent=True))

    def request(self, request: str) -> tuple[str, str]:
        """(status, why it failed). LOST: the server has never heard of it."""
        sdk = self._sdk()
        with translated("ask how a request fares"):
            found = sdk.api_status([request], all_status=True)
        if not found:
            return "LOST", ""
        status = getattr(found[0].status, "value", str(found[0].status))
        if status != "FAILED":
            return status, ""
        try:
            sdk.get(request)
        except Exception as error:  # noqa: BLE001 - whatever the server raised is what we came to read
            return status, plain(error)
        return status, "it does not say why"

    def find(self, kind: str, name: str) -> str | None:
        """A request of this kind (launch, exec) for this machine that has not failed."""
        sdk = self._sdk()
        with translated("look for a request"):
            found = sdk.api_status(None, all_status=True, limit=None)
        for row in found:
            status = getattr(row.status, "value", str(row.status))
            if row.cluster_name == name and row.name.endswith(kind) and status not in ("FAILED", "CANCELLED"):
                return str(row.request_id)
        return None

    def records(self, names: list[str] | None, *, force: bool) -> list[Record]:
        """Rows of `sky status`; `force` asks the cloud first, and drops rows of machines that are gone."""
        sdk, sky = self._sdk(), self._sky()
        mode = sky.StatusRefreshMode.FORCE if force else sky.StatusRefreshMode.NONE
        with translated("ask for machines"):
            rows = sdk.get(sdk.status(names, refresh=mode))
        return [self._record(row) for row in rows]

    def queue(self, name: str) -> list[tuple[int, str, str]]:
        """(number, name, status) of every job. A machine that is gone or not ready has none."""
        sdk = self._sdk()
        from sky import exceptions

        with translated(f"ask for the jobs of {name}"):
            try:
                rows = sdk.get(sdk.queue(name))
            except (exceptions.ClusterDoesNotExist, exceptions.ClusterNotUpError):
                return []
        return [(int(row["job_id"]), str(row["job_name"]), str(row["status"].value)) for row in rows]

    def log(self, name: str, number: int) -> str:
        sdk = self._sdk()
        text = io.StringIO()
        with translated(f"read the log of {name}"):
            sdk.tail_logs(name, number, follow=False, output_stream=text)
        return text.getvalue()

    def ssh_config(self, name: str) -> Path:
        """The file in which SkyPilot says how to reach a machine, written anew. Not public SDK: `sky status NAME`."""
        self._sky()
        from sky.client.cli import command

        with translated(f"find the way to {name}"):
            command._get_cluster_records_and_set_ssh_config([name])
        path = Path.home() / ".sky" / "generated" / "ssh" / name
        if not path.is_file():
            raise ProvisionError(f"SkyPilot knows no way to {name}", hint="`sky status` says whether it is up")
        return path

    def keys_that_travel(self) -> list[str]:
        """Files with keys that SkyPilot copies to every machine all the same. Not public SDK."""
        self._sky()
        from sky import check
        from sky.utils import registry

        with translated("see which keys SkyPilot copies"):
            kept = [cloud for name, cloud in registry.CLOUD_REGISTRY.items() if name.lower() in CAN_KEEP_KEYS]
            return sorted(check.get_cloud_credential_file_mounts(kept))

    def instances(self, name: str, provider: dict[str, Any]) -> int:
        """How many instances the cloud itself still has, when SkyPilot has dropped its row.

        Not public SDK: `sky.provision.query_instances` with the configuration that was saved at launch.
        """
        self._sky()
        from sky import provision

        with translated(f"ask the cloud for {name}"):
            found = provision.query_instances(
                provider["name"], name, provider["cluster_name_on_cloud"], provider["config"]
            )
        return len(found)

    def _record(self, row: Any) -> Record:
        handle = row["handle"]
        resources = getattr(handle, "launched_resources", None)
        gpu, gpus = next(iter((getattr(resources, "accelerators", None) or {}).items()), (None, 0))
        return Record(
            name=str(row["name"]),
            status=str(row["status"].value),
            launched_at=datetime.fromtimestamp(row["launched_at"], UTC),
            price_micros_per_hour=self._price(handle, resources),
            infra=str(getattr(resources, "cloud", row["cloud"])).lower(),
            region=getattr(resources, "region", None),
            zone=getattr(resources, "zone", None),
            instance=str(getattr(resources, "instance_type", "")),
            gpu=gpu,
            gpus=int(gpus),
            spot=bool(getattr(resources, "use_spot", False)),
            timer_minutes=int(row["autostop"]) if row["to_down"] and int(row["autostop"]) >= 0 else None,
            provider=self._provider(handle) if str(row["status"].value) == "UP" else None,
        )

    def _price(self, handle: Any, resources: Any) -> int | None:
        if resources is None:
            return None
        with translated("price what was launched"):
            return micros(resources.get_cost(3600) * handle.launched_nodes)

    def _provider(self, handle: Any) -> dict[str, Any] | None:
        """How `instances` finds it later; None where that is not known."""
        self._sky()
        from sky import global_user_state

        with translated("read a machine's configuration"):
            config = global_user_state.get_cluster_yaml_dict(handle.cluster_yaml) if handle.cluster_yaml else None
        if not config:
            return None
        cloud = str(handle.launched_resources.cloud).lower()
        found = {"name": cloud, "cluster_name_on_cloud": handle.cluster_name_on_cloud, "config": config["provider"]}
        found["config"].pop("ssh_proxy_command", None)
        return dict(json.loads(json.dumps(found)))

    def _sky(self) -> Any:
        self._prepare()
        import sky

        return sky

    def _sdk(self) -> Any:
        self._prepare()
        from sky.client import sdk

        return sdk

    def _prepare(self) -> None:
        """Before SkyPilot is loaded: keys stay at home, and stdout stays ours."""
        import sys

        if "sky" in sys.modules:
            return
        own = self._folder / "config.yaml"
        theirs = os.environ.get("SKYPILOT_PROJECT_CONFIG")
        if theirs != str(own):
            write_private(own, no_upload(Path(theirs).read_text() if theirs and Path(theirs).exists() else ""))
            os.environ["SKYPILOT_PROJECT_CONFIG"] = str(own)
        try:
            import sky
        except ImportError as error:
            raise ProvisionError(
                "SkyPilot is not installed",
                hint=f"{install_hint('sky')}; `kdcloud doctor` tells what else is missing; here: `infra: local`",
            ) from error
        from sky import sky_logging

        self._silence = sky_logging.silent()
        self._silence.__enter__()
        if not sky.__version__.startswith("0.14."):
            raise ProvisionError(
                f"SkyPilot {sky.__version__} is installed, kdcloud knows 0.14",
                hint=install_hint("", "skypilot==0.14.*"),
            )


# Every infra whose keys SkyPilot 0.14 can be told to keep at home; its configuration refuses the word for the others.
CAN_KEEP_KEYS = ("aws", "azure", "gcp", "kubernetes", "nebius", "oci", "slurm", "ssh", "vast")


def no_upload(theirs: str) -> str:
    """A SkyPilot project configuration in which keys stay at home wherever that can be said, over the one given."""
    import yaml

    config = yaml.safe_load(theirs) or {}
    for cloud in CAN_KEEP_KEYS:
        config.setdefault(cloud, {})["remote_identity"] = "NO_UPLOAD"
    return str(yaml.safe_dump(config, sort_keys=False))


@contextmanager
def translated(doing: str) -> Iterator[None]:
    """Whatever SkyPilot raises, here or on its server, becomes a ProvisionError that says what was tried."""
    try:
        yield
    except ProvisionError:
        raise
    except Exception as error:
        kind = NoCapacity if type(error).__name__ == "ResourcesUnavailableError" else ProvisionError
        raise kind(f"could not {doing}: {plain(error)}", hint="`sky api info` says whether SkyPilot answers") from error


def plain(error: Exception) -> str:
    """The first sentence of an error, without colours."""
    text = COLOURS.sub("", str(error)).strip() or type(error).__name__
    return text.splitlines()[0][:300]


class SlurmQueue:
    """What Slurm itself says, over ssh to the hosts of ~/.slurm/config: SkyPilot's record of a machine is a cache."""

    def __init__(self, folder: Path, *, run: Callable[..., Any] = subprocess.run) -> None:
        self._folder, self._run = folder, run
        self._config = Path.home() / ".slurm" / "config"

    def clusters(self) -> list[str]:
        """Every host that SkyPilot takes for a Slurm cluster."""
        try:
            lines = self._config.read_text().splitlines()
        except OSError:
            return []
        words = [line.split() for line in lines]
        hosts = [host for parts in words if parts and parts[0].lower() == "host" for host in parts[1:]]
        return [host for host in hosts if not set(host) & set("*?!")]

    def knows(self, clusters: list[str]) -> bool:
        return bool(clusters) and set(clusters) <= set(self.clusters())

    def jobs(self, clusters: list[str], name: str = "") -> list[SlurmJob]:
        """Every allocation of this user, with what its jobs left behind for the machine `name`.

        Raises ProvisionError when a cluster does not answer.
        """
        found: dict[str, SlurmJob] = {}
        for cluster in [cluster for cluster in clusters if self.knows([cluster])]:
            listed, _, traces = self._ssh(cluster, look_script(name)).partition(f"{CUT}\n")
            work = tuple(trace_of(line) for line in traces.splitlines())
            for line in listed.splitlines():
                job = slurm_job(line, cluster)
                found.setdefault(f"{job.id} {job.name}", replace(job, work=work) if is_named(job.name, name) else job)
        return list(found.values())

    def cancel(self, job: SlurmJob) -> None:
        """Ends one allocation; only one whose name is still the one it was found by."""
        self._ssh(job.cluster, shlex.join(["scancel", "--name", job.name, job.id]))

    def _ssh(self, cluster: str, script: str) -> str:
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        options = {
            "BatchMode": "yes",
            "ConnectTimeout": "10",
            "StrictHostKeyChecking": "accept-new",
            "UserKnownHostsFile": str(self._folder / "known_hosts"),
            "LogLevel": "ERROR",
            **shared_connection(),
        }
        flags = [word for name, value in options.items() for word in ("-o", f"{name}={value}")]
        command = ["ssh", "-F", str(self._config), *flags, "--", cluster, script]
        try:
            done = self._run(command, capture_output=True, text=True, timeout=30, stdin=subprocess.DEVNULL)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise ProvisionError(f"Slurm cluster {cluster} does not answer: {error}") from error
        if done.returncode != 0:
            raise ProvisionError(
                f"Slurm cluster {cluster} does not do as told: {done.stderr.strip()[:300]}",
                hint=f"try `ssh -F {self._config} {cluster} squeue`",
            )
        return str(done.stdout)


def shared_connection(folder: Path | None = None) -> dict[str, str]:
    """Options of ssh by which every look at a login node goes over one connection: a handshake a second is a burden.

    Nothing where `folder` (this user's own, in /tmp: a socket's name has 104 bytes at most) is somebody else's.
    """
    place = folder or Path("/tmp", f"kdcloud-ssh-{os.getuid()}")
    with suppress(OSError):
        place.mkdir(mode=0o700, exist_ok=True)
        found = place.lstat()
        if stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o077:
            alive = {"ServerAliveInterval": "5", "ServerAliveCountMax": "3"}
            return {"ControlMaster": "auto", "ControlPath": f"{place}/%C", "ControlPersist": "60", **alive}
    return {}


CUT = "-- work --"


def look_script(name: str) -> str:
    """Shell for the login node: allocations of this user, then a line `job|rc|silent_s` for each job of one machine."""
    listed = "squeue --me --noheader --format='%i|%T|%M|%j' || exit 1"
    if not name:
        return listed
    folder = f"~/.sky_clusters/{shlex.quote(name)}-????????/.kdcloud/jobs"
    line = 'echo "$j|$(cat "$j/rc" 2>/dev/null)|$(($(date +%s) - $(stat -c %Y "$j/beat" 2>/dev/null || echo 0)))"'
    return f"{listed}; echo '{CUT}'; cd {folder} 2>/dev/null && for j in *; do {line}; done; exit 0"


def trace_of(line: str) -> Trace:
    job_id, rc, silent = line.rsplit("|", 2)
    return Trace(job_id, int(rc) if rc else None, float(silent))


def slurm_job(line: str, cluster: str) -> SlurmJob:
    number, state, elapsed, name = line.split("|", 3)
    began_at = None if state == "PENDING" else now() - timedelta(seconds=elapsed_s(elapsed))
    return SlurmJob(number, name, state, began_at, cluster)


def elapsed_s(text: str) -> int:
    """Seconds of Slurm's [days-][hours:]minutes:seconds; 0 for what it calls INVALID."""
    days, _, clock = text.rpartition("-")
    parts = clock.split(":")
    if not all(part.isdigit() for part in parts):
        return 0
    seconds = 0
    for part in parts:
        seconds = seconds * 60 + int(part)
    return seconds + int(days or 0) * 86400
