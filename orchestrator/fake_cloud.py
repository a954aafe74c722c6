"""A cloud in memory: machines with a supervisor that decides as the real one does, faults, and an invoice of its own.

`kdcloud drill` rents from it. Time is the true time of a `VirtualClock`, whatever a client's wall clock shows; what
happens while nobody looks (work, checkpoints, deadlines, preemptions) is caught up with whenever time passes.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from itertools import pairwise

from orchestrator.attempts import UNPREPARED
from orchestrator.names import parse_machine_name
from orchestrator.provision import (
    NAME_PREFIX,
    Job,
    JobState,
    Need,
    NoCapacity,
    NotYetGone,
    Observation,
    Offer,
    Order,
    ProvisionError,
    Status,
)
from orchestrator.testing import START, FakeBucket, VirtualClock
from tasks import watch as rules
from tasks.bucket import Bucket, BucketError, Stat
from tasks.contract import Ended, Exit, Link, Progress, Watch, kept_s, links_of

STEP_S = 5.0  # of work, and of the supervisor's tick
STARTUP_S = 20.0  # imports, before the first progress
CHECKPOINT_S = 60.0  # of work
SETUP_S = 15.0  # of the environment of a machine's next stage
LINGER_S = 20.0  # a machine whose job is over ends itself after that
TIMER_STEP_S = 60.0  # SkyPilot's timer counts whole minutes
DECLARED_UPLOAD = Progress("upload", 1, 0.0, declared=True)


@dataclass(frozen=True)
class Trouble:
    """What goes wrong with one machine. Ages count from its creation, `job_` times from its job's start, in seconds."""

    create_s: float = 30.0
    launch: str = ""  # no_capacity | error | error_but_created
    hidden_s: float = 0.0  # so long no list shows it
    glitch_s: tuple[float, float] | None = None  # between these ages no list shows it
    never_ready: bool = False
    twin: bool = False  # two are made
    spot_rises: bool = False  # to its ceiling, while it runs or before
    dearer: float = 1.0  # what lands costs so many times what was ordered
    vanishes_s: float | None = None  # taken away
    timer_lost: bool = False
    refusals: int = 0  # so many teardowns are refused
    gone_s: float = 5.0  # from an accepted teardown to the end of billing
    job_killed_s: float | None = None  # watchdog and stage die, the machine stays
    job_reboot_s: float | None = None
    job_hangs_s: float | None = None  # no progress from here on
    hang_is_busy: bool = False  # ... while the processor shows 100 %
    job_phase_s: float = 0.0  # an honest phase without a counter, after the start
    job_rc: int | None = None  # ends at once with this status
    job_in: int | None = None  # of the machine's stages, the one in which its job has trouble; None: in any
    dies_between: bool = False  # the job, between two stages
    upload_s: float = 10.0  # of the result
    flush_s: float = 10.0  # of a checkpoint at the end


@dataclass
class Job_:
    """A job on a machine: the work of the stage at hand and its supervisor, and the stages that it goes on with."""

    id: str
    stage: str
    attempt: int
    began: float
    remaining_s: float  # of the machine, when the stage began
    worked_before: float
    then: tuple[Link, ...] = ()
    number: int = 0  # of the machine's stages
    worked: float = 0.0
    saved: float = 0.0
    activity: rules.Activity = field(default_factory=lambda: rules.Activity(rules.Sight(0.0)))
    cpu_s: float = 0.0
    phase: str = "work"  # work | upload | saving | between | over | dead
    until: float = 0.0  # end of upload, saving or setting up
    stop: Exit | None = None
    rc: int | None = None
    over_at: float = 0.0


@dataclass
class Made:
    """One machine that exists, or existed."""

    order: Order
    trouble: Trouble
    created: float
    price_micros: int
    ended: float | None = None  # when its end was accepted
    by: str = ""  # who ended it
    refusals: int = 0
    job: Job_ | None = None

    @property
    def gone_at(self) -> float:
        return math.inf if self.ended is None else self.ended + self.trouble.gone_s


@dataclass
class Stranger:
    """Somebody else's machine: must never be touched."""

    name: str
    touched: bool = False


class CloudBucket(FakeBucket):
    """Unreachable while the cloud says so."""

    def __init__(self, cloud: Cloud, *, prefix: str = "", store: dict[str, tuple[bytes, datetime]] | None = None):
        super().__init__(cloud.clock, prefix=prefix, store=store)
        self._cloud = cloud

    def put(self, key: str, data: bytes, *, if_none_match: bool = False, if_match: str | None = None) -> str:
        self._reach()
        self._cloud.statement("bucket")
        return super().put(key, data, if_none_match=if_none_match, if_match=if_match)

    def head(self, key: str) -> Stat | None:
        self._reach()
        return super().head(key)

    def list(self, prefix: str = "") -> Iterator[Stat]:
        self._reach()
        return super().list(prefix)

    def now(self) -> datetime:
        self._reach()
        return super().now()

    def at(self, prefix: str) -> Bucket:
        return CloudBucket(self._cloud, prefix=f"{self._prefix}{prefix}/", store=self._store)

    def _reach(self) -> None:
        if self._cloud.bucket_is_down():
            raise BucketError("the store does not answer", hint="try again")


class Cloud:
    """A Provisioner over `clock`. `work_s`: seconds of work of each stage; `trouble(order, n)`: of the n-th machine."""

    def __init__(
        self,
        clock: VirtualClock,
        work_s: Mapping[str, float],
        offered: Sequence[Offer],
        trouble: Callable[[Order, int], Trouble],
        *,
        has_limit: bool,
    ) -> None:
        self.clock, self.work_s, self.offered, self.trouble, self.has_limit = clock, work_s, offered, trouble, has_limit
        self.machines: list[Made] = []
        self.strangers: list[Stranger] = []
        self.outages: list[tuple[float, float]] = []  # of its interface
        self.bucket_outages: list[tuple[float, float]] = []
        self.hangs: list[float] = []  # a call that comes after this moment takes HANG_S and fails
        self.denied_from = math.inf  # this client's credentials have expired
        self.caller = "client"
        self.statement: Callable[[str], None] = lambda what: None  # called before and after what leaves the process
        self.ending: Callable[[Made], None] = lambda made: None  # called before somebody's teardown is taken
        self.uncovered: Callable[[Made], bool] = lambda made: False  # whether no layer looks after it now
        self.committed: set[str] = set()
        self.broken: list[str] = []  # what no schedule may do
        self.outside = False  # something happened that no tool can hold
        self.bucket = CloudBucket(self)
        self._now = 0.0
        clock.on_pass.append(self.catch_up)

    # -- the seven calls ---------------------------------------------------------------------------------------------

    def offers(self, need: Need) -> list[Offer]:
        return [o for o in self.offered if not need.gpus or o.gpu in need.gpus]

    def launch(self, order: Order) -> None:
        self._answer("launch")
        if self._of(order.name):
            return
        trouble = self.trouble(order, len(self.machines))
        if trouble.launch in ("", "error_but_created"):
            price = math.ceil((order.offer.price_micros_per_hour or 0) * trouble.dearer)
            if order.offer.ceiling_micros_per_hour:  # a market price never passes it
                price = order.offer.ceiling_micros_per_hour if trouble.spot_rises else price
                price = min(price, order.offer.ceiling_micros_per_hour)
            for _ in range(2 if trouble.twin else 1):
                self.machines.append(Made(order, trouble, self.clock.elapsed_s, price))
        self.statement("launched")
        if trouble.launch == "no_capacity":
            raise NoCapacity("none left")
        if trouble.launch:
            raise ProvisionError("502 from the cloud")

    def observe(self, name: str) -> Observation:
        self._answer("observe")
        found = [made for made in self._of(name) if self._shown(made)]
        if not found:
            return Observation(name, Status.ABSENT, None, None, Job(), self.clock.true_now())
        return self._observation(found[0])

    def run(self, name: str, job_id: str, argv: Sequence[str], env: Mapping[str, str]) -> None:
        self._answer("run")
        found = [made for made in self._of(name) if made.ended is None]
        if not found:
            raise ProvisionError(f"{name} is gone")
        made = found[0]
        if made.job is not None:
            return
        words = dict(pairwise(argv))
        stage, attempt = words["--stage"], int(words["--attempt"])
        before = self._saved(stage)
        remaining, then = float(words["--remaining-s"]), links_of(words.get("--then", ""))
        made.job = Job_(job_id, stage, attempt, self.clock.elapsed_s, remaining, before, then, saved=before)
        self.statement("job sent")

    def logs(self, name: str, job_id: str) -> Iterator[str]:
        return iter(())

    def terminate(self, name: str) -> None:
        self._answer("terminate")
        for stranger in self.strangers:
            stranger.touched = stranger.touched or stranger.name == name
        found = self._of(name)
        for made in found:
            if not self._shown(made):
                continue
            if made.refusals < made.trouble.refusals:
                made.refusals += 1
                raise ProvisionError("403: refused")
            if made.ended is None:
                self.ending(made)
                self._end(made, self.caller)
        self.statement("ended")
        if any(self._shown(made) for made in self._of(name)):
            raise NotYetGone(name)

    def ours(self) -> list[Observation]:
        self._answer("ours")
        now = self.clock.true_now()
        theirs = [
            Observation(one.name, Status.RUNNING, None, START, Job(), now)
            for one in self.strangers
            if one.name.startswith(NAME_PREFIX)
        ]
        return theirs + [self._observation(made) for made in self._live() if self._shown(made)]

    # -- what only a drill may know ----------------------------------------------------------------------------------

    def live(self) -> list[Made]:
        """Machines that bill now."""
        self.catch_up()
        return self._live()

    def invoice_micros(self) -> int:
        """The bill so far, by the cloud's own arithmetic."""
        self.catch_up()
        return sum(self._bill(made) for made in self.machines)

    def bucket_is_down(self) -> bool:
        return any(start <= self.clock.elapsed_s < end for start, end in self.bucket_outages)

    def supervised(self, made: Made) -> bool:
        """Whether something on the machine will end it."""
        return made.job is not None and made.job.phase != "dead"

    # -- inside ------------------------------------------------------------------------------------------------------

    def _answer(self, what: str) -> None:
        self.statement(what)
        self.catch_up()
        now = self.clock.elapsed_s
        if self.hangs and now >= self.hangs[0]:
            self.hangs.pop(0)
            self.clock.sleep(HANG_S)
            raise ProvisionError("no answer")
        if any(start <= now < end for start, end in self.outages):
            raise ProvisionError("503 from the cloud")
        if self.caller == "client" and now >= self.denied_from:
            raise ProvisionError("401: the credentials have expired")

    def _of(self, name: str) -> list[Made]:
        return [made for made in self.machines if made.order.name == name and made.gone_at > self.clock.elapsed_s]

    def _live(self) -> list[Made]:
        return [made for made in self.machines if made.gone_at > self.clock.elapsed_s]

    def _shown(self, made: Made) -> bool:
        age = self.clock.elapsed_s - made.created
        if made.gone_at <= self.clock.elapsed_s or age < made.trouble.hidden_s:
            return False
        return made.trouble.glitch_s is None or not made.trouble.glitch_s[0] <= age < made.trouble.glitch_s[1]

    def _observation(self, made: Made) -> Observation:
        age = self.clock.elapsed_s - made.created
        state = Status.RUNNING
        if made.ended is not None:
            state = Status.STOPPING
        elif made.trouble.never_ready or age < made.trouble.create_s:
            state = Status.CREATING
        job = Job()
        if made.job is not None:
            job = Job(made.job.id, JobState.RUNNING)
            if made.job.phase == "over":
                job = Job(made.job.id, JobState.DONE, made.job.rc)
            if made.job.phase == "dead":
                job = Job(made.job.id, JobState.LOST)
        offer = replace(made.order.offer, price_micros_per_hour=made.price_micros)
        created = START + timedelta(seconds=made.created)
        landed = offer if state is not Status.CREATING else None
        return Observation(made.order.name, state, landed, created, job, self.clock.true_now())

    def _bill(self, made: Made) -> int:
        offer = made.order.offer
        seconds = min(self.clock.elapsed_s, made.gone_at) - made.created
        quantum = max(1, offer.quantum_s)
        billed = max(offer.minimum_s, math.ceil(seconds / quantum) * quantum)
        return math.ceil(made.price_micros * billed / 3600)

    def _end(self, made: Made, by: str, at: float | None = None) -> None:
        made.ended, made.by = self.clock.elapsed_s if at is None else at, by

    def catch_up(self) -> None:
        """Lives through the time that has passed since the last look, machine by machine."""
        start, now = self._now, self.clock.elapsed_s
        if now <= start:
            return
        self._now = now
        for made in self.machines:
            if made.gone_at <= start:
                continue
            at = max(start, made.created)
            while at < now and made.ended is None:
                at = min(now, at + STEP_S)
                self._step(made, at)

    def _step(self, made: Made, now: float) -> None:
        trouble, age = made.trouble, now - made.created
        limit = self._money_lasts_s(made)
        if limit <= age < limit + STEP_S and self.uncovered(made):
            self.outside = True
        if trouble.vanishes_s is not None and age >= trouble.vanishes_s:
            self._end(made, "preempted", now)
            return
        latencies = made.order.offer.latencies
        if self.has_limit and age >= made.order.lifetime_s + latencies.total_s - latencies.provision_s - STEP_S:
            self._end(made, "time limit", now)
            return
        if made.job is not None:
            self._work(made, made.job, now)
            over = made.job.phase == "over" and now - made.job.over_at >= LINGER_S
            if over and not any(start <= now < end for start, end in self.outages):
                self._end(made, "itself", now)
                return
        armed = not trouble.timer_lost and not trouble.never_ready
        timer = made.order.lifetime_s + latencies.tick_s + latencies.flush_s + latencies.handover_s
        if armed and age >= trouble.create_s + math.ceil(timer / TIMER_STEP_S) * TIMER_STEP_S:
            self._end(made, "timer", now)

    def _money_lasts_s(self, made: Made) -> float:
        """The age at which somebody must begin to end it, or its reservation will not do."""
        latencies = made.order.offer.latencies
        offer = made.order.offer
        reserved = max(offer.price_micros_per_hour or 1, offer.ceiling_micros_per_hour or 0)
        factor = made.price_micros / reserved * (2 if made.trouble.twin else 1)
        if factor > 1:
            return (made.order.lifetime_s + latencies.total_s) / factor - latencies.ending_s
        return made.order.lifetime_s + latencies.tick_s + latencies.flush_s + latencies.handover_s

    def _work(self, made: Made, job: Job_, now: float) -> None:
        trouble, since = _troubles(made.trouble, job), now - job.began
        if job.phase in ("over", "dead"):
            return
        if job.phase == "between":
            self._set_up(made, job, now)
            return
        if trouble.job_killed_s is not None and since >= trouble.job_killed_s:
            job.phase = "dead"
            return
        rebooted = trouble.job_reboot_s is not None and since >= trouble.job_reboot_s
        if job.phase == "upload":
            if now >= job.until and self._commit_result(job, now):
                self._tell_end(job, Exit.DONE, now)
                if job.then:
                    job.phase, job.until = "dead" if trouble.dies_between else "between", now + SETUP_S
                else:
                    self._over(job, Exit.DONE, now)
                return
            self._watch(made, job, now, since, rebooted)
            return
        if job.phase == "saving":
            if now >= job.until:
                self._save(job)
                self._over(job, job.stop or Exit.BUG, now)
            return
        if trouble.job_rc is not None:
            self._over(job, Exit(trouble.job_rc), now)
            return
        busy_until = STARTUP_S + trouble.job_phase_s
        hangs = since >= self._hangs_from_s(trouble)
        if since > busy_until and not hangs and not rebooted:
            job.worked += min(STEP_S, since - busy_until)
        if job.worked_before + job.worked >= self.work_s[job.stage]:
            job.phase, job.until = "upload", now + trouble.upload_s
        elif job.worked_before + job.worked - job.saved >= CHECKPOINT_S:
            self._save(job)
        self._watch(made, job, now, since, rebooted)

    def _watch(self, made: Made, job: Job_, now: float, since: float, rebooted: bool) -> None:
        """What the supervisor sees in this tick, and what tasks.watch says to it."""
        trouble, latencies = _troubles(made.trouble, job), made.order.offer.latencies
        watch = Watch(idle_s=IDLE_S, tick_s=latencies.tick_s, flush_s=latencies.flush_s)
        hangs = job.phase == "work" and since >= self._hangs_from_s(trouble)
        progress: Progress | None = None
        if job.phase == "upload":
            progress = DECLARED_UPLOAD
        elif STARTUP_S < since <= STARTUP_S + trouble.job_phase_s:
            progress = Progress("download", 1, 0.0, declared=True)
        elif since > STARTUP_S:
            count = int(job.worked / STEP_S) + 2
            progress = Progress("steps", count, job.worked_before + job.worked, self.work_s[job.stage], step_s=STEP_S)
        if not hangs or trouble.hang_is_busy:
            job.cpu_s += STEP_S
        sight = rules.Sight(since, progress, rules.Usage(job.cpu_s, int(job.cpu_s * 1e6)))
        job.activity = rules.advance(job.activity, sight, watch)
        newest = None if self.bucket_is_down() else self._newest_attempt(job.stage)
        if hangs and since - self._hangs_from_s(trouble) > IDLE_S + HANG_GRACE_S:
            self.broken.append("a hung machine ran on")
        remaining = job.remaining_s - since - kept_s(job.then)
        view = rules.View(watch, job.activity, remaining, job.attempt, newest, rebooted)
        decision = rules.decide(view)
        if decision.stop is Exit.STALLED and not hangs:
            self.broken.append("honest work was called a stall")
        if decision.stop is not None:
            job.stop, job.phase = decision.stop, "saving"
            flush = 0.0 if decision.stop is Exit.FENCED else min(trouble.flush_s, latencies.flush_s)
            job.until = now + flush

    def _hangs_from_s(self, trouble: Trouble) -> float:
        """Since the job's start. What computes in a phase that declares itself is work: only its time ends that."""
        if trouble.job_hangs_s is None:
            return math.inf
        return max(trouble.job_hangs_s, STARTUP_S + trouble.job_phase_s)

    def _set_up(self, made: Made, job: Job_, now: float) -> None:
        """Between two stages: the environment of the next one is made, by what is its time as well; then it begins."""
        link, *then = job.then
        left_s = job.remaining_s - (now - job.began)
        if left_s - kept_s(then) <= 0:
            job.phase, job.rc, job.over_at = "over", UNPREPARED, now
        if now < job.until or job.phase == "over":
            return
        before = self._saved(link.stage)
        after = Job_(job.id, link.stage, link.attempt, now, left_s, before, tuple(then), job.number + 1, saved=before)
        made.job = after
        if self.bucket_is_down():
            after.phase, after.rc, after.over_at = "over", int(Exit.BAD_INPUT), now
        elif self._newest_attempt(link.stage) > link.attempt:
            self._over(after, Exit.FENCED, now)
        else:
            self._store(f"{link.stage}/progress.json", Progress(attempt=link.attempt).to_json().encode())

    def _over(self, job: Job_, rc: Exit, now: float) -> None:
        job.phase, job.rc, job.over_at = "over", int(rc), now
        self._tell_end(job, rc, now)

    def _tell_end(self, job: Job_, rc: Exit, now: float) -> None:
        if self.bucket_is_down() or rc is Exit.FENCED:
            return
        ended = Ended(rc.name.lower(), int(rc), "", seconds=now - job.began, attempt=job.attempt)
        self._store(f"{job.stage}/ended.json", ended.to_json().encode(), now)

    def _commit_result(self, job: Job_, now: float) -> bool:
        """Whether the store took it."""
        if self.bucket_is_down() or self._newest_attempt(job.stage) > job.attempt:
            return False
        if not self._has(f"{job.stage}/COMMIT"):
            result = json.dumps({"stage": job.stage}).encode()
            self._store(f"{job.stage}/result.json", result, now)
            self._store(f"{job.stage}/COMMIT", manifest({"result.json": result}), now)
        return True

    def _save(self, job: Job_) -> None:
        """A checkpoint: its files, then its COMMIT; what is taken away in between counts for nothing."""
        worked = job.worked_before + job.worked
        if self.bucket_is_down() or worked <= job.saved or self._newest_attempt(job.stage) > job.attempt:
            return
        state = json.dumps({"worked_s": worked}).encode()
        folder = f"{job.stage}/checkpoints/step-{int(worked)}"
        self._store(f"{folder}/state.json", state)
        self._store(f"{folder}/COMMIT", manifest({"state.json": state}))
        job.saved = worked
        progress = Progress("steps", int(worked), worked, self.work_s[job.stage], attempt=job.attempt)
        self._store(f"{job.stage}/progress.json", progress.to_json().encode())

    def _saved(self, stage: str) -> float:
        steps = [key.split("/")[-2] for key in self._keys(f"{stage}/checkpoints/") if key.endswith("/COMMIT")]
        return max((float(step.removeprefix("step-")) for step in steps), default=0.0)

    def _newest_attempt(self, stage: str) -> int:
        found = self._run_store.get(f"{self.run_prefix}{stage}/task.json")
        return 0 if found is None else int(json.loads(found[0])["attempt"])

    run_prefix = ""

    @property
    def _run_store(self) -> dict[str, tuple[bytes, datetime]]:
        return self.bucket._store

    def _has(self, key: str) -> bool:
        return self.run_prefix + key in self._run_store

    def _keys(self, prefix: str) -> list[str]:
        return [key for key in self._run_store if key.startswith(self.run_prefix + prefix)]

    def _store(self, key: str, data: bytes, now: float | None = None) -> None:
        if key.endswith("/COMMIT"):
            self.committed.add(self.run_prefix + key)
        at = self.clock.elapsed_s if now is None else now
        self._run_store[self.run_prefix + key] = (data, self.clock.true_at(at))


def _troubles(trouble: Trouble, job: Job_) -> Trouble:
    """What goes wrong in the stage at hand."""
    if trouble.job_in in (None, job.number):
        return trouble
    return replace(trouble, job_killed_s=None, job_reboot_s=None, job_hangs_s=None, job_phase_s=0.0, job_rc=None)


HANG_S = 30.0
IDLE_S = 900.0
HANG_GRACE_S = 60.0


def manifest(files: Mapping[str, bytes]) -> bytes:
    entries = {name: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in files.items()}
    return json.dumps({"schema": 1, "fence": 0, "files": entries}).encode()


def deadline_of(made: Made) -> datetime | None:
    parsed = parse_machine_name(made.order.name)
    return parsed.deadline_at if parsed else None
