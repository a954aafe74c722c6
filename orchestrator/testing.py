"""The fake behind the seam: a provider with faults and an invoice of its own, a bucket in memory, a clock that jumps.

Shipped, so that whoever writes a provider or a drill can use it. Nothing here sleeps or touches disk and network.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path

from orchestrator.clock import Mark
from orchestrator.provision import (
    NAME_PREFIX,
    Job,
    JobState,
    Need,
    NotYetGone,
    Observation,
    Offer,
    Order,
    ProvisionError,
    Status,
)
from tasks.bucket import Bucket, Moved, NotFound, PreconditionFailed, Stat
from tasks.contract import LIMIT_FILE, PROGRESS_FILE, Ended, Exit, Limit, Link, Progress, kept_s, links_of

_REASONS = {int(code): code.name.lower() for code in Exit}
ENDS_ITSELF_AFTER_S = 30.0  # a client that is there has seen the job's end by then
START = datetime(2026, 1, 1, tzinfo=UTC)


class VirtualClock:
    """Time that moves only when somebody sleeps. `step` sets the wall clock wrong, `reboot` changes the boot id."""

    def __init__(self, start: datetime = START) -> None:
        self._start, self._elapsed, self._off, self._boot = start, 0.0, 0.0, "boot-0"
        self._marked: tuple[tuple[float, float, str], Mark] | None = None
        self.on_pass: list[Callable[[], None]] = []  # called when time has passed

    @property
    def elapsed_s(self) -> float:
        return self._elapsed

    def mark(self) -> Mark:
        key = (self._elapsed, self._off, self._boot)
        if self._marked is None or self._marked[0] != key:  # asked for many times between two moments
            wall = self._start + timedelta(seconds=self._elapsed + self._off)
            self._marked = (key, Mark(wall, self._boot, self._elapsed))
        return self._marked[1]

    def true_now(self) -> datetime:
        """The time a provider bills by, whatever the client's wall clock shows."""
        return self.true_at(self._elapsed)

    def true_at(self, elapsed_s: float) -> datetime:
        return self._start + timedelta(seconds=elapsed_s)

    def sleep(self, seconds: float) -> None:
        self._elapsed += seconds
        for happen in self.on_pass:
            happen()

    def step(self, seconds: float) -> None:
        self._off += seconds

    def reboot(self, boot_id: str) -> None:
        self._boot = boot_id


class FakeBucket:
    """A Bucket in memory with conditional writes; `broken` makes every call fail as an unreachable store does."""

    def __init__(
        self, clock: VirtualClock, *, prefix: str = "", store: dict[str, tuple[bytes, datetime]] | None = None
    ) -> None:
        self._clock, self._prefix = clock, prefix
        self._store: dict[str, tuple[bytes, datetime]] = {} if store is None else store
        self.url = f"fake:{prefix}"

    def put(self, key: str, data: bytes, *, if_none_match: bool = False, if_match: str | None = None) -> str:
        old = self._store.get(self._prefix + key)
        if if_none_match and old is not None:
            raise PreconditionFailed(f"{key} is there already")
        if if_match is not None and (old is None or _etag(old[0]) != if_match):
            raise PreconditionFailed(f"{key} was changed by somebody else")
        self._store[self._prefix + key] = (data, self._clock.true_now())
        return _etag(data)

    def put_at(self, key: str, data: bytes, elapsed_s: float) -> None:
        """As whoever put it `elapsed_s` after the clock's start."""
        self._store[self._prefix + key] = (data, self._clock.true_at(elapsed_s))

    def get(self, key: str) -> tuple[bytes, Stat]:
        stat = self.head(key)
        if stat is None:
            raise NotFound(f"no object {key}")
        return self._store[self._prefix + key][0], stat

    def head(self, key: str) -> Stat | None:
        found = self._store.get(self._prefix + key)
        return None if found is None else Stat(key, len(found[0]), _etag(found[0]), found[1])

    def list(self, prefix: str = "") -> Iterator[Stat]:
        start = self._prefix + prefix
        for key in sorted(self._store):
            if key.startswith(start):
                stat = self.head(key.removeprefix(self._prefix))
                assert stat is not None
                yield stat

    def put_file(self, path: Path, key: str, moved: Moved | None = None) -> str:
        return self.put(key, path.read_bytes())

    def get_file(self, key: str, path: Path, moved: Moved | None = None) -> None:
        path.write_bytes(self.get(key)[0])

    def delete(self, key: str) -> None:
        self._store.pop(self._prefix + key, None)

    def now(self) -> datetime:
        return self._clock.true_now()

    def at(self, prefix: str) -> Bucket:
        return FakeBucket(self._clock, prefix=f"{self._prefix}{prefix}/", store=self._store)


@dataclass(frozen=True)
class Faults:
    """What goes wrong with one machine. Seconds count from its creation, or from the job's start."""

    launch_error: Exception | None = None
    create_anyway: bool = False  # launch raises, but the machine is made: 5xx but created
    create_s: float = 20.0
    never_ready: bool = False
    lost_after_s: float | None = None  # taken away this long after it was created
    hang_after_s: float | None = None  # the job stops moving; its supervisor ends it as stalled after `stall_s`
    stall_s: float = 300.0
    rc: int | None = None  # the job ends at once with this status
    strikes: str | None = None  # the stage in which job and supervisor have this trouble; None: in any
    terminate_errors: int = 0  # this many calls are refused
    gone_delay_s: float = 2.0  # the provider takes so long after it accepted a teardown
    refuses_teardown: bool = False
    landed: Offer | None = None  # something else than was ordered
    supervisor_dead: bool = False  # nothing on the machine stops it
    ends_itself: bool = True  # the supervisor ends the machine after its job, as on a cloud


@dataclass
class _Machine:
    order: Order
    faults: Faults
    created: float
    ended: float | None = None  # when the teardown was accepted
    refusals: int = 0
    job: str | None = None
    job_started: float = 0.0
    remaining_s: float = 0.0  # for the stage at hand
    stage: str = ""
    attempt: int = 0
    then: tuple[Link, ...] = ()
    worked_before: float = 0.0
    rc: int | None = None
    rc_at: float = 0.0


@dataclass
class FakeProvisioner:
    """A provider of machines that live on a virtual clock. `work_s`: seconds of machine time a stage takes.

    `invoice_micros` is what such a provider would bill, by its own arithmetic: never from kdcloud's ledger.
    """

    clock: VirtualClock
    bucket: Bucket
    work_s: Mapping[str, float]
    offered: Sequence[Offer] = ()
    faults: Callable[[Order, int], Faults] = lambda order, count: Faults()
    checkpoint_every_s: float = 30.0
    steps: Mapping[str, int] = field(default_factory=dict)  # of stages that tell their progress and obey limits
    calls: list[tuple[str, str]] = field(default_factory=list)
    _machines: dict[str, _Machine] = field(default_factory=dict)
    _dead: list[_Machine] = field(default_factory=list)

    def offers(self, need: Need) -> list[Offer]:
        return [o for o in self.offered if not need.gpus or o.gpu in need.gpus]

    def launch(self, order: Order) -> None:
        self.calls.append(("launch", order.name))
        if order.name in self._machines:
            return
        faults = self.faults(order, len(self._machines) + len(self._dead))
        if faults.launch_error is None or faults.create_anyway:
            self._machines[order.name] = _Machine(order, faults, self.clock.elapsed_s)
        if faults.launch_error is not None:
            raise faults.launch_error

    def observe(self, name: str) -> Observation:
        self._tick()
        machine = self._machines.get(name)
        now = self.clock.true_now()
        if machine is None:
            return Observation(name, Status.ABSENT, None, None, Job(), now)
        age = self.clock.elapsed_s - machine.created
        if machine.ended is not None:
            state = Status.STOPPING
        elif age < machine.faults.create_s or machine.faults.never_ready:
            state = Status.CREATING
        else:
            state = Status.RUNNING
        landed = machine.faults.landed or machine.order.offer
        return Observation(name, state, landed, START + timedelta(seconds=machine.created), self._job(machine), now)

    def run(self, name: str, job_id: str, argv: Sequence[str], env: Mapping[str, str]) -> None:
        self.calls.append(("run", name))
        self._tick()
        machine = self._machines.get(name)
        if machine is None or machine.ended is not None:
            raise ProvisionError(f"{name} is gone")
        if machine.job == job_id:
            return
        words = dict(pairwise(argv))
        machine.job, machine.then = job_id, links_of(words.get("--then", ""))
        machine.job_started, machine.attempt, machine.stage = (
            self.clock.elapsed_s,
            int(words["--attempt"]),
            words["--stage"],
        )
        machine.remaining_s = float(words["--remaining-s"]) - kept_s(machine.then)
        machine.worked_before = self._saved(machine.stage)

    def logs(self, name: str, job_id: str) -> Iterator[str]:
        yield f"{job_id} on {name}"

    def terminate(self, name: str) -> None:
        self.calls.append(("terminate", name))
        self._tick()
        machine = self._machines.get(name)
        if machine is None:
            return
        if machine.refusals < machine.faults.terminate_errors or machine.faults.refuses_teardown:
            machine.refusals += 1
            raise ProvisionError("403: the provider refuses the teardown")
        if machine.ended is None:
            if machine.job and machine.rc is None:
                self._save(machine)
            machine.ended = self.clock.elapsed_s
        self._tick()
        if name in self._machines:
            raise NotYetGone(name)

    def ours(self) -> list[Observation]:
        return [self.observe(name) for name in list(self._machines) if name.startswith(NAME_PREFIX)]

    def live(self) -> list[str]:
        """Names of machines that bill now."""
        self._tick()
        return list(self._machines)

    def invoice_micros(self) -> int:
        """The bill so far: every machine from its creation until it was gone, in the landed offer's steps and price."""
        self._tick()
        total = 0
        for machine in [*self._machines.values(), *self._dead]:
            offer = machine.faults.landed or machine.order.offer
            end = self.clock.elapsed_s if machine.ended is None else machine.ended + machine.faults.gone_delay_s
            steps = math.ceil((min(end, self.clock.elapsed_s) - machine.created) / offer.quantum_s)
            seconds = max(offer.minimum_s, steps * offer.quantum_s)
            total += math.ceil((offer.price_micros_per_hour or 0) * seconds / 3600)
        return total

    # -- what happens while nobody looks -----------------------------------------------------------------------------

    def _tick(self) -> None:
        for name, machine in list(self._machines.items()):
            now, faults = self.clock.elapsed_s, machine.faults
            self._work(machine)
            if (
                machine.ended is None
                and faults.lost_after_s is not None
                and now - machine.created >= faults.lost_after_s
            ):
                machine.ended = machine.created + faults.lost_after_s
            alone = machine.ended is None and machine.rc is not None and now - machine.rc_at >= ENDS_ITSELF_AFTER_S
            if alone and faults.ends_itself:
                machine.ended = machine.rc_at + ENDS_ITSELF_AFTER_S
            if machine.ended is not None and now - machine.ended >= faults.gone_delay_s:
                self._dead.append(self._machines.pop(name))

    def _work(self, machine: _Machine) -> None:
        """Moves the job to the present: result, deadline, stall, or checkpoints on the way; stage after stage."""
        while machine.job is not None and machine.rc is None:
            stage = machine.stage
            self._work_on(machine)
            if machine.stage == stage:
                return

    def _work_on(self, machine: _Machine) -> None:
        until = min(self.clock.elapsed_s, machine.ended if machine.ended is not None else math.inf)
        faults = machine.faults
        if faults.lost_after_s is not None:
            until = min(until, machine.created + faults.lost_after_s)
        age = until - machine.job_started
        if faults.strikes not in (None, machine.stage):
            faults = replace(faults, rc=None, hang_after_s=None, supervisor_dead=False)
        if faults.rc is not None:
            self._end(machine, faults.rc, machine.job_started)
            return
        total = self._total(machine)
        need = self.work_s[machine.stage] * total - machine.worked_before
        if machine.stage in self.steps:
            self._report(machine, min(age, max(0.0, need)), total)
        latencies = machine.order.offer.latencies
        limit = machine.remaining_s - latencies.flush_s - latencies.tick_s
        moving = math.inf if faults.hang_after_s is None else faults.hang_after_s
        if age >= need and need <= min(limit, moving):
            self._commit(machine.stage, machine.job_started + need)
            self._end(machine, Exit.DONE, machine.job_started + need)
        elif not faults.supervisor_dead and age >= limit:
            self._save(machine, at=min(limit, moving))
            self._end(machine, Exit.DEADLINE, machine.job_started + limit)
        elif not faults.supervisor_dead and age >= moving + faults.stall_s:
            self._save(machine, at=moving)
            self._end(machine, Exit.STALLED, machine.job_started + moving + faults.stall_s)
        elif age > 0:
            steps = math.floor(min(age, moving) / self.checkpoint_every_s)
            if steps:
                self._save(machine, at=steps * self.checkpoint_every_s)

    def _total(self, machine: _Machine) -> float:
        """The share of its steps at which the stage is to end."""
        try:
            limit = Limit.from_json(self.bucket.get(f"{machine.stage}/{LIMIT_FILE}")[0].decode())
        except NotFound:
            return 1.0
        mine = machine.stage in self.steps and limit.attempt == machine.attempt
        return min(1.0, limit.total / self.steps[machine.stage]) if mine else 1.0

    def _report(self, machine: _Machine, worked_s: float, share: float) -> None:
        step_s = self.work_s[machine.stage] / self.steps[machine.stage]
        before = math.floor(machine.worked_before / step_s)
        done = math.floor((machine.worked_before + worked_s) / step_s)
        progress = Progress(
            "rehearse", done, done, share * self.steps[machine.stage], step_s=step_s, phase_from=before,
            phase_s=(done - before) * step_s, attempt=machine.attempt,
        )  # fmt: skip
        self.bucket.put(f"{machine.stage}/{PROGRESS_FILE}", progress.to_json().encode())

    def _end(self, machine: _Machine, rc: int, at: float) -> None:
        seconds = at - machine.job_started
        message = "" if rc == 0 else f"ended with {rc}"
        ended = Ended(_REASONS.get(int(rc), "bug"), int(rc), message, seconds=seconds, attempt=machine.attempt)
        self._put(f"{machine.stage}/ended.json", ended.to_json().encode(), at)
        if rc != Exit.DONE or not machine.then:
            machine.rc, machine.rc_at = int(rc), at
            return
        link, *then = machine.then
        left_s = machine.remaining_s + kept_s(machine.then) - seconds
        machine.stage, machine.attempt, machine.then = link.stage, link.attempt, tuple(then)
        machine.job_started, machine.remaining_s = at, left_s - kept_s(then)
        machine.worked_before = self._saved(link.stage)
        if link.stage not in self.steps:
            self.bucket.put(f"{link.stage}/{PROGRESS_FILE}", Progress(attempt=link.attempt).to_json().encode())

    def _job(self, machine: _Machine) -> Job:
        if machine.job is None:
            return Job()
        if machine.rc is not None:
            return Job(machine.job, JobState.DONE, machine.rc)
        return Job(machine.job, JobState.RUNNING)

    def _commit(self, stage: str, at: float | None = None) -> None:
        at = self.clock.elapsed_s if at is None else at
        result = json.dumps({"stage": stage}).encode()
        self._put(f"{stage}/result.json", result, at)
        self._put(f"{stage}/COMMIT", _manifest({"result.json": result}), at)

    def _put(self, key: str, data: bytes, at: float) -> None:
        """What happened while nobody looked has its own time in the store."""
        if isinstance(self.bucket, FakeBucket):
            self.bucket.put_at(key, data, at)
        else:
            self.bucket.put(key, data)

    def _save(self, machine: _Machine, at: float | None = None) -> None:
        worked = machine.worked_before + (self.clock.elapsed_s - machine.job_started if at is None else at)
        if worked > self._saved(machine.stage):
            state = json.dumps({"worked_s": worked}).encode()
            folder = f"{machine.stage}/checkpoints/step-{int(worked)}"
            self.bucket.put(f"{folder}/state.json", state)
            self.bucket.put(f"{folder}/COMMIT", _manifest({"state.json": state}))

    def _saved(self, stage: str) -> float:
        steps = [s.key.split("/")[2] for s in self.bucket.list(f"{stage}/checkpoints/") if s.key.endswith("/COMMIT")]
        return max((float(step.removeprefix("step-")) for step in steps), default=0.0)


def fake_offer(
    price_micros_per_hour: int | None = 500_000, *, gpu: str | None = "RTX3090", infra: str = "fake", **changes: object
) -> Offer:
    """An offer for tests; every field can be changed."""
    offer = Offer(
        infra=infra,
        region="r1",
        instance=f"1x{gpu}",
        gpu=gpu,
        gpus=1,
        vram_gib=24.0,
        spot=False,
        price_micros_per_hour=price_micros_per_hour,
        as_of=START,
        source="fake",
    )
    return replace(offer, **changes)  # type: ignore[arg-type]


def _manifest(files: Mapping[str, bytes]) -> bytes:
    entries = {name: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in files.items()}
    return json.dumps({"schema": 1, "fence": 0, "files": entries}).encode()


def _etag(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:32]
