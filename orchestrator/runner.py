"""Runs an approved plan: load -> next_action -> act -> record, until every stage is done and every machine is gone.

Nothing is remembered outside ledger and bucket: killing the runner at any point and starting it again ends in the
same place. Every intent is written before the provider is called.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timedelta
from itertools import takewhile
from pathlib import Path
from typing import Any

from orchestrator import spend
from orchestrator.attempts import UNPREPARED, Attempt, Candidate, Fate, verdict
from orchestrator.calibration import TOOK, engine_of, took_of
from orchestrator.clock import Clock, Mark, age_s
from orchestrator.errors import BudgetExceeded, NotOwner, TeardownUnconfirmed
from orchestrator.forecast import LEAST_SHARE, Shortfall, forecast, part_of, planned_of, shrinks
from orchestrator.fronts import needed_hours
from orchestrator.guarded import CALL_LIMIT_S, Guarded
from orchestrator.handover import fetch_code, machine_env, supervisor_argv
from orchestrator.lease import LEASE_S, RENEW_S, Lease
from orchestrator.ledger import Ledger, MachineRow, Run
from orchestrator.mirror import Mirror
from orchestrator.money import human_seconds, shown
from orchestrator.names import machine_name, parse_machine_name
from orchestrator.offers import known_price
from orchestrator.plan import Plan, StagePlan, ending_hours
from orchestrator.planner import api_micros, later_floor_micros, unbooked_micros
from orchestrator.provision import (
    Job,
    JobState,
    Latencies,
    NoCapacity,
    NotYetGone,
    Observation,
    Offer,
    Order,
    Provisioner,
    ProvisionError,
    Status,
)
from orchestrator.shares import OF_ONE_STAGE, Visit, visits
from orchestrator.states import FAILED, LOST, LOST_ORDER, SHORT, TWINS, Do, Event, Machine, State, next_action
from tasks.bucket import Bucket, BucketError, NotFound, read_commit
from tasks.contract import (
    API_SPENT_FILE,
    BOX,
    COMMIT_FILE,
    ENDED_FILE,
    LIMIT_FILE,
    PROGRESS_FILE,
    RESULT_FILE,
    TASK_FILE,
    Ended,
    LabelSettings,
    Limit,
    Link,
    Progress,
    Settings,
    Task,
    Watch,
)

PROVISION_LIMIT_S = 1200.0
NO_CAPACITY = "no capacity"
NEXT = "next"  # entry of a machine: it goes on with another stage
MIN_WORK_S = 5.0  # a machine that could not work longer than this is not worth its minimum charge
JOB_START_LIMIT_S = 180.0
WARN_EVERY_S = 20.0
SWEEP_S, SWEEP_OFTEN_S, YOUNG_S = 600.0, 45.0, 240.0  # how often to look for machines nobody counts with
LOST_GAP_S = 30.0  # a list of machines may be wrong for a moment
UNWATCHED_S = 120.0  # later than due by more than this a second look says nothing of the time since the first
BUCKET_PATIENCE_S = 600.0  # with nothing running, a bucket that does not answer is waited for that long
GATE_EVERY_S = 5.0  # how often the speed of a stage is looked at
TEARDOWN_PATIENCE_S = 60.0  # or three times the provider's own delays, whichever is longer


@dataclass(frozen=True)
class Outcome:
    """How a run ended. `state`: done | cap | deadline | failed | no_capacity | stopped | unconfirmed."""

    state: str
    message: str = ""
    hint: str = ""
    stage: str | None = None


@dataclass(frozen=True)
class Snapshot:
    """What a person watching may want to see, now."""

    run: Run
    stage: str | None
    machine: MachineRow | None
    machine_age_s: float
    progress: Progress | None
    spending_micros: int  # settled plus what open machines have cost until now


class Runner:
    """`say(kind, stage, text)` hears what happens; `stop()` is asked on every turn (Ctrl-C)."""

    def __init__(
        self,
        *,
        ledger: Ledger,
        provider: Provisioner,
        bucket: Bucket,
        clock: Clock,
        plan: Plan,
        run_id: str,
        owner: str,
        lease: Lease,
        code_folder: Path,
        say: Callable[[str, str | None, str], None] = lambda kind, stage, text: None,
        stop: Callable[[], bool] = lambda: False,
        call_limit_s: float | None = CALL_LIMIT_S,
        month_cap_micros: int | None = None,
    ) -> None:
        self.month_cap_micros = month_cap_micros
        self.ledger, self.bucket, self.clock = ledger, bucket, clock
        self.provider = Guarded(provider, self._now, limit_s=call_limit_s, waiting=self._renew)
        self.plan, self.run_id, self.owner, self.lease = plan, run_id, owner, lease
        self.code_folder, self.say, self.stop = code_folder, say, stop
        self.mirror = Mirror(ledger, bucket, run_id, lease, clock)
        self._bucket_since: Mark | None = None
        self._ending_since: dict[str, Mark] = {}
        self._retry: tuple[str, Mark, float] | None = None
        self._job_since: dict[str, Mark] = {}
        self._alive_s: dict[str, float] = {}  # the age at which each machine was last seen
        self._warned: dict[str, Mark] = {}
        self._swept: Mark | None = None
        self._judged: dict[str, Mark] = {}

    def run(self, *, on_turn: Callable[[Snapshot], None] | None = None, turn_s: float = 0.3) -> Outcome:
        """Loops until the run has ended. A bug tears everything down before its traceback goes on."""
        try:
            while True:
                self._renew()
                outcome, moved = self.turn()
                self.mirror.flush()
                if outcome is not None:
                    self._settle_apis(ended=True)
                    self.ledger.note(
                        self.run_id,
                        "ended",
                        self._now(),
                        stage=outcome.stage,
                        data={"state": outcome.state, "message": outcome.message, "hint": outcome.hint},
                    )
                    self.mirror.flush()
                    return outcome
                if on_turn is not None:
                    on_turn(self.snapshot())
                if not moved:
                    self.clock.sleep(turn_s)
        except NotOwner:
            raise  # its machines are somebody else's now: touch nothing
        except Exception as error:
            left = self._emergency()
            if left:
                raise TeardownUnconfirmed(
                    f"kdcloud hit a bug ({error!r}) and could not confirm the end of {', '.join(left)}",
                    hint=f"repeat `kdcloud down {self.run_id}` until it says that nothing is running",
                ) from error
            raise

    def turn(self) -> tuple[Outcome | None, bool]:
        """One round: every open machine one action further, else the next stage. Returns (outcome, something moved)."""
        stopping = self.stop() or stop_requested(self.ledger.run(self.run_id))
        moved = self._turn_machines(stopping)
        self._sweep()
        run = self.ledger.run(self.run_id)
        open_ = _open(run)
        if open_:
            return self._unconfirmed(open_), moved
        outcome, moved = self._next_stage(run, stopping)
        if outcome is not None and self._end_stragglers():
            return None, False
        return outcome, moved

    def _turn_machines(self, stopping: bool) -> bool:
        moved = False
        run = self.ledger.run(self.run_id)
        for row in _open(run):
            moved = self._turn_machine(run, row, stopping) or moved
        return moved

    def snapshot(self) -> Snapshot:
        return snapshot_of(self.ledger.run(self.run_id), self.plan, self.bucket, self.clock)

    # -- machines ----------------------------------------------------------------------------------------------------

    def _turn_machine(self, run: Run, row: MachineRow, stopping: bool) -> bool:
        seen = None if row.state is State.INTENT else self.provider.observe(row.name)
        order_offer = offer_from_dict(row.order["offer"])
        lifetime = float(row.facts.get("lifetime_s", row.order["lifetime_s"]))
        latencies = order_offer.latencies
        machine = Machine(
            state=row.state,
            age_s=self._age(row),
            lifetime_s=lifetime,
            provision_limit_s=min(PROVISION_LIMIT_S, spend.create_limit_s(order_offer, row.reserved_micros)),
            hard_limit_s=lifetime + latencies.tick_s + latencies.flush_s + latencies.handover_s,
            absent_seen=row.absent_seen,
            launched=bool(row.facts.get("launched")),
            absent_s=self._age(row) - float(row.facts.get("absent_age_s") or 0.0),
            gap_s=gap_s(row, latencies),
            copies=int(row.facts.get("copies", 1)),
            short=row.facts.get("short") is not None,
        )
        if seen is not None and seen.state not in (Status.ABSENT, Status.UNKNOWN):
            self._alive_s[row.name] = machine.age_s
        if row.state is State.LIVE:
            row = self._follow(row, seen)
        if row.state is State.LIVE and seen is not None and seen.state in (Status.ABSENT, Status.STOPPING):
            seen = self._with_last_words(row, seen)
        do, why = next_action(machine, seen, stopping=stopping or self._stage_is_done(run, row))
        if do is Do.WAIT and row.state is State.LIVE and seen is not None and seen.job.state is JobState.RUNNING:
            return self._judge(run, row, machine)
        return self._act(run, row, order_offer, machine, seen, do, why)

    def _act(
        self, run: Run, row: MachineRow, offer: Offer, machine: Machine, seen: Observation | None, do: Do, why: str
    ) -> bool:
        self._renew()  # the provider may have taken its time, or this computer slept meanwhile
        match do:
            case Do.SEND:
                if not self.mirror.flush(must=True):
                    self._warn(row.stage, f"nothing was started: {self.mirror.trouble}")
                    self._move(row, Event.DROPPED)
                    return True
                mark = self.clock.mark()
                sent = {"sent": mark_to_dict(mark), "sent_by_store": self._store_now().isoformat()}
                self._move(row, Event.SENT, data=sent)
                self._launch(row, offer)
            case Do.DROP:
                self._move(row, Event.DROPPED)
            case Do.MARK_UP:
                self._mark_up(row, offer, seen)
            case Do.RUN_JOB:
                return self._run_job(run, row, offer, machine)
            case Do.MARK_ENDED:
                assert seen is not None
                self._mark_ended(row, seen)
            case Do.STOP:
                data: dict[str, Any] = {"why": why, **self._ended_at(seen)}
                data["came_up"] = row.state is not State.CREATING or why == LOST_ORDER
                if row.state is State.LIVE:
                    data |= self._work_left(row.serves) | {"begun": self._has_begun(row, row.serves)}
                if why == "the run stops":
                    data["user_stop"] = True
                self._move(row, Event.STOP, data=data)
                if row.state is not State.DRAINING:
                    self.say("stop", row.serves, f"ending the machine: {why}")
            case Do.TERMINATE:
                return self._terminate(row)
            case Do.MARK_ABSENT:
                data = {"absent_age_s": self._age(row), "alive_s": self._alive_s.get(row.name, 0.0)}
                self._move(row, Event.ABSENT, data=data | self._ended_at(seen))
            case Do.MARK_PRESENT:
                self._move(row, Event.PRESENT)
            case Do.MARK_GONE:
                self._mark_gone(row, offer)
            case Do.WAIT:
                return False
        return True

    def _launch(self, row: MachineRow, offer: Offer) -> None:
        if not self.mirror.flush(must=True):
            why = f"the bucket does not take word of it: {self.mirror.trouble}"
            self._warn(row.stage, why)
            self._move(row, Event.STOP, data={"why": why})
            return
        order = Order(
            name=row.name,
            run=self.run_id,
            stage=row.stage,
            offer=offer,
            deadline_at=datetime.fromisoformat(row.order["deadline_at"]),
            lifetime_s=float(row.order["lifetime_s"]),
            fence=self.lease.fence,
        )
        try:
            confirmed = self.clock.mark()
            self.provider.launch(order)
            if age_s(confirmed, self.clock.mark()) >= RENEW_S:
                self._still_mine(row)
        except (ProvisionError, BucketError) as error:
            said = error.message
            if isinstance(error, BucketError):
                said = f"the bucket does not answer: {said}"
            why = f"{NO_CAPACITY}: {said}" if isinstance(error, NoCapacity) else f"could not create: {said}"
            self._warn(row.stage, why)
            self._move(row, Event.STOP, data={"why": why, "came_up": False})
            return
        self.ledger.note(
            self.run_id, "launched", self._now(), stage=row.stage, machine=row.name, data={"launched": True}
        )

    def _still_mine(self, row: MachineRow) -> None:
        """After a create that took long: whoever took the run meanwhile may have ended this machine before it was."""
        try:
            self.lease.confirm()
        except NotOwner:
            if next(m.state for m in self.ledger.run(self.run_id).machines if m.name == row.name) is State.GONE:
                with suppress(ProvisionError):
                    self.provider.terminate(row.name)
            raise

    def _mark_up(self, row: MachineRow, offer: Offer, seen: Observation | None) -> None:
        """Re-prices from what really landed; a deadline may only come nearer."""
        landed = landed_offer(offer, seen.landed_offer if seen else None)
        lifetime = min(float(row.order["lifetime_s"]), spend.lifetime_s(landed, row.reserved_micros))
        self._move(row, Event.UP, data={"landed": offer_to_dict(landed), "lifetime_s": lifetime})
        if landed.infra != "local":
            self.say("up", row.stage, f"{place(landed)} is up after {human_seconds(self._age(row))}")

    def _run_job(self, run: Run, row: MachineRow, offer: Offer, machine: Machine) -> bool:
        (first, attempt), *_ = row.chain
        latencies = offer.latencies
        remaining = spend.supervisor_remaining_s(machine.lifetime_s, machine.age_s, latencies)
        stages = [self._stage(name) for name in row.stages]
        try:
            self.lease.confirm()
            for stage, (_, number) in zip(stages, row.chain, strict=True):
                task = self._task(run, stage, number, offer)
                self.bucket.put(f"{stage.name}/{TASK_FILE}", task.to_json().encode())
            wheel = fetch_code(self.bucket, self._code_sha256(), self.code_folder)
            self.provider.run(
                row.name,
                f"{first}-{attempt}",
                supervisor_argv(self.bucket.url, first, attempt, remaining, then=then_of(row)),
                machine_env(
                    self.bucket, wheel, stages[0].settings, kind=stages[0].kind, infra=offer.infra,
                    seconds=machine.lifetime_s - machine.age_s + latencies.total_s,
                    allow_account_key=bool(run.data.get("allow_account_key")),
                    then=[(stage.kind, stage.settings) for stage in stages[1:]],
                ),
            )  # fmt: skip
        except BucketError as error:
            why = f"the bucket does not take the order: {error.message}"
            self._warn(row.stage, why)
            self._move(row, Event.STOP, data={"why": why})
            return True
        except ProvisionError as error:
            self._warn(row.stage, f"could not start the job yet: {error}")
            since = self._job_since.setdefault(row.name, self.clock.mark())
            if age_s(since, self.clock.mark()) < JOB_START_LIMIT_S:
                return False
            self._move(row, Event.STOP, data={"why": f"its job could not be started: {error}"})
            return True
        self.ledger.note(
            self.run_id,
            "job",
            self._now(),
            stage=row.stage,
            machine=row.name,
            data={"job": f"{first}-{attempt}", "job_age_s": machine.age_s},
        )
        return False

    def _task(self, run: Run, stage: StagePlan, attempt: int, offer: Offer) -> Task:
        return Task(
            run=self.run_id,
            stage=stage.name,
            kind=stage.kind,
            attempt=attempt,
            fence=self.lease.fence,
            bucket=self.bucket.url,
            settings=_with_limit(stage.settings, run.apis.get(stage.name)),
            code_sha256=self._code_sha256(),
            watch=Watch(
                idle_s=self.plan.idle_s,
                stall_floor_s=self.plan.idle_s if stage.kind == BOX else Watch.stall_floor_s,  # people think, too
                tick_s=offer.latencies.tick_s,
                flush_s=offer.latencies.flush_s,
                client_lease_s=LEASE_S if offer.infra == "local" else None,
            ),
            gate=offer.infra != "local",
        )

    def _follow(self, row: MachineRow, seen: Observation | None) -> MachineRow:
        """A machine with several stages goes on by itself once a result is committed: the ledger is told of it."""
        job = Job() if seen is None else seen.job
        gone = seen is not None and seen.state in (Status.ABSENT, Status.STOPPING, Status.FAILED)
        over = gone or job.state in (JobState.DONE, JobState.LOST)
        while (following := row.next_stage) is not None and self._note_result(row.serves):
            ended = self._last_words(row)
            if ended is None and not over and not self._has_begun(row, following):
                break  # they come a moment after the result
            data = {"serves": following, "passed": self._passed(row, ended), **dict.fromkeys(OF_ONE_STAGE)}
            self._fact(row, NEXT, data)
            self.say("start", following, "on the same machine")
            row = next(m for m in self.ledger.run(self.run_id).machines if m.name == row.name)
        return row

    def _passed(self, row: MachineRow, ended: Ended | None) -> dict[str, Any]:
        """What there is to keep of the stages that a machine has done: the age at which each was, its last words."""
        age, done_s = self._age(row), self._stored_age_s(row, f"{row.serves}/{COMMIT_FILE}")
        if done_s is not None:  # nobody may have been there to see it
            age = min(age, done_s)
        kept = {key: row.facts[key] for key in OF_ONE_STAGE if row.facts.get(key) is not None}
        mine = {**kept, "until_s": age, "ended": None if ended is None else asdict(ended)}
        return {**row.facts.get("passed", {}), row.serves: mine}

    def _last_words(self, row: MachineRow) -> Ended | None:
        """Of the supervisor of the stage that the machine serves."""
        ended = read_ended(self.bucket, row.serves)
        return ended if ended is not None and ended.attempt == row.attempt else None

    def _stored_age_s(self, row: MachineRow, key: str) -> float | None:
        """The machine's age, by the store's clock alone, when an object was put there; None where that is not known."""
        try:
            stat = self.bucket.head(key)
        except BucketError:
            return None
        if stat is None or "sent_by_store" not in row.facts:
            return None
        return max(0.0, (stat.modified - datetime.fromisoformat(row.facts["sent_by_store"])).total_seconds())

    def _has_begun(self, row: MachineRow, stage: str) -> bool:
        """Whether a stage was begun on its machine, as far as can be told."""
        if stage == row.stage:
            return True
        progress = read_progress(self.bucket, stage)
        return progress is not None and progress.attempt == dict(row.chain)[stage]

    def _mark_ended(self, row: MachineRow, seen: Observation) -> None:
        data: dict[str, Any] = {
            "rc": seen.job.rc,
            "begun": self._has_begun(row, row.serves),
            **self._work_left(row.serves),
            **self._ended_at(seen),
        }
        ended = self._last_words(row)
        if ended is not None:
            data |= {"ended": asdict(ended), "ended_age_s": self._stored_age_s(row, f"{row.serves}/{ENDED_FILE}")}
        elif not data["begun"] and seen.job.rc != UNPREPARED:
            data["rc"] = None  # it is the stage before that ended so, and that one is done
        self._move(row, Event.JOB_ENDED, data=data)
        self._note_result(row.serves)

    def _with_last_words(self, row: MachineRow, seen: Observation) -> Observation:
        """A machine that ended itself after its job left word of it in the bucket: the job is done, not lost."""
        ended = self._last_words(row)
        if ended is None:
            return seen
        return replace(seen, state=Status.RUNNING, job=Job(str(row.facts.get("job")), JobState.DONE, ended.rc))

    def _terminate(self, row: MachineRow) -> bool:
        self._ending_since.setdefault(row.name, self.clock.mark())
        try:
            self.provider.terminate(row.name)
        except NotYetGone:
            return False
        except ProvisionError as error:
            self._warn(row.serves, f"teardown of {row.name} not accepted yet: {error}")
            return False
        return self.provider.observe(row.name).state is Status.ABSENT

    def _mark_gone(self, row: MachineRow, offer: Offer) -> None:
        """Settles what was observed: from the moment the request was sent until the provider says it ended."""
        landed = row.facts.get("landed")
        never_made = row.reasons[:1] and row.reasons[0].startswith(NO_CAPACITY) and not row.facts.get("alive_s")
        seconds = self._billed_until_s(row, offer.latencies)
        micros = spend.settled_micros(
            offer_from_dict(landed) if landed else offer,
            until_s=seconds,
            alive_s=float(row.facts.get("alive_s", 0.0)),
            reserved=row.reserved_micros,
            copies=int(row.facts.get("copies", 1)),
            landed=bool(landed or never_made),
        )
        self._move(row, Event.GONE, micros=micros, data={"billed_s": seconds})
        cost = shown(micros, self.plan.rate, self.plan.currency)
        self.say("gone", row.serves, f"its machine is gone; {human_seconds(seconds)}, {cost}")

    def _billed_until_s(self, row: MachineRow, latencies: Latencies) -> float:
        """The age at which the machine ended: when it was first missing, or earlier where there is word of it.

        The provider may tell when billing stopped; a supervisor that ended its machine left word of it in the store.
        Where nobody looked for long after it was first missing it may have come back meanwhile, and ended by itself.
        """
        age = self._age(row)
        seconds = float(row.facts.get("absent_age_s") or age)
        if age - seconds > gap_s(row, latencies) + UNWATCHED_S:
            seconds = age
        if row.facts.get("ended_at"):
            sent = mark_from_dict(row.facts["sent"])
            told = (datetime.fromisoformat(row.facts["ended_at"]) - sent.wall).total_seconds()
            seconds = min(seconds, max(0.0, told))
        if row.facts.get("ended_age_s") is not None:
            delays = latencies.handover_s + latencies.tick_s + latencies.api_s + latencies.provision_s
            seconds = min(seconds, float(row.facts["ended_age_s"]) + delays)
        return seconds

    def _unconfirmed(self, open_: list[MachineRow]) -> Outcome | None:
        for row in open_:
            since = self._ending_since.get(row.name)
            latencies = offer_from_dict(row.order["offer"]).latencies
            patience = max(TEARDOWN_PATIENCE_S, 3 * (latencies.api_s + latencies.provision_s), 2 * latencies.flush_s)
            if row.state is State.TEARDOWN_PENDING and since is not None and age_s(since, self.clock.mark()) > patience:
                return Outcome(
                    "unconfirmed",
                    f"the teardown of {row.name} is not confirmed: it may still cost money",
                    f"repeat `kdcloud down {self.run_id}` until it says so, or end it in the provider's console",
                    row.serves,
                )
        return None

    # -- the gate ----------------------------------------------------------------------------------------------------

    def _judge(self, run: Run, row: MachineRow, machine: Machine) -> bool:
        """Renews the forecast of a stage from its speed on a rented machine; acts where the money will not last."""
        offer = offer_from_dict(row.facts.get("landed") or row.order["offer"])
        mark, judged = self.clock.mark(), self._judged.get(row.name)
        if offer.infra == "local" or (judged is not None and age_s(judged, mark) < GATE_EVERY_S):
            return False
        self._judged[row.name] = mark
        stage, progress = self._stage(row.serves), read_progress(self.bucket, row.serves)
        if progress is None or progress.attempt != row.attempt:
            return False
        allowed_s, bound = self._allowed_s(run, row, offer, machine)
        known = planned_of(stage, plain_batches=engine_of(stage.settings, offer) == "transformers")
        seen = [visit for one in run.machines for visit in visits(one) if visit.stage == stage.name]
        size = max((float(visit.facts.get("size") or 0.0) for visit in seen), default=0.0)
        found = forecast(stage.kind, progress, allowed_s=allowed_s, planned=known, size=size or None)
        if found is None:
            return False
        whole_s = machine.age_s - began_s(row) + found.left_s
        if row.facts.get("forecast") is None and found.whole:  # else there is nothing to set beside the plan
            micros = spend.cost_micros(offer, whole_s)
            self._fact(row, "gate", {"forecast": {"hours": whole_s / 3600, "cost_micros": micros}})
            cost = shown(micros, self.plan.rate, self.plan.currency)
            planned = human_seconds(stage.hours.expected * 3600)
            self.say("gate", stage.name, f"at its speed it takes {human_seconds(whole_s)}, {cost}; planned {planned}")
        if isinstance(found, Shortfall):
            return self._fall_short(row, stage, found, offer, bound, progress)
        return False

    def _allowed_s(self, run: Run, row: MachineRow, offer: Offer, machine: Machine) -> tuple[float, str]:
        """Seconds of work that this machine may still do, later stages taking what is planned; and what bounds them.

        At the price that is billed: a spot machine's reservation, at the price that it may reach, ends it sooner, but
        what is left of it is there for the next one.
        """
        index = self.plan.stages.index(self._stage(row.serves))
        later = self.plan.stages[index + 1 :]
        costs = [*(stage.cost_micros for stage in later), *(item.cost_micros for item in self.plan.overhead)]
        floor = later_floor_micros(self.plan, index, run.apis) + sum(cost.expected - cost.low for cost in costs)
        others = run.open_micros - row.open_micros
        available = spend.available_micros(cap=run.cap_micros, spent=run.spent_micros, open_=others, later_floor=floor)
        billed = replace(offer, ceiling_micros_per_hour=None)
        bounds = [(spend.lifetime_s(billed, available) - machine.age_s, "cap")]
        if self.month_cap_micros is not None:
            month = self.ledger.month(self._now()).left_micros(self.month_cap_micros) + row.open_micros
            bounds.append((spend.lifetime_s(billed, month) - machine.age_s, "month"))
        if run.deadline_s is not None:  # as the plan counts: each machine needs time to end before it (needed_hours)
            ends = [(0.0, ending_hours(offer)), *((one.hours.expected, ending_hours(one.offer)) for one in later)]
            bounds.append((run.deadline_s - self._run_age_s(run) - needed_hours(ends) * 3600, "deadline"))
        return min(bounds)

    def _fall_short(
        self, row: MachineRow, stage: StagePlan, found: Shortfall, offer: Offer, bound: str, progress: Progress
    ) -> bool:
        """Tells the stage to do less where the recipe allows it and enough is left of it; ends it otherwise."""
        what = "it" if found.whole else "the model at hand alone"
        seen = "answers" if progress.phase in ("generate", "evaluate") else progress.unit
        speed = f"at the speed of its first {seen} {what} takes {human_seconds(found.left_s)} more"
        share = f": {min(1.0, found.share):.0%} of it would fit" if stage.kind != "evaluate" else ""
        fits = f"what is left allows {human_seconds(found.allowed_s)}{share}"
        limit = row.facts.get("limit")
        if shrinks(stage.settings, self.plan.on_shortfall) and found.share >= LEAST_SHARE and found.total > 0:
            if limit is not None and found.total >= limit and progress.total != limit:
                return False  # told, and not heard yet
            told = Limit(found.total, row.attempt, self.lease.fence)
            try:
                self.lease.confirm()
                self.bucket.put(f"{stage.name}/{LIMIT_FILE}", told.to_json().encode())
            except BucketError as error:
                self._warn(stage.name, f"it is to do less, and the bucket does not take the word: {error.message}")
                return False
            self._fact(row, "limit", {"limit": found.total, "size": found.size})
            less = f"{part_of(stage.settings, found.total, found.size, progress.unit)} are done"
            self.say("warn", stage.name, f"{speed}; {fits}: by on_shortfall, {less}")
            return True
        more = spend.cost_micros(offer, found.left_s) - spend.cost_micros(offer, found.allowed_s)
        amount = shown(max(0, more), self.plan.rate, self.plan.currency)
        resume = f"`kdcloud run --resume {self.run_id}"
        cures = {
            "deadline": f"{resume} --deadline LATER`",
            "month": f"`kdcloud budget --month MORE`, then {resume}`, needs about {amount} more",
        }
        cure = cures.get(bound, f"{resume} --budget MORE` needs about {amount} more")
        short = {
            "bound": bound,
            "message": f"{speed}, and {fits}",
            "hint": f"it was ended with its checkpoint: {cure}, or start anew with fewer samples",
        }
        self._fact(row, "short", {"short": short})
        return True

    def _fact(self, row: MachineRow, kind: str, data: dict[str, Any]) -> None:
        self.ledger.note(self.run_id, kind, self._now(), stage=row.serves, machine=row.name, data=data)

    # -- stages ------------------------------------------------------------------------------------------------------

    def _next_stage(self, run: Run, stopping: bool) -> tuple[Outcome | None, bool]:
        if self._settle_apis(ended=False):
            return None, True
        self._note_took(run)
        stage = next((s for s in self.plan.stages if s.name not in run.done), None)
        if stage is None:
            return Outcome("done"), True
        if self._note_result(stage.name):
            return None, True
        if stopping:
            return Outcome(
                "stopped",
                "every machine is gone",
                f"go on with `kdcloud run --resume {self.run_id}`",
                stage.name,
            ), True
        rows = [m for m in run.machines if m.serves == stage.name]
        resumed_at = max((e.seq for e in run.entries if e.kind == "resumed"), default=0)
        fresh = {e.machine for e in run.entries if e.seq > resumed_at and e.kind == "reserve"}
        tried = [row for row in rows if row.state is State.GONE and "sent" in row.facts and row.name in fresh]
        attempts = [attempt_of(row) for row in tried]
        fate = verdict(attempts, candidates_of(stage))
        if fate.fate is not Fate.TRY:
            return Outcome(str(fate.fate), f"stage {stage.name}: {fate.message}", fate.hint, stage.name), True
        if self._waiting(stage.name, len(rows), fate.wait_s):
            return None, False
        if not self.mirror.flush():
            return self._bucket_away(stage.name), False
        self._bucket_since = None
        return self._reserve(run, stage, fate.offer_index)

    def _bucket_away(self, stage: str) -> Outcome | None:
        """Nothing is running and nothing can be started: waits for the bucket, but not for ever."""
        self._warn(stage, f"waiting for the bucket: {self.mirror.trouble}")
        self._bucket_since = self._bucket_since or self.clock.mark()
        if age_s(self._bucket_since, self.clock.mark()) < BUCKET_PATIENCE_S:
            return None
        return Outcome(
            "failed",
            f"the bucket took no word of what is to be started: {self.mirror.trouble}",
            f"nothing is running; go on with `kdcloud run --resume {self.run_id}` when it answers",
            stage,
        )

    def _reserve(self, run: Run, stage: StagePlan, offer_index: int) -> tuple[Outcome | None, bool]:
        """Money for one machine, and for every stage that goes on on it."""
        offer = stage.candidates[offer_index]
        then = [one for one in joined_after(self.plan, stage, offer) if one.name not in run.done]
        floor = later_floor_micros(self.plan, self.plan.stages.index(then[-1] if then else stage), run.apis)
        try:
            if self._book_api(run, stage, floor):
                return None, True
        except BudgetExceeded as error:
            return Outcome("cap", error.message, self._more(error.hint), stage.name), True
        available = spend.available_micros(
            cap=run.cap_micros, spent=run.spent_micros, open_=run.open_micros, later_floor=floor
        )
        cap_bound = "cap"
        if self.month_cap_micros is not None:
            rest = self.ledger.month(self._now()).left_micros(self.month_cap_micros)
            if rest < available:
                available, cap_bound = rest, "month"
        lifetime, bound = spend.order_lifetime_s(offer, available), cap_bound
        if lifetime >= spend.MAX_LIFETIME_S:
            bound = "limit"
        if run.deadline_s is not None:
            left = run.deadline_s - self._run_age_s(run) - offer.latencies.total_s
            if left < lifetime:
                lifetime, bound = left, "deadline"
        if run.spent_micros + run.open_micros + floor > run.cap_micros:  # a machine of no price would not notice
            lifetime, bound = -1.0, "cap"
        kept_s = [least_s(one, offer) for one in then]
        if lifetime < MIN_WORK_S + stage.startup_hours.expected * 3600 + sum(kept_s):
            if bound == "deadline":
                return Outcome(
                    "deadline",
                    f"stage {stage.name}: the deadline leaves it no time",
                    "resume it with a later --deadline",
                    stage.name,
                ), True
            if bound == "month":
                return Outcome(
                    "cap",
                    f"stage {stage.name}: what is left of this month's budget pays for no useful machine time",
                    f"`kdcloud budget --month MORE`, then `kdcloud run --resume {self.run_id}`",
                    stage.name,
                ), True
            return Outcome(
                "cap",
                f"stage {stage.name}: what is left under the cap pays for no useful machine time",
                f"go on with `kdcloud run --resume {self.run_id} --budget MORE`",
                stage.name,
            ), True
        micros = spend.reserve_micros(offer, lifetime) if offer.price_micros_per_hour else 0
        micros = min(micros, available)
        whole_s = lifetime + offer.latencies.total_s - offer.latencies.unguarded_s  # a reaper acts only after it
        deadline_at = self._store_now() + timedelta(seconds=int(whole_s))
        name = machine_name(self.owner, self.run_id, stage.name, deadline_at)
        while self.ledger.machine_known(name):
            deadline_at -= timedelta(seconds=1)
            name = machine_name(self.owner, self.run_id, stage.name, deadline_at)
        attempt = attempts_at(run, stage.name) + 1
        order: dict[str, Any] = {
            "offer": offer_to_dict(offer),
            "offer_index": offer_index,
            "attempt": attempt,
            "lifetime_s": lifetime,
            "bound": bound,
            "deadline_at": deadline_at,
            "fence": self.lease.fence,
        }
        if then:
            numbers = [attempts_at(run, one.name) + 1 for one in then]
            order["then"] = [[one.name, n, kept] for one, n, kept in zip(then, numbers, kept_s, strict=True)]
        try:
            self.ledger.reserve(
                self.run_id, stage.name, name, micros, self._now(),
                later_floor=floor, order=order, month_cap_micros=self.month_cap_micros,
            )  # fmt: skip
        except BudgetExceeded as error:
            return Outcome("cap", error.message, error.hint, stage.name), True
        again = f"attempt {attempt} " if attempt > 1 else ""
        more = f", and {', '.join(one.name for one in then)} after it" if then else ""
        self.say("start", stage.name, f"{again}on {place(offer)}{more}")
        return None, True

    def _book_api(self, run: Run, stage: StagePlan, floor: int) -> bool:
        """Sets apart what the stage's API may cost, before a machine is asked for. True: it did. Raises BudgetExceeded.

        A cap that was raised meanwhile fills up a line that attempts have used, as far as it reaches beside the
        machines' expected cost.
        """
        whole = api_micros(stage)
        if whole is None:
            return False
        line = run.apis.get(stage.name)
        later = floor - unbooked_micros([stage], run.apis)
        spare = 0
        if line is not None and run.cap_micros > line.cap_micros:
            machines = spend.reserve_micros(stage.offer, stage.hours.expected * 3600)
            spare = run.cap_micros - run.spent_micros - run.open_micros - later - machines
        micros = (line or spend.ApiLine()).to_book_micros(whole, spare=max(0, spare))
        if line is not None and micros == 0:
            return False
        self.ledger.reserve_api(
            self.run_id, stage.name, micros, self._now(), later_floor=later, month_cap_micros=self.month_cap_micros
        )
        return True

    def _more(self, hint: str) -> str:
        """Where a raised budget helps, the command that raises it."""
        if not hint.startswith("raise --budget"):
            return hint
        return f"go on with `kdcloud run --resume {self.run_id} --budget MORE`"

    def _settle_apis(self, *, ended: bool) -> bool:
        """Settles the APIs of stages that are done, with `ended` of all. True: there was something to settle.

        Only while nothing runs: a machine that may live may ask. Where the bucket does not tell what was spent the
        money stays set apart: all of it may be gone.
        """
        run = self.ledger.run(self.run_id)
        settled = False
        for stage, line in run.apis.items():
            if line.open_micros == 0 or _open(run) or not (ended or stage in run.done):
                continue
            total = self._api_spent_micros(run, stage)
            if total is not None:
                self.ledger.settle_api(self.run_id, stage, total, self._now())
                settled = True
        return settled

    def _api_spent_micros(self, run: Run, stage: str) -> int | None:
        """What the stage's API may have cost: by the stage's result, else by what it wrote down before it spent it."""
        try:
            if stage in run.done:
                return int(run.done[stage]["result"]["api"]["cost_micros"])
            told = json.loads(self.bucket.get(f"{stage}/{API_SPENT_FILE}")[0])
            return max(int(told["micros"]), int(told["granted"]))
        except NotFound:
            return 0  # it is written before the first question
        except (BucketError, ValueError, KeyError, TypeError) as error:
            self._warn(stage, f"what its API has cost is not known, and stays reserved: {error}")
            return None

    def _note_result(self, stage: str) -> bool:
        """Notes a committed result once. True when the stage is done."""
        if stage in self.ledger.run(self.run_id).done:
            return True
        try:
            manifest = read_commit(self.bucket, stage)
            if manifest is None:
                return False
            result, _ = self.bucket.get(f"{stage}/{RESULT_FILE}")
        except BucketError as error:
            self._warn(stage, f"the bucket does not answer: {error.message}")
            return False
        files = {name: entry.size for name, entry in manifest.files.items()}
        self.ledger.note(
            self.run_id, "stage_done", self._now(), stage=stage, data={"result": json.loads(result), "files": files}
        )
        self.say("done", stage, "done")
        return True

    def _note_took(self, run: Run) -> None:
        """Writes down once what each stage that is done took: the next plans learn from it."""
        told = {e.stage for e in run.entries if e.kind == TOOK}
        for stage in self.plan.stages:
            if stage.name not in run.done or stage.name in told:
                continue
            machines = [_worked(visit) for row in run.machines for visit in visits(row) if visit.stage == stage.name]
            result, smoke = run.done[stage.name]["result"], bool(run.data.get("smoke"))
            parts = [took.to_dict() for took in took_of(stage, machines, result, smoke=smoke)]
            if parts:
                self.ledger.note(self.run_id, TOOK, self._now(), stage=stage.name, data={"parts": parts})

    def _stage_is_done(self, run: Run, row: MachineRow) -> bool:
        """A machine whose stage has its result and whose job was never sent has nothing to do any more."""
        return row.stage in run.done and row.state in (State.INTENT, State.CREATING)

    def _waiting(self, stage: str, attempt: int, wait_s: float) -> bool:
        key = f"{stage}-{attempt}"
        if self._retry is None or self._retry[0] != key:
            self._retry = (key, self.clock.mark(), wait_s)
        return age_s(self._retry[1], self.clock.mark()) < self._retry[2]

    # -- small things ------------------------------------------------------------------------------------------------

    def _emergency(self) -> list[str]:
        """A bug: ends every machine that may bill before the traceback goes on. Returns those not confirmed."""
        since = self.clock.mark()
        while _open(self.ledger.run(self.run_id)) and age_s(since, self.clock.mark()) < TEARDOWN_PATIENCE_S:
            try:
                self._turn_machines(stopping=True)
            except Exception as error:  # noqa: BLE001 - a second bug must not keep the machines of the first alive
                self._warn(None, f"still tearing down: {error!r}")
                for row in _open(self.ledger.run(self.run_id)):  # a ledger on a full disk must not keep them either
                    with suppress(ProvisionError):
                        self.provider.terminate(row.name)
            self.clock.sleep(0.3)
        return [row.name for row in _open(self.ledger.run(self.run_id))]

    def _sweep(self) -> None:
        """Now and then: ends machines of this run that nobody counts with, and notes names that two machines carry."""
        open_ = _open(self.ledger.run(self.run_id))
        young = any(row.state in (State.CREATING, State.LIVE) and self._age(row) < YOUNG_S for row in open_)
        due_s = SWEEP_OFTEN_S if young else SWEEP_S
        if (open_ and self._swept is None) or (self._swept and age_s(self._swept, self.clock.mark()) >= due_s):
            self._look_for_strangers()

    def _look_for_strangers(self) -> list[str]:
        """Names of machines that were found and told to end."""
        self._swept = self.clock.mark()
        try:
            listed = Counter(seen.name for seen in self.provider.ours() if self._is_of_this_run(seen))
        except ProvisionError:
            return []
        rows = {row.name: row for row in self.ledger.run(self.run_id).machines}
        strangers = [name for name in listed if name not in rows or rows[name].state is State.GONE]
        for name in strangers:
            self._end_stranger(name, rows.get(name))
        for name, copies in listed.items():
            if copies > 1 and name not in strangers and copies > int(rows[name].facts.get("copies", 1)):
                self._warn(rows[name].stage, f"{TWINS}: {name}")
                data = {"copies": copies}
                self.ledger.note(self.run_id, "copies", self._now(), stage=rows[name].stage, machine=name, data=data)
        return strangers

    def _end_stranger(self, name: str, row: MachineRow | None) -> None:
        """A create that was given up and came true late: it is ended, and what it cost is added to the bill."""
        self._warn(None, f"{name} came up late: ending it")
        if row is not None and "sent" in row.facts:
            offer = offer_from_dict(row.facts.get("landed") or row.order["offer"])
            worst = spend.cost_micros(offer, self._age(row) + offer.latencies.ending_s)
            if worst > row.settled_micros:
                self.ledger.charge(row, worst - row.settled_micros, self._now(), why="it came up after it was given up")
        with suppress(ProvisionError):
            self.provider.terminate(name)

    def _end_stragglers(self) -> bool:
        """At the end of the run: whether there still is such a machine, for as long as that is worth waiting for."""
        names = self._look_for_strangers()
        waited = self._ending_since.setdefault("stragglers", self.clock.mark())
        return bool(names) and age_s(waited, self.clock.mark()) < TEARDOWN_PATIENCE_S

    def _is_of_this_run(self, seen: Observation) -> bool:
        parsed = parse_machine_name(seen.name)
        return (
            seen.state is not Status.ABSENT
            and parsed is not None
            and (parsed.owner, parsed.run6) == (self.owner, self.run_id[-6:])
        )

    def _warn(self, stage: str | None, text: str) -> None:
        """Says a warning, but not the same one over and over."""
        mark = self.clock.mark()
        if text not in self._warned or age_s(self._warned[text], mark) >= WARN_EVERY_S:
            self._warned[text] = mark
            self.say("warn", stage, text)

    def _renew(self) -> None:
        """A bucket that does not answer for a moment costs nothing; a lease that was taken over ends this client."""
        try:
            self.lease.renew_if_due()
        except BucketError as error:
            self._warn(None, f"the bucket does not answer: {error.message}")

    def _work_left(self, stage: str) -> dict[str, Any]:
        """What a machine that ends leaves of its stage: the newest checkpoint and the share that was done."""
        progress = read_progress(self.bucket, stage)
        share = min(1.0, progress.done / progress.total) if progress is not None and progress.total else None
        return {"checkpoint": self._last_checkpoint(stage), "share": share}

    def _last_checkpoint(self, stage: str) -> str | None:
        """Key of the newest committed checkpoint, None when there is none or the bucket does not answer."""
        prefix, end = f"{stage}/checkpoints/", f"/{COMMIT_FILE}"
        try:
            keys = [stat.key.removesuffix(end) for stat in self.bucket.list(prefix) if stat.key.endswith(end)]
        except BucketError:
            return None
        return max(keys, key=lambda key: (len(key), key), default=None)

    def _ended_at(self, seen: Observation | None) -> dict[str, Any]:
        return {"ended_at": seen.ended_at} if seen is not None and seen.ended_at is not None else {}

    def _move(self, row: MachineRow, event: Event, *, micros: int = 0, data: dict[str, Any] | None = None) -> None:
        try:
            self.ledger.move(row.name, event, self._now(), micros=micros, data=data)
        except ValueError:
            self.lease.confirm()  # somebody else moved it, then the run is theirs; if not, this is a bug
            raise

    def _age(self, row: MachineRow) -> float:
        """After a reboot of this computer its own clock proves little: the older of its word and the store's."""
        own = machine_age_s(row, self.clock)
        sent = row.facts.get("sent")
        if not sent or sent["boot_id"] == self.clock.mark().boot_id or "sent_by_store" not in row.facts:
            return own
        return max(own, (self._store_now() - datetime.fromisoformat(row.facts["sent_by_store"])).total_seconds())

    def _store_now(self) -> datetime:
        """The bucket's own time: it names a machine's deadline, and a clock set wrong here must not move it."""
        try:
            return self.bucket.now()
        except BucketError:
            return self._now()

    def _run_age_s(self, run: Run) -> float:
        """Seconds since the deadline was given."""
        return age_s(mark_from_dict(run.deadline_from), self.clock.mark())

    def _stage(self, name: str) -> StagePlan:
        return next(s for s in self.plan.stages if s.name == name)

    def _code_sha256(self) -> str:
        return str(self.ledger.run(self.run_id).data["code_sha256"])

    def _now(self) -> datetime:
        return self.clock.mark().wall


def snapshot_of(run: Run, plan: Plan, bucket: Bucket, clock: Clock) -> Snapshot:
    """What the run looks like now, for whoever watches; asks the bucket for progress, the provider for nothing."""
    stage = next((s.name for s in plan.stages if s.name not in run.done), None)
    machine = next((m for m in run.machines if m.state is not State.GONE), None)
    progress = read_progress(bucket, stage) if stage and machine else None
    age = machine_age_s(machine, clock) if machine else 0.0
    return Snapshot(run, stage, machine, age, progress, spending_micros(run, lambda row: machine_age_s(row, clock)))


def machine_age_s(row: MachineRow, clock: Clock) -> float:
    """Seconds since the create request was sent; 0 before."""
    sent = row.facts.get("sent")
    return age_s(mark_from_dict(sent), clock.mark()) if sent else 0.0


def worst_case_micros(row: MachineRow, clock: Clock) -> int:
    """The most an open machine may cost, now; see spend.worst_case_micros."""
    offer = offer_from_dict(row.facts.get("landed") or row.order["offer"])
    return spend.worst_case_micros(offer, reserved=row.reserved_micros, age_s=machine_age_s(row, clock))


def _worked(visit: Visit) -> dict[str, Any]:
    """A stage on a machine as `calibration.took_of` weighs it."""
    row = visit.row
    offer = offer_from_dict(row.facts.get("landed") or row.order["offer"])
    facts = {**visit.facts, "offer": offer, "offer_index": int(row.order["offer_index"])}
    if visit.stage == row.stage:
        return facts
    facts.pop("job_age_s", None)
    return facts | ({"job_age_s": 0.0} if visit.facts.get("begun", True) else {})


def _open(run: Run) -> list[MachineRow]:
    return [row for row in run.machines if row.state is not State.GONE]


def _with_limit(settings: Settings, line: spend.ApiLine | None) -> Settings:
    """The stage's settings with the money for its API that the ledger holds."""
    if line is None or not isinstance(settings, LabelSettings) or settings.api is None:
        return settings
    limit = line.settled_micros + line.open_micros
    return replace(settings, api=replace(settings.api, max_cost_micros=limit))


def landed_offer(ordered: Offer, found: Offer | None) -> Offer:
    """What the machine is billed as: what the provider says landed, where it knows a price."""
    landed = found or ordered
    if not known_price(landed):
        landed = replace(landed, price_micros_per_hour=ordered.price_micros_per_hour)
    return replace(landed, latencies=ordered.latencies, ceiling_micros_per_hour=ordered.ceiling_micros_per_hour)


def gap_s(row: MachineRow, latencies: Latencies) -> float:
    """Seconds between the two looks that make a machine gone: long where a request may still come true."""
    why = row.reasons[0] if row.reasons else ""
    if row.facts.get("launched") and "landed" in row.facts:
        return min(LOST_GAP_S, latencies.provision_s) if why == LOST else 0.0
    return 0.0 if why.startswith(NO_CAPACITY) or why == FAILED else latencies.provision_s


def stop_requested(run: Run) -> bool:
    """Whether `kdcloud down` asked this run to stop since it was started or resumed."""
    words = [e.kind for e in run.entries if e.kind in ("stop_requested", "resumed")]
    return bool(words) and words[-1] == "stop_requested"


def place(offer: Offer) -> str:
    """Where a stage runs, in a few words."""
    return "this machine" if offer.infra == "local" else f"{offer.infra} {offer.instance}"


def attempt_of(row: MachineRow) -> Attempt:
    """A machine that is gone, as the attempt it was."""
    ended = row.facts.get("ended") or {}
    short = row.facts.get("short") if SHORT in row.reasons else None
    if short:
        ended = {"hint": short["hint"]}
    return Attempt(
        offer_index=int(row.order["offer_index"]),
        came_up=bool(row.facts.get("came_up", True)),
        rc=row.job_rc,
        reason=row.reasons[-1] if row.reasons else "",
        message=ended.get("message", ""),
        hint=ended.get("hint", ""),
        bound=short["bound"] if short else row.order["bound"],
        short=short["message"] if short else "",
        time_used_up="its time is used up" in row.reasons,
        checkpoint=row.facts.get("checkpoint"),
        user_stop=bool(row.facts.get("user_stop")),
        lost=LOST in row.reasons,
        billed_s=visits(row)[-1].seconds or 0.0,
        share=row.facts.get("share"),
    )


def began_s(row: MachineRow) -> float:
    """The age of a machine when the stage that it serves began."""
    return max((float(one["until_s"]) for one in row.facts.get("passed", {}).values()), default=0.0)


def joined_after(plan: Plan, stage: StagePlan, offer: Offer) -> tuple[StagePlan, ...]:
    """The stages that go on on the machine of `stage`, in turn: those planned so that can work on `offer`."""
    if not _may_be_joined(stage, offer):
        return ()
    later = plan.stages[plan.stages.index(stage) + 1 :]
    return tuple(takewhile(lambda one: one.joins and _may_be_joined(one, offer), later))


def _may_be_joined(stage: StagePlan, offer: Offer) -> bool:
    """On your own machine each stage is a machine of its own; what asks an API has money of its own."""
    return offer.infra != "local" and api_micros(stage) is None and offer in stage.candidates


def least_s(stage: StagePlan, offer: Offer) -> float:
    """What the stages before it on a machine must leave to a stage, so that they cannot eat it."""
    return stage.candidate_hours[stage.candidates.index(offer)].low * 3600


def attempts_at(run: Run, stage: str) -> int:
    """How many machines were ordered for the stage, whether they came to it or not: a newer one's number is higher."""
    return sum(stage in row.stages for row in run.machines)


def then_of(row: MachineRow) -> list[Link]:
    """What follows on the machine, for its supervisor."""
    return [Link(str(name), int(attempt), float(kept_s)) for name, attempt, kept_s in row.then]


def candidates_of(stage: StagePlan) -> list[Candidate]:
    """The stage's offers as `attempts` weighs them."""
    return [
        Candidate(offer.price_micros_per_hour or 0, hours.expected, offer.spot)
        for offer, hours in zip(stage.candidates, stage.candidate_hours, strict=True)
    ]


def spending_micros(run: Run, age: Callable[[MachineRow], float]) -> int:
    """Settled money plus what open machines have cost until now, each at most its reservation."""
    total = run.spent_micros
    for row in run.live:
        offer = offer_from_dict(row.facts.get("landed") or row.order["offer"])
        total += min(row.reserved_micros, spend.cost_micros(offer, age(row)))
    return total


def read_progress(bucket: Bucket, stage: str) -> Progress | None:
    try:
        return Progress.from_json(bucket.get(f"{stage}/{PROGRESS_FILE}")[0].decode())
    except BucketError:
        return None


def read_ended(bucket: Bucket, stage: str) -> Ended | None:
    """The supervisor's last words; None when there are none or the bucket does not answer."""
    try:
        return Ended.from_json(bucket.get(f"{stage}/{ENDED_FILE}")[0].decode())
    except BucketError:
        return None


def offer_to_dict(offer: Offer) -> dict[str, Any]:
    return {**asdict(offer), "as_of": offer.as_of.isoformat()}


def offer_from_dict(raw: Mapping[str, Any]) -> Offer:
    return Offer(**{**raw, "as_of": datetime.fromisoformat(raw["as_of"]), "latencies": Latencies(**raw["latencies"])})


def mark_to_dict(mark: Mark) -> dict[str, Any]:
    return {"wall": mark.wall.isoformat(), "boot_id": mark.boot_id, "boot_s": mark.boot_s}


def mark_from_dict(raw: Mapping[str, Any]) -> Mark:
    return Mark(datetime.fromisoformat(raw["wall"]), raw["boot_id"], raw["boot_s"])
