"""The fire drill: does the cap hold whatever breaks? Random schedules of faults against everything that spends money.

Planner, runner, states, ledger, lease, `tasks.watch` and reaper are the real ones; cloud, bucket and clock are
`fake_cloud`'s. Overspend is read from the cloud's own invoice. The same seed makes the same schedule and the same end.
"""

from __future__ import annotations

import random
import sqlite3
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

from orchestrator import spend
from orchestrator.clock import Mark
from orchestrator.config import Config
from orchestrator.drill_guards import without as taken_away
from orchestrator.errors import KdcloudError, NotOwner
from orchestrator.fake_cloud import Cloud, Made, Trouble, deadline_of
from orchestrator.handover import code_wheel
from orchestrator.lease import LEASE_S, Lease
from orchestrator.ledger import Ledger
from orchestrator.names import machine_name
from orchestrator.plan import Micros, Plan, Range, StagePlan, plan_to_dict
from orchestrator.planner import make_plan
from orchestrator.provision import Latencies, Offer, Order, ProvisionError
from orchestrator.reap import reap
from orchestrator.recipe import Recipe, parse_recipe
from orchestrator.runner import Outcome, Runner, mark_to_dict
from orchestrator.testing import VirtualClock, fake_offer
from tasks.bucket import BucketError
from tasks.contract import Exit

SCHEMA = 1
NEXT_SEED = 2_654_435_761  # schedules of one drill start here apart
SEEDS = 2**48
RUN, OWNER = "drill-abc123", "owner1"
TURN_S = 10.0
REAP_EVERY_S = 300.0
SLICE_S = 30.0  # nobody sleeps longer without the rest of the world living on
LATENCIES = Latencies(tick_s=5, flush_s=60, api_s=60, provision_s=60, handover_s=30, slack_s=90)
GUARDED = replace(LATENCIES, unguarded_s=540)  # where the provider takes no limit: a reaper's period, grace and calls
SPOT_SHARE = 0.4
ALONE_SHARE = 0.15
TOGETHER_SHARE = 0.3
TOGETHER = (  # what is bad alone and worse at once
    ("client_killed_for_good", "slower_than_planned", "arming_lost"),
    ("laptop_asleep", "slower_than_planned", "arming_lost"),
    ("landed_dearer", "slower_than_planned"),
    ("watchdog_killed", "arming_lost", "slower_than_planned"),
    ("create_fails_but_makes_a_machine", "late_in_lists"),
    ("teardown_refused", "never_ready"),
    ("two_machines_of_one_name", "slower_than_planned"),
)
FILE_LEDGER_SHARE = 0.02
HORIZON_S = 5 * 24 * 3600.0
LIVES = 12  # a client is started at most so often
RECIPE = """
name: drill
budget: 1 USD
infra: [fake]
stages:
  - {name: label, kind: rehearse, steps: LABEL, seconds_per_step: 1}
  - {name: train, kind: rehearse, steps: TRAIN, seconds_per_step: 1}
"""
THIRD = "  - {name: evaluate, kind: rehearse, steps: EVALUATE, seconds_per_step: 1}\n"
JOINS: dict[tuple[tuple[str, ...], bool], float] = {  # what joins the stage before; whether there is a third; how often
    ((), False): 0.45,
    (("train",), False): 0.25,
    (("train", "evaluate"), True): 0.2,
    (("evaluate",), True): 0.1,
}
LATER_SHARE = 0.5  # of these has money enough that later stages are reached
BETWEEN_SHARE = 0.1  # of machines with several stages, on which the job dies between two of them


class Endless(BaseException):
    """A client goes on and on."""


class Killed(BaseException):
    """SIGKILL, as far as one process can play it."""


@dataclass(frozen=True)
class Result:
    """How one schedule ended. `broken`: what none may do; outside the fault model money and machines may slip."""

    seed: int
    faults: tuple[str, ...]
    outcome: str
    outside: bool
    overspend_micros: int
    live: int
    committed_lost: int
    broken: tuple[str, ...]

    @property
    def failed(self) -> bool:
        return bool(self.broken) or (not self.outside and (self.overspend_micros > 0 or self.live > 0))


@dataclass
class Report:
    """What `kdcloud drill` prints."""

    schedules: int
    seed: int
    faults: dict[str, int]
    outcomes: dict[str, int]
    worst_overspend_micros: int
    live_at_end: int
    committed_lost: int
    unbounded: int  # schedules outside the fault model
    unbounded_worst_micros: int
    failing_seeds: list[int]
    failures: list[str]
    seconds: float
    without: str | None = None  # the guard that was taken away

    def to_json(self) -> dict[str, Any]:
        return {"schema": SCHEMA, **asdict(self)}


class DrillClock(VirtualClock):
    """The world goes on while somebody sleeps, in slices."""

    def sleep(self, seconds: float) -> None:
        left = seconds
        while left > 0:
            step = min(left, SLICE_S)
            super().sleep(step)
            left -= step


class DrillLedger(Ledger):
    """May be killed between its statements, and lie on a disk that is full."""

    hook: Callable[[str], None] = staticmethod(lambda what: None)
    is_full: Callable[[], bool] = staticmethod(lambda: False)

    def _append(self, *words: Any) -> None:
        if self.is_full():
            raise sqlite3.OperationalError("database or disk is full")
        self.hook("ledger")
        super()._append(*words)
        self.hook("ledger written")


class ReaperClock:
    """A reaper's own clock: it waits outside the drill's time, so that it can look while a client sleeps."""

    def __init__(self, world: World, *, here: bool) -> None:
        self._world, self._here, self._waited = world, here, 0.0

    def mark(self) -> Mark:
        mark = self._world.clock.mark()
        wall = mark.wall if self._here else self._world.clock.true_now()
        return Mark(wall, mark.boot_id, mark.boot_s + self._waited)

    def sleep(self, seconds: float) -> None:
        self._waited += seconds


class World:
    """One schedule: a run with everything around it."""

    def __init__(self, seed: int, *, kinds: Sequence[str] | None = None) -> None:
        self.seed, self.rng = seed, random.Random(seed)
        self.clock = DrillClock()
        self.label_s, self.train_s = self.rng.randint(20, 40) * 10, self.rng.randint(30, 80) * 10
        self.limited = self.rng.random() < 0.5
        self.reaper = self.rng.choice(["elsewhere", "here", "none"])
        if self.rng.random() < ALONE_SHARE:  # nothing but the client and the supervisor
            self.limited, self.reaper = False, "none"
        self.cap_factor = self.rng.choice([1.0, 1.05, 1.2, 1.5, 2.5])
        self.offers = _offers(self.rng, self.limited)
        self.changes: dict[int, dict[str, Any]] = {}  # by machine, in the order they are made
        self.chained = random.Random(f"same machine {seed}")  # of its own: other schedules stay what they were
        self.joins, self.evaluate_s = _joins(self.chained)
        self.work_s = {"label": float(self.label_s), "train": float(self.train_s)}
        if self.evaluate_s:
            self.work_s["evaluate"] = float(self.evaluate_s)
        if self.joins and self.chained.random() < LATER_SHARE:
            self.cap_factor = max(self.cap_factor, 1.5)
        self.cloud = Cloud(self.clock, self.work_s, self.offers, self._trouble, has_limit=self.limited)
        self.kills: list[int] = []  # at these statements of a client
        self.kills_at: list[float] = []
        self.kill_after_launch = False
        self.pauses: list[tuple[int, float]] = []  # at this statement another client takes over meanwhile
        self.naps: list[tuple[float, float]] = []  # asleep from, seconds
        self.steps: list[tuple[float, float]] = []  # wall clock, at, by
        self.disk_full: list[tuple[float, float]] = []
        self.stops: list[float] = []
        self.more_money = 0.0
        self.for_good = False  # once killed it is never started again
        self.new_boot = False
        self.away_s: list[float] = []
        self.count, self.depth, self.asleep, self.in_client = 0, 0, False, False
        self.next_reap = REAP_EVERY_S
        self.reaping = False
        self.stepped = False
        self.broken: list[str] = []
        self.outcome = ""
        self.outcomes: list[str] = []
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self.on_file = self.rng.random() < FILE_LEDGER_SHARE
        self.faults = tuple(self._draw() if kinds is None else kinds)
        for kind in self.faults:
            FAULTS[kind](self, self.rng)
        self.cloud.statement, self.cloud.uncovered = self._statement, self._uncovered
        self.cloud.ending = self._ending
        self.clock.on_pass.append(self._passes)

    # -- the schedule ------------------------------------------------------------------------------------------------

    def _draw(self) -> list[str]:
        count = self.rng.choice([1, 2, 3, 4, 5, 6, 7, 8])
        drawn = self.rng.sample(sorted(FAULTS), count)
        if self.rng.random() < TOGETHER_SHARE:
            drawn += self.rng.choice(TOGETHER)
        return list(dict.fromkeys(drawn))

    def change(self, **fields: Any) -> None:
        """Something about one of the first machines."""
        self.changes.setdefault(self.rng.choice([0, 0, 0, 1, 1, 2]), {}).update(fields)

    def every(self, **fields: Any) -> None:
        for number in range(40):
            self.changes.setdefault(number, {}).update(fields)

    def _trouble(self, order: Order, number: int) -> Trouble:
        rng = self.rng
        trouble = Trouble(
            create_s=rng.choice([15.0, 30.0, 60.0]), gone_s=rng.choice([1.0, 5.0, 20.0]), timer_lost=rng.random() < 0.3
        )
        trouble = replace(trouble, **self.changes.get(number, {}))
        return self._somewhere(trouble) if self.joins else trouble

    def _somewhere(self, trouble: Trouble) -> Trouble:
        """Where a machine has several stages its trouble comes in one of them, or between two."""
        rng = self.chained
        later_s = rng.choice([0.0, 0.0, self.label_s, self.label_s + self.train_s])
        vanishes_s = None if trouble.vanishes_s is None else trouble.vanishes_s + later_s
        where = rng.choice([None, *range(len(self.joins) + 1)])
        dies = rng.random() < BETWEEN_SHARE
        return replace(trouble, job_in=where, vanishes_s=vanishes_s, dies_between=dies)

    # -- the run -----------------------------------------------------------------------------------------------------

    def play(self) -> Result:
        """From the plan to the moment after which nothing can happen any more."""
        plan = self._plan()
        if plan is not None:
            with ExitStack() as stack:
                if self.on_file:
                    self._folder = tempfile.TemporaryDirectory(prefix="kdcloud-drill-")
                    stack.enter_context(self._folder)
                self._begin(plan)
                self._live(plan)
                self._afterwards()
        return self._judge(plan)

    def _plan(self) -> Plan | None:
        """None when nothing is on offer that has a price."""
        recipe = _recipe(self.label_s, self.train_s, self.evaluate_s)
        try:
            plan = _planned(recipe, self.offers, 10**12)
        except KdcloudError:
            self.outcome = "no offer"
            return None
        except Exception as error:  # noqa: BLE001 - a bug is a result of a drill, not its end
            self.outcome = "bug"
            self.broken.append(f"bug: {error}")
            return None
        plan = _on_one_machine(plan, self.joins)
        cap = max(1, int(plan.needed_micros * self.cap_factor))
        return replace(plan, cap_micros=cap)

    def _begin(self, plan: Plan) -> None:
        self.cloud.run_prefix = f"{RUN}/"
        self.bucket = self.cloud.bucket.at(RUN)
        self.cap = plan.cap_micros
        data, sha = _code()
        self.cloud._run_store[f"{RUN}/code/{sha}.whl"] = (data, self.clock.true_now())
        self.ledger = self._open()
        mark = self.clock.mark()
        self.ledger.create_run(
            RUN, name="drill", bucket="fake:", cap_micros=plan.cap_micros, deadline_s=None, mark=mark_to_dict(mark),
            at=mark.wall, data={"schema": 1, "code_sha256": sha, "owner": OWNER, "plan": plan_to_dict(plan)},
        )  # fmt: skip
        self._hook()

    def _open(self) -> DrillLedger:
        if self._folder is None:
            return DrillLedger.in_memory()  # type: ignore[return-value]
        return DrillLedger(Path(self._folder.name) / "ledger.sqlite")

    def _hook(self) -> None:
        self.ledger.hook = self._statement
        self.ledger.is_full = self._disk_is_full

    def _live(self, plan: Plan) -> None:
        for life in range(LIVES):
            said = self._client(plan, again=life > 0)
            self.outcomes.append(said)
            if said == "killed":
                if self.for_good:
                    break
                self._wait(self.away_s.pop(0) if self.away_s else 25.0)
            elif said == "stopped":
                self._wait(60.0)
            elif said == "cap" and self.more_money:
                self.cap = int(self.cap * self.more_money)
                self.more_money = 0.0
                mark = self.clock.mark()
                with suppress(sqlite3.Error, KdcloudError):
                    self.ledger.set_cap(RUN, self.cap, None, mark_to_dict(mark), mark.wall)
                self._wait(30.0)
            elif said in ("not mine", "unconfirmed", "trouble"):
                self._wait(120.0)
            else:
                break
        self.outcome = self.outcomes[-1]

    def _client(self, plan: Plan, *, again: bool, only_stop: bool = False) -> str:
        """One process from its start to its end; what it ended as."""
        if self._folder is not None and self.depth == 0:
            if again:
                self.ledger.close()
            self.ledger = self._open()
            self._hook()
        was = self.in_client
        self.depth, self.in_client = self.depth + 1, True
        try:
            lease = Lease.acquire(self.bucket, OWNER, self.clock)
            if again:
                self.ledger.note(RUN, "resumed", self.clock.mark().wall)
            runner = Runner(
                ledger=self.ledger, provider=self.cloud, bucket=self.bucket, clock=self.clock, plan=plan, run_id=RUN,
                owner=OWNER, lease=lease, code_folder=_code_folder(), stop=lambda: only_stop or self._is_stopped(),
                call_limit_s=None,
            )  # fmt: skip
            outcome: Outcome = runner.run(turn_s=TURN_S)
            lease.release()
            return outcome.state
        except Killed:
            return "killed"
        except Endless:
            self.broken.append("the run never ended")
            return "endless"
        except NotOwner:
            return "not mine"
        except (KdcloudError, BucketError, sqlite3.Error, ProvisionError):
            return "trouble"
        except Exception as error:  # noqa: BLE001 - a bug is a result of a drill, not its end
            self.broken.append(f"bug: {type(error).__name__}: {error}")
            return "bug"
        finally:
            self.depth, self.in_client = self.depth - 1, was

    def _is_stopped(self) -> bool:
        if self.stops and self.clock.elapsed_s >= self.stops[0]:
            self.stops.pop(0)
            return True
        return False

    def _wait(self, seconds: float) -> None:
        self.clock.sleep(seconds)

    def _afterwards(self) -> None:
        """Until the last machine is gone by itself or by the reaper, or nothing is left that could end it."""
        for _ in range(600):
            live = self.cloud.live()
            if not live:
                return
            if self.clock.elapsed_s > max(_longest_s(made) for made in live) + 2 * REAP_EVERY_S + 600:
                return
            self._wait(60.0)

    # -- what happens besides ----------------------------------------------------------------------------------------

    def _statement(self, what: str) -> None:
        """A client is about to do something that leaves its process, or has just done it."""
        if not self.in_client or self.reaping:
            return
        self.count += 1
        if self.kill_after_launch and what == "launched":
            self.kill_after_launch = False
            raise Killed
        if self.kills and self.count >= self.kills[0]:
            self.kills.pop(0)
            raise Killed
        may_pause = what in ("launch", "terminate", "observe", "run", "bucket") and self.depth == 1
        if self.pauses and may_pause and self.count >= self.pauses[0][0]:
            _, seconds = self.pauses.pop(0)
            if what == "launch" and seconds > LEASE_S:  # frozen in the call itself: nothing can stop what it does
                self.cloud.outside = True
            self._taken_over(seconds)

    def _taken_over(self, seconds: float) -> None:
        """This client sleeps; another one takes the run and drives it to its end; then the first wakes."""
        self.in_client = False
        self._wait(seconds)
        self.depth = 1
        said = self._client(self._current_plan(), again=True)
        self.outcomes.append(f"other: {said}")
        self.depth, self.in_client = 1, True

    def _current_plan(self) -> Plan:
        from orchestrator.session import plan_of

        return plan_of(self.ledger.run(RUN))

    def _passes(self) -> None:
        now = self.clock.elapsed_s
        while self.steps and now >= self.steps[0][0]:
            self.clock.step(self.steps.pop(0)[1])
            self.stepped = True
        if self.next_reap <= now:
            self.next_reap = now + REAP_EVERY_S
            self._reap()
        if self.reaping or not self.in_client:
            return
        if now > HORIZON_S:
            raise Endless
        if self.naps and now >= self.naps[0][0]:
            _, seconds = self.naps.pop(0)
            self.asleep, self.in_client = True, False
            self._wait(seconds)
            self.asleep, self.in_client = False, True
        if self.kills_at and now >= self.kills_at[0]:
            self.kills_at.pop(0)
            if self.new_boot:
                self.clock.reboot(f"boot-{now}")
            raise Killed

    def _reaper_works(self) -> bool:
        """Now, and for as long as it may need to notice and to end a machine."""
        if self.reaper == "here":
            until = self.clock.elapsed_s + GUARDED.unguarded_s
            awake = not self.asleep and not any(at < until for at, _ in self.naps)
            right = not self.stepped and not any(at < until for at, _ in self.steps)
            return awake and right and until < self.cloud.denied_from
        return self.reaper == "elsewhere"

    def _reap(self) -> None:
        """One round of `kdcloud reap --yes`, by this computer's cron or by another one that has no ledger."""
        here = self.reaper == "here"
        if self.reaper == "none" or self.reaping or (here and self.asleep) or not self.cloud.live():
            return
        caller, self.reaping = self.cloud.caller, True
        self.cloud.caller = "client" if here else "reaper"
        try:
            reap(
                ledger=self.ledger if here else Ledger.in_memory(), providers={"fake": self.cloud}, owner=OWNER,
                clock=ReaperClock(self, here=here), do_end=True, bucket_of=lambda url: self.bucket, call_limit_s=None,
            )  # fmt: skip
        except (ProvisionError, BucketError, sqlite3.Error, KdcloudError):
            pass  # looked again in the next round
        finally:
            self.cloud.caller, self.reaping = caller, False

    def _ending(self, made: Made) -> None:
        if self.reaping and not self.stepped and self._is_healthy(made):
            self.broken.append("the reaper ended a healthy machine")

    def _is_healthy(self, made: Made) -> bool:
        """At work for the newest attempt of its stage, before the deadline in its name."""
        job, deadline = made.job, deadline_of(made)
        return (
            job is not None
            and job.phase in ("work", "upload", "between")
            and deadline is not None
            and self.clock.true_now() < deadline
            and self.cloud._newest_attempt(job.stage) == job.attempt
        )

    def _disk_is_full(self) -> bool:
        now = self.clock.elapsed_s
        return any(start <= now < end for start, end in self.disk_full)

    def _uncovered(self, made: Made) -> bool:
        """Whether no layer can begin to end this machine now: outside the promise."""
        client = self.in_client and not self.asleep and self.clock.elapsed_s < self.cloud.denied_from
        if client:
            return False
        if made.trouble.twin:
            return True
        if self.cloud.supervised(made):
            return False
        return made.trouble.dearer > 1 or not (self.limited or self._reaper_works())

    # -- what came of it ---------------------------------------------------------------------------------------------

    def _judge(self, plan: Plan | None) -> Result:
        live = len(self.cloud.live())
        over = self.cloud.invoice_micros() - (self.cap if plan else 0)
        lost = self._committed_lost()
        broken = [*self.broken, *dict.fromkeys(self.cloud.broken)]
        if any(one.touched for one in self.cloud.strangers):
            broken.append("somebody else's machine was touched")
        able = self.cloud.denied_from > self.clock.elapsed_s
        if self.outcome == "unconfirmed" and able and not self.cloud.outside:
            broken.append("a teardown was given up")
        if plan is not None and self.outcome == "done" and not self._has_results():
            broken.append("done without results")
        return Result(
            self.seed, self.faults, self.outcome, self.cloud.outside, max(0, over), live, lost,
            (*broken, *(["a committed artefact is lost"] if lost else [])),
        )  # fmt: skip

    def _has_results(self) -> bool:
        return all(f"{RUN}/{stage}/COMMIT" in self.cloud._run_store for stage in self.work_s)

    def _committed_lost(self) -> int:
        return sum(1 for key in self.cloud.committed if key not in self.cloud._run_store)


# -- faults: each changes one thing about a world -------------------------------------------------------------------

FAULTS: dict[str, Callable[[World, random.Random], None]] = {}
Fault = Callable[[World, random.Random], None]


def fault(function: Fault) -> Fault:
    FAULTS[function.__name__] = function
    return function


@fault
def client_killed(world: World, rng: random.Random) -> None:
    for _ in range(rng.choice([1, 1, 2, 4])):
        world.kills.append((world.kills[-1] if world.kills else 0) + rng.randint(1, 200))
        world.away_s.append(rng.choice([25.0, 25.0, 60.0, 600.0, 7200.0]))


@fault
def client_killed_between_create_and_record(world: World, rng: random.Random) -> None:
    world.kill_after_launch = True
    world.away_s.append(rng.choice([25.0, 300.0, 3600.0]))


@fault
def client_killed_for_good(world: World, rng: random.Random) -> None:
    world.kills_at.append(rng.uniform(5, 900))
    world.for_good = True


@fault
def client_rebooted(world: World, rng: random.Random) -> None:
    world.kills_at.append(rng.uniform(5, 900))
    world.new_boot = True
    world.away_s.append(rng.choice([60.0, 900.0]))


@fault
def create_fails_but_makes_a_machine(world: World, rng: random.Random) -> None:
    world.change(launch="error_but_created", hidden_s=rng.choice([0.0, 20.0, 50.0]))


@fault
def create_fails(world: World, rng: random.Random) -> None:
    world.change(launch="error")


@fault
def no_capacity(world: World, rng: random.Random) -> None:
    world.change(launch="no_capacity")


@fault
def never_ready(world: World, rng: random.Random) -> None:
    world.change(never_ready=True)


@fault
def slow_create(world: World, rng: random.Random) -> None:
    world.change(create_s=rng.uniform(120, 1500))


@fault
def two_machines_of_one_name(world: World, rng: random.Random) -> None:
    """Once, or every time with a last stage that works until its money is used up, where nothing is left over."""
    if world.limited:
        world.change(twin=True)
        return
    world.every(twin=True)
    world.cap_factor = min(world.cap_factor, 1.0)
    world.work_s["train"] *= 3


@fault
def late_in_lists(world: World, rng: random.Random) -> None:
    world.change(hidden_s=rng.uniform(5, 55))


@fault
def missing_from_lists_for_a_moment(world: World, rng: random.Random) -> None:
    start = rng.uniform(60, 400)
    world.change(glitch_s=(start, start + rng.uniform(5, 25)))


@fault
def arming_lost(world: World, rng: random.Random) -> None:
    world.every(timer_lost=True)


@fault
def teardown_refused(world: World, rng: random.Random) -> None:
    world.change(refusals=rng.randint(1, 3))


@fault
def teardown_refused_for_hours(world: World, rng: random.Random) -> None:
    world.change(refusals=1000)
    world.cloud.outside = True


@fault
def listed_after_its_end(world: World, rng: random.Random) -> None:
    world.change(gone_s=rng.uniform(30, 55))


@fault
def interface_down(world: World, rng: random.Random) -> None:
    start = rng.uniform(0, 1200)
    world.cloud.outages.append((start, start + rng.uniform(5, 30)))


@fault
def interface_down_for_hours(world: World, rng: random.Random) -> None:
    start = rng.uniform(0, 1200)
    world.cloud.outages.append((start, start + rng.uniform(1800, 10800)))
    world.cloud.outside = True


@fault
def call_hangs(world: World, rng: random.Random) -> None:
    world.cloud.hangs.append(rng.uniform(0, 900))


@fault
def clock_steps(world: World, rng: random.Random) -> None:
    world.steps.append((rng.uniform(0, 900), rng.choice([-7200.0, -1800.0, 1800.0, 7200.0])))


@fault
def laptop_asleep(world: World, rng: random.Random) -> None:
    world.naps.append((rng.uniform(5, 900), rng.choice([30.0, 300.0, 8 * 3600.0])))


@fault
def node_rebooted(world: World, rng: random.Random) -> None:
    world.change(job_reboot_s=rng.uniform(10, 500))


@fault
def watchdog_killed(world: World, rng: random.Random) -> None:
    world.change(job_killed_s=rng.uniform(10, 500))


@fault
def hung_at_0(world: World, rng: random.Random) -> None:
    world.change(job_hangs_s=rng.choice([0.0, rng.uniform(10, 400)]))


@fault
def hung_at_100_percent(world: World, rng: random.Random) -> None:
    world.change(job_hangs_s=rng.uniform(10, 400), hang_is_busy=True)


@fault
def honest_phase(world: World, rng: random.Random) -> None:
    world.change(job_phase_s=rng.uniform(200, 1500))


@fault
def tensorboard_left_open(world: World, rng: random.Random) -> None:
    world.change(job_hangs_s=rng.uniform(100, 500), hang_is_busy=True)


@fault
def landed_dearer(world: World, rng: random.Random) -> None:
    rng.choice([world.change, world.every])(dearer=rng.choice([1.2, 1.5, 2.0, 2.0]))


@fault
def spot_price_rises(world: World, rng: random.Random) -> None:
    world.every(spot_rises=True)


@fault
def prices_unknown(world: World, rng: random.Random) -> None:
    bad: list[Any] = [None, 0, float("nan"), -1]
    price = rng.choice(bad)
    offer = replace(world.offers[0], price_micros_per_hour=price, gpu="H100", instance="1xH100")
    world.offers.insert(0, offer)
    if rng.random() < 0.1:
        world.offers[:] = [offer]


@fault
def budget_tiny(world: World, rng: random.Random) -> None:
    world.cap_factor = rng.choice([0.01, 0.1, 0.5, 0.8])


@fault
def minimum_charge(world: World, rng: random.Random) -> None:
    quantum, minimum = rng.choice([60, 3600]), rng.choice([600, 3600])
    world.offers[:] = [replace(offer, quantum_s=quantum, minimum_s=minimum) for offer in world.offers]


@fault
def money_ends_while_provisioning(world: World, rng: random.Random) -> None:
    world.cap_factor = min(world.cap_factor, 1.0)
    world.change(create_s=rng.uniform(300, 900))


@fault
def slower_than_planned(world: World, rng: random.Random) -> None:
    factor = rng.choice([3, 10])
    for stage in world.work_s:
        world.work_s[stage] *= factor


@fault
def preempted(world: World, rng: random.Random) -> None:
    world.change(vanishes_s=rng.uniform(30, 600))


@fault
def preempted_20_times(world: World, rng: random.Random) -> None:
    age = rng.uniform(60, 250)
    for number in range(20):
        world.changes.setdefault(number, {})["vanishes_s"] = age


@fault
def partial_upload(world: World, rng: random.Random) -> None:
    world.change(vanishes_s=rng.choice([world.label_s, world.train_s]) + rng.uniform(40, 80), upload_s=120.0)


@fault
def flush_slower_than_its_limit(world: World, rng: random.Random) -> None:
    world.every(flush_s=rng.uniform(60, 600))


@fault
def bucket_unreachable(world: World, rng: random.Random) -> None:
    start = rng.uniform(0, 1200)
    world.cloud.bucket_outages.append((start, start + rng.choice([20.0, 200.0, 3600.0])))


@fault
def node_disk_full(world: World, rng: random.Random) -> None:
    world.change(job_rc=int(Exit.BAD_INPUT))


@fault
def client_disk_full(world: World, rng: random.Random) -> None:
    start = rng.uniform(0, 900)
    world.disk_full.append((start, start + rng.choice([30.0, 600.0])))


@fault
def two_clients(world: World, rng: random.Random) -> None:
    world.pauses.append((rng.randint(1, 150), 0.0))


@fault
def first_client_wakes_late(world: World, rng: random.Random) -> None:
    world.pauses.append((rng.randint(1, 150), rng.uniform(LEASE_S + 1, 400)))


@fault
def budget_extended(world: World, rng: random.Random) -> None:
    world.cap_factor = min(world.cap_factor, 1.0)
    world.more_money = rng.uniform(1.3, 3.0)


@fault
def credentials_expire(world: World, rng: random.Random) -> None:
    world.cloud.denied_from = rng.uniform(60, 900)


@fault
def machines_of_somebody_else(world: World, rng: random.Random) -> None:
    from orchestrator.fake_cloud import Stranger

    late = world.clock.true_now() - timedelta(hours=1)
    for name in (machine_name("other9", "run-zzz999", "train", late), "kd-someones-cluster", "training-of-somebody"):
        world.cloud.strangers.append(Stranger(name))


@fault
def stopped_by_its_user(world: World, rng: random.Random) -> None:
    world.stops.append(rng.uniform(5, 900))


# -- the drill -------------------------------------------------------------------------------------------------------


def seeds_of(seed: int, schedules: int) -> list[int]:
    """The first is `seed` itself, so that a failing one can be played alone."""
    return [(seed + number * NEXT_SEED) % SEEDS for number in range(schedules)]


def play(seed: int) -> Result:
    return World(seed).play()


def drill(
    schedules: int,
    seed: int,
    *,
    without: str | None = None,
    processes: int = 1,
    said: Callable[[int], None] = lambda done: None,
    stop_at_first: bool = False,
) -> Report:
    """Plays every schedule, with one guard of `drill_guards` taken away if named; `said` hears how many are done."""
    began, results = time.monotonic(), []
    for result in _results(seeds_of(seed, schedules), without, processes):
        results.append(result)
        said(len(results))
        if stop_at_first and result.failed:
            break
    inside = [r for r in results if not r.outside]
    failed = [r for r in results if r.failed]
    return Report(
        schedules=len(results),
        seed=seed,
        faults=dict(sorted(Counter(kind for r in results for kind in r.faults).items())),
        outcomes=dict(sorted(Counter(r.outcome for r in results).items())),
        worst_overspend_micros=max((r.overspend_micros for r in inside), default=0),
        live_at_end=sum(r.live for r in inside),
        committed_lost=sum(r.committed_lost for r in results),
        unbounded=len(results) - len(inside),
        unbounded_worst_micros=max((r.overspend_micros for r in results if r.outside), default=0),
        failing_seeds=[r.seed for r in failed],
        failures=[_why(r) for r in failed[:20]],
        seconds=round(time.monotonic() - began, 1),
        without=without,
    )


def _results(seeds: list[int], without: str | None, processes: int) -> Iterator[Result]:
    if processes <= 1:
        with taken_away(without) if without else nullcontext():
            yield from map(play, seeds)
        return
    import multiprocessing

    with multiprocessing.get_context("spawn").Pool(processes, _take_away, (without,)) as pool:
        yield from pool.imap_unordered(play, seeds, chunksize=20)


def _take_away(guard: str | None) -> None:
    """For the whole life of a worker process."""
    if guard is not None:
        _taken.enter_context(taken_away(guard))


_taken = ExitStack()


def render_drill(report: Report, console: Any) -> None:
    """Outcome, faults and what they cost, for people."""
    from rich.table import Table

    table = Table(box=None, show_header=False, pad_edge=False)
    inside = report.schedules - report.unbounded
    table.add_row("promise", _promise(report))
    table.add_row("schedules", f"{report.schedules} from seed {report.seed} in {report.seconds:.0f} s")
    table.add_row("faults", f"{sum(report.faults.values())} of {len(report.faults)} kinds")
    table.add_row(
        "inside the model",
        f"{inside}: overspent by at most {report.worst_overspend_micros} micro-USD, "
        f"{report.live_at_end} machines live at the end, {report.committed_lost} committed artefacts lost",
    )
    table.add_row(
        "outside of it",
        f"{report.unbounded} (nothing could reach the provider): overspent by at most "
        f"{report.unbounded_worst_micros} micro-USD",
    )
    table.add_row("runs ended as", ", ".join(f"{name} {count}" for name, count in report.outcomes.items()))
    console.print(table)
    for line in report.failures:
        console.print(line, markup=False, soft_wrap=True)


def _promise(report: Report) -> str:
    if report.failing_seeds:
        expected = f", as it must be without {report.without}" if report.without else ""
        return f"[bold red]broken[/]{expected}"
    if report.without is None:
        return "held"
    return (
        f"not put to the test: {report.schedules} schedules without {report.without} never needed it\n"
        f"next: kdcloud drill --without {report.without} --schedules {max(1000, 10 * report.schedules)}"
    )


def _why(result: Result) -> str:
    said = list(result.broken)
    if result.overspend_micros and not result.outside:
        said.append(f"overspent by {result.overspend_micros} micro-USD")
    if result.live and not result.outside:
        said.append(f"{result.live} live at the end")
    return f"{result.seed}: {'; '.join(said)} ({', '.join(result.faults)})"


# -- small things ----------------------------------------------------------------------------------------------------


def _offers(rng: random.Random, limited: bool) -> list[Offer]:
    cards = rng.sample(["RTX3090", "A10G", "A100", "L4"], rng.choice([2, 3]))
    latencies = LATENCIES if limited else GUARDED
    offers = [fake_offer(rng.randint(200_000, 3_000_000), gpu=card, latencies=latencies) for card in cards]
    if rng.random() < SPOT_SHARE:
        offers += [_on_spot(offer, rng.uniform(0.2, 0.8)) for offer in offers]
    return offers


def _on_spot(offer: Offer, share: float) -> Offer:
    price = offer.price_micros_per_hour or 0
    return replace(offer, spot=True, price_micros_per_hour=int(price * share), ceiling_micros_per_hour=price)


def _joins(rng: random.Random) -> tuple[tuple[str, ...], int]:
    """(the stages that go on on the machine before them, seconds of a third stage or 0)"""
    joins, is_third = rng.choices(*zip(*JOINS.items(), strict=True))[0]
    return joins, rng.randint(6, 30) * 10 if is_third else 0


def _on_one_machine(plan: Plan, joins: Sequence[str]) -> Plan:
    """The plan with these stages on the machine of the one before each."""
    stages: list[StagePlan] = []
    for stage in plan.stages:
        if stage.name in joins:
            stage = _joined(stage, stages[-1].candidates)
        elif stage.joins:
            stage = _alone(stage, plan.stages[0].startup_hours)
        stages.append(stage)
    return replace(plan, stages=tuple(stages))


def _alone(stage: StagePlan, start: Range) -> StagePlan:
    """The stage on a machine of its own, that takes `start` until it can work."""
    hours, offer = stage.hours + start, stage.offer
    costs = (spend.cost_micros(offer, value * 3600) for value in (hours.low, hours.expected, hours.high))
    return replace(
        stage, joins=False, candidate_hours=tuple(one + start for one in stage.candidate_hours), hours=hours,
        startup_hours=start, cost_micros=Micros(*costs), reserve_micros=spend.latency_reserve_micros(offer),
    )  # fmt: skip


def _joined(stage: StagePlan, candidates: tuple[Offer, ...]) -> StagePlan:
    """The stage as one that needs no machine of its own: its work alone, and no reserve for latencies."""
    start = stage.startup_hours
    hours = Range(*(max(0.0, getattr(stage.hours, end) - getattr(start, end)) for end in ("low", "expected", "high")))
    costs = (spend.cost_micros(candidates[0], value * 3600) for value in (hours.low, hours.expected, hours.high))
    return replace(
        stage, joins=True, candidates=candidates, candidate_hours=(hours,) * len(candidates), hours=hours,
        startup_hours=Range(0.0, 0.0, 0.0), cost_micros=Micros(*costs), reserve_micros=0,
    )  # fmt: skip


@cache
def _recipe(label_s: int, train_s: int, evaluate_s: int) -> Recipe:
    text = RECIPE.replace("LABEL", str(label_s)).replace("TRAIN", str(train_s))
    text += THIRD.replace("EVALUATE", str(evaluate_s)) if evaluate_s else ""
    return parse_recipe(text, Path("drill.yaml"))


def _planned(recipe: Recipe, offers: list[Offer], cap: int) -> Plan:
    from orchestrator.offers import offers_for
    from orchestrator.testing import START

    class Source:
        def offers(self, need: Any) -> list[Offer]:
            return list(offers)

    config = Config(owner=OWNER, currency="USD", bucket="fake:")
    source: Any = Source()
    return make_plan(
        recipe, config=config, offers_for=lambda need: offers_for(need, recipe, source, config), now=START,
        cap_micros=cap,
    )  # fmt: skip


@cache
def _code() -> tuple[bytes, str]:
    return code_wheel()


@cache
def _code_folder() -> Path:
    import atexit

    folder = tempfile.TemporaryDirectory(prefix="kdcloud-drill-code-")
    atexit.register(folder.cleanup)
    data, sha = _code()
    Path(folder.name, f"{sha}.whl").write_bytes(data)
    return Path(folder.name)


def _longest_s(made: Made) -> float:
    return made.created + made.order.lifetime_s + made.order.offer.latencies.total_s
