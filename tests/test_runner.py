"""The runner over the fake provider: ends where it should, never over the cap, and killing it changes nothing.

Money is read from the fake provider's own invoice, not from the ledger.
"""

from __future__ import annotations

import random
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator.calibration import TOOK, ratios_of
from orchestrator.errors import NotOwner
from orchestrator.handover import code_wheel, put_code
from orchestrator.lease import Lease
from orchestrator.ledger import Ledger
from orchestrator.plan import Micros, Overhead, Part, Plan, Range, plan_to_dict
from orchestrator.provision import NoCapacity, ProvisionError
from orchestrator.runner import Outcome, Runner, mark_to_dict
from orchestrator.states import State
from orchestrator.testing import FakeBucket, FakeProvisioner, Faults, VirtualClock, fake_offer
from tasks.contract import DataSource, Ended, EvaluateSettings, Exit, ModelSource, Progress, Task
from tests.plans import make_plan

WORK = {"label": 300.0, "train": 600.0, "evaluate": 60.0}


class Killed(BaseException):
    """SIGKILL, as far as one process can play it."""


class World:
    """A run with everything around it; `client()` is one process that drives it."""

    def __init__(self, tmp_path: Path, plan: Plan | None = None, work_s=WORK, faults=None) -> None:
        self.clock = VirtualClock()
        self.bucket = FakeBucket(self.clock).at("test-abc123")
        self.plan = plan or make_plan(work_s)
        self.provider = FakeProvisioner(self.clock, self.bucket, work_s)
        if faults:
            self.provider.faults = faults
        self.path, self.folder, self.said = tmp_path / "ledger.sqlite", tmp_path, []
        data, sha = code_wheel()
        put_code(self.bucket, data, sha)
        mark = self.clock.mark()
        Ledger(self.path).create_run(
            "test-abc123",
            name="test",
            bucket="fake:",
            cap_micros=self.plan.cap_micros,
            deadline_s=self.plan.deadline_s,
            mark=mark_to_dict(mark),
            at=mark.wall,
            data={"schema": 1, "code_sha256": sha, "owner": "owner1", "plan": plan_to_dict(self.plan)},
        )

    def client(
        self,
        *,
        turns: int | None = None,
        stop_after: int | None = None,
        take_over: bool = False,
        month_cap: int | None = None,
    ) -> Outcome | None:
        """Drives until the end, or for so many turns (then it is 'killed')."""
        if take_over:
            self.bucket.delete("lease.json")
        ledger, count = Ledger(self.path), 0
        lease = Lease.acquire(self.bucket, "owner1", self.clock)
        if take_over:
            ledger.note("test-abc123", "resumed", self.clock.mark().wall)

        def stop() -> bool:
            nonlocal count
            count += 1
            if turns is not None and count > turns:
                raise Killed
            return stop_after is not None and count > stop_after

        runner = Runner(
            ledger=ledger,
            provider=self.provider,
            bucket=self.bucket,
            clock=self.clock,
            plan=self.plan,
            run_id="test-abc123",
            owner="owner1",
            lease=lease,
            code_folder=self.folder / "code",
            say=lambda *words: self.said.append(words),
            stop=stop,
            call_limit_s=None,
            month_cap_micros=month_cap,
        )
        try:
            return runner.run(turn_s=5.0)
        except Killed:
            return None
        finally:
            ledger.close()

    @property
    def run(self):
        return Ledger(self.path).run("test-abc123")

    def check_money(self, cap: int | None = None) -> None:
        cap = self.plan.cap_micros if cap is None else cap
        assert self.provider.live() == []
        assert self.provider.invoice_micros() <= cap
        assert self.run.open_micros == 0
        assert self.provider.invoice_micros() <= self.run.spent_micros <= cap


def test_an_undisturbed_run_does_every_stage_once_and_leaves_nothing(tmp_path):
    world = World(tmp_path)
    assert world.client().state == "done"
    assert list(world.run.done) == list(WORK)
    assert [m.state for m in world.run.machines] == [State.GONE] * 3
    assert len([c for c in world.provider.calls if c[0] == "launch"]) == 3
    world.check_money()


def test_a_run_writes_down_once_what_each_stage_took(tmp_path):
    plan = make_plan(WORK)
    parts = {"create": Part("create fake", Range(1.0, 10.0, 100.0)), "work": Part("work rehearse", Range(1, 1, 1))}
    stages = [replace(stage, candidate_parts=(parts,) * len(stage.candidates)) for stage in plan.stages]
    lost = lambda order, count: Faults(lost_after_s=200.0 if count == 1 else None)  # noqa: E731
    world = World(tmp_path, replace(plan, stages=tuple(stages)), faults=lost)
    assert world.client(turns=45) is None and world.client(take_over=True).state == "done"
    assert [(e.stage, [part["key"] for part in e.data["parts"]]) for e in world.run.entries if e.kind == TOOK] == [
        ("label", ["create fake"]),  # the fake tells no work; training went over two machines
        ("evaluate", ["create fake"]),
    ]
    ratios = ratios_of(Ledger(world.path).told(TOOK, 100))["create fake"]
    assert len(ratios) == 2 and all(2.0 <= ratio <= 3.5 for ratio in ratios)  # up after 20 s, seen within a few


def test_money_is_reserved_in_the_ledger_before_every_create(tmp_path):
    world = World(tmp_path)
    seen = []
    launch = world.provider.launch

    def watching(order):
        row = next(m for m in Ledger(world.path).run("test-abc123").machines if m.name == order.name)
        seen.append((row.state, row.reserved_micros > 0))
        launch(order)

    world.provider.launch = watching
    world.client()
    assert seen == [(State.CREATING, True)] * 3


def test_a_cap_that_runs_out_in_the_middle_ends_the_run_under_it_with_a_checkpoint(tmp_path):
    plan = make_plan({"label": 300.0, "train": 600.0}, cap_micros=300_000)
    world = World(tmp_path, plan, work_s={"label": 300.0, "train": 50_000.0})
    outcome = world.client()
    assert outcome.state == "cap" and "--budget" in outcome.hint
    assert any("train/checkpoints/step-" in stat.key for stat in world.bucket.list())
    world.check_money()


def test_labelling_cannot_eat_the_money_of_the_student(tmp_path):
    plan = make_plan({"label": 300.0, "train": 600.0}, cap_micros=250_000)
    world = World(tmp_path, plan, work_s={"label": 1e6, "train": 600.0})
    assert world.client().state == "cap"
    floor = plan.stages[1].cost_micros.low + plan.stages[1].reserve_micros
    assert world.provider.invoice_micros() <= 250_000 - floor
    world.check_money()


def test_a_capped_run_goes_on_with_more_money_where_it_stopped(tmp_path):
    plan = make_plan({"train": 600.0}, cap_micros=100_000)
    world = World(tmp_path, plan, work_s={"train": 1500.0})
    assert world.client().state == "cap"
    mark = world.clock.mark()
    Ledger(world.path).set_cap("test-abc123", 500_000, None, mark_to_dict(mark), mark.wall)
    assert world.client(take_over=True).state == "done"
    world.check_money(cap=500_000)
    assert world.run.spent_micros < 500_000 * 1500 / 3600 * 1.6  # it did not begin again


def test_a_machine_of_no_price_does_not_begin_what_the_cap_no_longer_covers(tmp_path):
    """The plan's other costs, an API's answers, are in no ledger: a cap lowered below them starts nothing."""
    plan = make_plan({"train": 600.0}, cap_micros=100_000)
    offer = replace(plan.stages[0].offer, infra="local", price_micros_per_hour=0)
    stage = replace(plan.stages[0], candidates=(offer,), candidate_hours=plan.stages[0].candidate_hours[:1])
    plan = replace(plan, stages=(stage,), overhead=(Overhead("answers of an API", Micros(200_000, 200_000, 200_000)),))
    world = World(tmp_path, plan)
    assert world.client().state == "cap"
    assert world.provider.calls == []


def test_what_is_left_pays_for_no_machine_then_none_is_rented(tmp_path):
    world = World(tmp_path, make_plan({"train": 600.0}, cap_micros=20_000))
    assert world.client().state == "cap"
    assert world.provider.calls == []


def test_a_lost_machine_is_replaced_and_its_work_goes_on(tmp_path):
    world = World(tmp_path, faults=lambda order, count: Faults(lost_after_s=200.0 if count in (0, 2) else None))
    assert world.client().state == "done"
    assert [m.stage for m in world.run.machines] == ["label", "label", "train", "train", "evaluate"]
    world.check_money()


def test_preemptions_are_bounded_by_money(tmp_path):
    world = World(
        tmp_path,
        make_plan({"train": 6000.0}, cap_micros=900_000),
        work_s={"train": 6000.0},
        faults=lambda order, count: Faults(lost_after_s=130.0),
    )
    assert world.client().state == "cap"
    assert len(world.run.machines) > 20
    world.check_money()


def test_no_capacity_moves_to_the_next_offer_and_then_gives_up(tmp_path):
    full = lambda order, count: Faults(launch_error=NoCapacity("full") if order.offer.gpu == "RTX3090" else None)  # noqa: E731
    world = World(tmp_path, faults=full)
    assert world.client().state == "done"
    assert {m.order["offer"]["gpu"] for m in world.run.machines if "landed" in m.facts} == {"A10G"}
    world.check_money()
    everywhere = World(tmp_path / "b", faults=lambda order, count: Faults(launch_error=NoCapacity("full")))
    assert everywhere.client().state == "no_capacity"
    everywhere.check_money()


def test_a_create_that_failed_but_made_a_machine_is_torn_down(tmp_path):
    world = World(
        tmp_path,
        faults=lambda order, count: (
            Faults(launch_error=ProvisionError("502"), create_anyway=True) if count == 0 else Faults()
        ),
    )
    assert world.client().state == "done"
    world.check_money()


def test_a_machine_that_is_never_ready_is_given_up_in_time(tmp_path):
    world = World(tmp_path, faults=lambda order, count: Faults(never_ready=count == 0))
    assert world.client().state == "done"
    world.check_money()


def test_a_dead_supervisor_does_not_keep_a_machine_beyond_its_money(tmp_path):
    world = World(
        tmp_path,
        make_plan({"train": 600.0}, cap_micros=120_000),
        work_s={"train": 1e6},
        faults=lambda order, count: Faults(supervisor_dead=True),
    )
    assert world.client().state == "cap"
    world.check_money()


def test_a_landed_machine_that_is_dearer_gets_a_nearer_deadline(tmp_path):
    world = World(
        tmp_path,
        make_plan({"train": 600.0}, cap_micros=150_000),
        work_s={"train": 1e6},
        faults=lambda order, count: Faults(landed=fake_offer(900_000, gpu="RTX4090")),
    )
    assert world.client().state == "cap"
    world.check_money()


def test_a_stall_is_tried_again_once(tmp_path):
    once = World(tmp_path, faults=lambda order, count: Faults(hang_after_s=50.0 if count == 0 else None))
    assert once.client().state == "done"
    once.check_money()
    twice = World(tmp_path / "b", faults=lambda order, count: Faults(hang_after_s=50.0))
    outcome = twice.client()
    assert outcome.state == "failed" and "stalled" in outcome.message
    twice.check_money()


@pytest.mark.parametrize("rc", [Exit.BUG, Exit.BAD_INPUT, Exit.DONE])
def test_an_error_of_the_work_itself_is_not_tried_again(tmp_path, rc):
    world = World(tmp_path, faults=lambda order, count: Faults(rc=int(rc)))
    assert world.client().state == "failed"
    assert len(world.run.machines) == 1
    world.check_money()


def test_a_refused_teardown_is_repeated_until_it_is_accepted(tmp_path):
    world = World(tmp_path, faults=lambda order, count: Faults(terminate_errors=7))
    assert world.client().state == "done"
    world.check_money()


def test_a_teardown_that_is_never_confirmed_ends_with_unconfirmed_and_an_open_row(tmp_path):
    world = World(tmp_path, faults=lambda order, count: Faults(refuses_teardown=True, ends_itself=False))
    outcome = world.client()
    assert outcome.state == "unconfirmed" and "kdcloud down" in outcome.hint
    assert world.run.open_micros > 0 and world.run.live


def test_a_deadline_is_not_the_cap(tmp_path):
    world = World(tmp_path, make_plan({"train": 600.0}, deadline_s=900.0), work_s={"train": 50_000.0})
    assert world.client().state == "deadline"
    assert world.clock.elapsed_s <= 900.0
    world.check_money()


def test_ctrl_c_ends_the_machine_and_the_run_can_go_on(tmp_path):
    world = World(tmp_path)
    assert world.client(stop_after=12).state == "stopped"
    world.check_money()
    assert world.client(take_over=True).state == "done"
    world.check_money()


def test_down_from_another_process_stops_a_living_runner(tmp_path):
    world = World(tmp_path)
    world.client(turns=10)
    Ledger(world.path).note("test-abc123", "stop_requested", world.clock.mark().wall)
    world.bucket.delete("lease.json")
    assert world.client().state == "stopped"
    world.check_money()


@pytest.mark.parametrize("seed", range(20))
def test_killed_after_any_turn_and_started_again_it_ends_in_the_same_place(tmp_path, seed):
    random_ = random.Random(seed)
    world = World(tmp_path)
    for _ in range(random_.randint(1, 4)):
        if world.client(
            turns=random_.randint(1, 40),
            take_over=bool(world.run.machines) or world.bucket.head("lease.json") is not None,
        ):
            break
        world.clock.sleep(random_.choice([0.0, 3.0, 40.0]))
    final = world.client(take_over=True)
    assert final.state == "done"
    assert list(world.run.done) == list(WORK)
    assert [e.stage for e in world.run.entries if e.kind == "stage_done"] == list(WORK)  # no stage twice
    world.check_money()


@pytest.mark.parametrize("statement", range(1, 45))
def test_killed_between_any_two_steps_of_its_own_it_ends_in_the_same_place(tmp_path, monkeypatch, statement):
    """Dies inside a turn: before or after the n-th call that leaves the process (ledger, provider, bucket)."""
    world = World(tmp_path)
    count = 0

    def dying(original):
        def call(*args, **kwargs):
            nonlocal count
            count += 1
            if count == statement:
                raise Killed
            result = original(*args, **kwargs)
            count += 1
            if count == statement:
                raise Killed
            return result

        return call

    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "_append", dying(Ledger._append))
        for name in ("launch", "run", "terminate"):
            patch.setattr(world.provider, name, dying(getattr(world.provider, name)))
        assert world.client() is None
    assert world.client(take_over=True).state == "done"
    assert [e.stage for e in world.run.entries if e.kind == "stage_done"] == list(WORK)
    world.check_money()


def test_whatever_a_provider_raises_the_machines_end_and_the_cap_holds(tmp_path):
    for number, (call, error) in enumerate(
        [
            ("observe", RuntimeError),
            ("run", KeyError),
            ("launch", ZeroDivisionError),
            ("terminate", RuntimeError),
            ("ours", ValueError),
        ]
    ):
        world = World(tmp_path / str(number))
        original, random_ = getattr(world.provider, call), random.Random(number)

        def sometimes(*args, original=original, random_=random_, error=error, **kwargs):
            if random_.random() < 0.5:
                raise error("surprise")
            return original(*args, **kwargs)

        setattr(world.provider, call, sometimes)
        assert world.client().state in ("done", "no_capacity"), call
        world.check_money()


def test_a_job_that_can_never_be_started_does_not_use_the_money_up(tmp_path):
    world = World(tmp_path, make_plan(WORK, cap_micros=5_000_000))

    def never(*args, **kwargs):
        raise ProvisionError("ssh is broken")

    world.provider.run = never
    assert world.client().state == "failed"
    assert world.provider.invoice_micros() < 500_000
    world.check_money(5_000_000)


def test_a_call_that_hangs_is_given_up_and_the_machine_it_makes_late_is_ended(tmp_path):
    world = World(tmp_path, make_plan({"train": 60.0}), work_s={"train": 60.0})
    provider, release, late = world.provider, threading.Event(), []
    launch = provider.launch

    def hanging(order):
        if not late:
            late.append(order)
            release.wait(20)
        launch(order)

    provider.launch = hanging
    ledger = Ledger(world.path)
    runner = Runner(
        ledger=ledger,
        provider=provider,
        bucket=world.bucket,
        clock=world.clock,
        plan=world.plan,
        run_id="test-abc123",
        owner="owner1",
        lease=Lease.acquire(world.bucket, "owner1", world.clock),
        code_folder=tmp_path / "code",
        call_limit_s=0.2,
    )

    def on_turn(snapshot):
        if not release.is_set() and snapshot.run.machines[0].state is State.GONE:
            release.set()
            while late[0].name not in provider.live():
                time.sleep(0.01)

    assert runner.run(on_turn=on_turn, turn_s=5.0).state == "done"
    assert provider.live() == []
    assert len(world.run.machines) == 2


def test_an_old_client_that_wakes_up_touches_nothing(tmp_path):
    world = World(tmp_path)
    ledger = Ledger(world.path)
    old = Lease.acquire(world.bucket, "owner1", world.clock)
    world.client(turns=15, take_over=True)
    runner = Runner(
        ledger=ledger,
        provider=world.provider,
        bucket=world.bucket,
        clock=world.clock,
        plan=world.plan,
        run_id="test-abc123",
        owner="owner1",
        lease=old,
        code_folder=tmp_path / "code",
    )
    world.clock.sleep(60)
    before = (len(world.provider.calls), len(world.run.entries))
    with pytest.raises(NotOwner):
        runner.run(turn_s=5.0)
    assert (len(world.provider.calls), len(world.run.entries)) == before
    world.client(take_over=True)
    world.check_money()


def test_a_bug_tears_down_before_its_traceback_goes_on(tmp_path):
    world = World(tmp_path)
    ledger = Ledger(world.path)
    lease = Lease.acquire(world.bucket, "owner1", world.clock)

    def broken(snapshot):
        if snapshot.machine is not None and snapshot.machine.state is State.LIVE:
            raise ZeroDivisionError("a bug")

    runner = Runner(
        ledger=ledger,
        provider=world.provider,
        bucket=world.bucket,
        clock=world.clock,
        plan=world.plan,
        run_id="test-abc123",
        owner="owner1",
        lease=lease,
        code_folder=tmp_path / "code",
    )
    with pytest.raises(ZeroDivisionError):
        runner.run(turn_s=5.0, on_turn=broken)
    assert world.provider.live() == []


def test_the_wall_clock_may_step_by_hours(tmp_path):
    world = World(tmp_path)
    launch = world.provider.launch

    def stepping(order):
        launch(order)
        world.clock.step(7200 if order.stage != "train" else -7200)

    world.provider.launch = stepping
    assert world.client().state == "done"
    world.check_money()


def test_a_laptop_that_sleeps_finds_its_result_and_pays_for_no_more_than_the_machine_lived(tmp_path):
    world = World(tmp_path)
    world.client(turns=12)
    assert world.run.machines[0].state is State.LIVE
    world.clock.sleep(8 * 3600)
    assert world.client(take_over=True).state == "done"
    assert [m.stage for m in world.run.machines] == list(WORK)  # labels were not made twice
    world.check_money()


def test_what_a_machine_took_to_install_packages_is_paid_although_no_supervisor_counted_it(tmp_path):
    world = World(tmp_path, make_plan({"label": 300.0}), work_s={"label": 300.0})
    put = world.provider._put

    def hasty(key, data, at):
        if key.endswith("/ended.json"):
            ended = Ended.from_json(data.decode())
            data = replace(ended, seconds=ended.seconds - 250.0).to_json().encode()
        put(key, data, at)

    world.provider._put = hasty
    world.client(turns=12)
    assert world.run.machines[0].state is State.LIVE
    world.clock.sleep(8 * 3600)
    assert world.client(take_over=True).state == "done"
    world.check_money()


def test_a_stage_whose_result_is_in_the_bucket_is_not_done_again(tmp_path):
    world = World(tmp_path)
    world.provider._commit("label")
    assert world.client().state == "done"
    assert [m.stage for m in world.run.machines] == ["train", "evaluate"]


def test_an_order_never_carries_a_longer_life_than_its_reservation_pays(tmp_path):
    world = World(tmp_path, make_plan({"train": 600.0}, offers=(fake_offer(),)))
    world.client(turns=6)
    row = world.run.machines[0]
    pays_s = row.reserved_micros * 3600 / 500_000
    assert row.order["lifetime_s"] + fake_offer().latencies.total_s <= pays_s
    assert replace(fake_offer()).latencies.total_s > 0


def test_the_months_budget_ends_a_run_that_its_own_cap_would_let_go_on(tmp_path):
    world = World(tmp_path)
    outcome = world.client(month_cap=80_000)
    assert outcome.state == "cap"
    assert "month" in outcome.message
    assert "kdcloud budget" in outcome.hint
    assert world.provider.invoice_micros() <= 80_000
    world.check_money(80_000)
    assert world.client(take_over=True, month_cap=world.plan.cap_micros).state == "done"


def test_a_stage_cut_short_by_the_months_budget_says_so_and_keeps_its_checkpoint(tmp_path):
    world = World(tmp_path, work_s={"train": 3000.0})
    outcome = world.client(month_cap=200_000)  # 1,440 s at $0.50 an hour
    assert (outcome.state, outcome.stage) == ("cap", "train")
    assert "this month's budget" in outcome.message
    assert any(stat.key.endswith("/COMMIT") for stat in world.bucket.list("train/checkpoints/"))
    world.check_money(200_000)


def test_a_month_in_which_more_than_its_cap_was_spent_already_rents_nothing(tmp_path):
    world = World(tmp_path)
    assert world.client(month_cap=0).state == "cap"
    assert world.provider.calls == []


# --- the gate: the first steps on the real machine


def gated(tmp_path, on_shortfall: str, *, slower: float = 3.0, planned_s: float = 3600.0, **changes) -> World:
    """Training planned at an hour of 1,800 steps, then an evaluation of 600 s, under a cap that pays for little more.

    At $0.50 an hour: $0.50 and $0.0834 for the work, twice $0.0507 for latencies of 365 s, $0.265 to spare.
    """
    plan = make_plan({"train": planned_s, "evaluate": 600.0}, cap_micros=950_000)
    work = {"train": planned_s * slower, "evaluate": 600.0}
    world = World(tmp_path, replace(plan, on_shortfall=on_shortfall, **changes), work_s=work)
    world.provider.steps = {"train": 1800}
    return world


@pytest.mark.parametrize("on_shortfall", ["stop", "fewer_samples", "fewer_epochs"])
def test_a_machine_as_fast_as_planned_passes_the_gate(tmp_path, on_shortfall):
    world = gated(tmp_path, on_shortfall, slower=1.0)
    assert world.client().state == "done"
    (train, _) = world.run.machines
    assert train.facts["forecast"]["hours"] == pytest.approx(1.0, abs=0.02) and "short" not in train.facts
    assert world.bucket.head("train/limit.json") is None
    assert [words for words in world.said if words[0] == "gate"]
    world.check_money()


def test_a_machine_three_times_slower_is_stopped_early_and_what_would_have_fitted_is_said(tmp_path):
    world = gated(tmp_path, "stop")
    outcome = world.client()
    assert outcome.state == "cap" and outcome.stage == "train"
    assert "of it would fit" in outcome.message and "--budget MORE" in outcome.hint
    assert world.provider.invoice_micros() < 50_000  # of 950,000: 20 steps of 6 s and what it takes to see them
    assert any("train/checkpoints/step-" in stat.key for stat in world.bucket.list())
    world.check_money()
    mark = world.clock.mark()
    Ledger(world.path).set_cap("test-abc123", 3_000_000, None, mark_to_dict(mark), mark.wall)
    assert world.client(take_over=True).state == "done"  # from its checkpoint, with the money that it takes
    world.check_money(cap=3_000_000)


@pytest.mark.parametrize("on_shortfall", ["fewer_samples", "fewer_epochs"])
def test_a_machine_three_times_slower_does_less_and_leaves_the_later_stages_their_money(tmp_path, on_shortfall):
    world = gated(tmp_path, on_shortfall)
    assert world.client().state == "done" and list(world.run.done) == ["train", "evaluate"]
    (train, _) = world.run.machines
    assert 0.25 * 1800 <= train.facts["limit"] < 0.5 * 1800  # $0.816 pays for 5,510 s of 10,800
    assert any("are done" in text for kind, _, text in world.said if kind == "warn")
    world.check_money()


def test_what_later_stages_are_expected_to_cost_stays_for_them(tmp_path):
    """Not what they cost at least, which is all that a reservation leaves."""
    plan = gated(tmp_path / "a", "fewer_epochs").plan
    limits = []
    for low, folder in ((83_334, "b"), (0, "c")):
        later = replace(plan.stages[1], cost_micros=Micros(low, 83_334, 83_334))
        slow = {"train": 10_800.0, "evaluate": 600.0}
        world = World(tmp_path / folder, replace(plan, stages=(plan.stages[0], later)), slow)
        world.provider.steps = {"train": 1800}
        assert world.client().state == "done"
        limits.append(world.run.machines[0].facts["limit"])
    assert limits[0] == limits[1]


def test_less_than_a_quarter_is_no_smaller_experiment_but_a_stop(tmp_path):
    world = gated(tmp_path, "fewer_samples", slower=8.0)
    assert world.client().state == "cap"
    assert world.bucket.head("train/limit.json") is None
    assert world.provider.invoice_micros() < 100_000
    world.check_money()


def test_a_stage_that_is_shortened_twice_is_measured_against_its_plan(tmp_path):
    """Told to do less than half, and then far slower: what fits is much of what it was told, and little of the plan."""
    world, real = gated(tmp_path, "fewer_samples"), FakeBucket.get

    def slower(key):
        found = real(world.bucket, key)
        facts = world.run.machines[0].facts if key == "train/progress.json" else {}
        if "limit" not in facts:
            return found
        told.add(facts["limit"])
        now = replace(Progress.from_json(found[0].decode()), total=facts["limit"])
        return replace(now, phase_s=now.phase_s * 2.5).to_json().encode(), found[1]

    told, world.bucket.get = set(), slower
    assert world.client().state == "cap"
    (train, *_) = world.run.machines
    assert train.facts["size"] == 1800 and min(told) >= 0.25 * 1800
    share = int(train.facts["short"]["message"].partition("% of it would fit")[0].rpartition(" ")[2])
    assert 0.25 * train.facts["limit"] / 1800 < share / 100 < 0.25  # of what it was told, it would have been enough
    world.check_money()


def evaluating(tmp_path, **uses) -> World:
    """An evaluation of three models, planned at an hour, that shows half of its first one after 600 s."""
    plan = make_plan({"evaluate": 3600.0}, cap_micros=2_000_000)
    settings = EvaluateSettings("train", ModelSource(path="t"), DataSource("p"), "math", batch_size=8)
    uses = {"prompts": 64.0, "models": 3.0, **uses}
    stage = replace(plan.stages[0], kind="evaluate", settings=replace(settings, engine="transformers"), uses=uses)
    world, real = World(tmp_path, replace(plan, stages=(stage,)), work_s={"evaluate": 3600.0}), FakeBucket.get

    def halfway(key):
        if key != "evaluate/progress.json":
            return real(world.bucket, key)
        attempt = int(world.run.machines[-1].order["attempt"])
        now = Progress("evaluate", 9, 0.5, 3.0, unit="models", phase_s=600.0, attempt=attempt)
        return now.to_json().encode(), None

    world.bucket.get = halfway
    return world


def test_an_evaluations_plan_is_set_beside_the_whole_of_it(tmp_path):
    world = evaluating(tmp_path, teacher_share=0.5)
    assert world.client().state == "done"
    (row,) = world.run.machines
    (words,) = [text for kind, _, text in world.said if kind == "gate"]
    # Half of the teacher took 600 s and is half of the work: 600 + 1,200 s are left, on a machine of some age.
    assert row.facts["forecast"]["hours"] == pytest.approx(0.5, abs=0.02) and "planned 1.0 h" in words


def test_of_one_model_nothing_is_set_beside_the_whole_plan(tmp_path):
    world = evaluating(tmp_path)  # a plan that does not say how a teacher compares
    assert world.client().state == "done"
    assert "forecast" not in world.run.machines[0].facts
    assert not [text for kind, _, text in world.said if kind == "gate"]


def test_a_model_that_will_not_be_paid_for_is_called_one(tmp_path):
    world = evaluating(tmp_path)
    outcome = world.client(month_cap=130_000)  # at $0.50 an hour: 936 s, latencies of 365 s among them
    assert outcome.state == "cap" and "the model at hand alone takes" in outcome.message
    assert "would fit" not in outcome.message  # an evaluation cannot do less


def test_a_deadline_that_will_be_missed_is_seen_at_the_gate(tmp_path):
    world = gated(tmp_path, "stop", deadline_s=6000.0)
    outcome = world.client()
    assert outcome.state == "deadline" and "--deadline" in outcome.hint
    assert world.clock.elapsed_s < 400.0
    world.check_money()


def test_the_gate_leaves_machines_the_time_to_end_before_the_deadline_as_the_plan_does(tmp_path):
    """4,200 s of work: at a tenth more speed they end before 4,050 s, but 365 s earlier they do not."""
    world = gated(tmp_path, "stop", slower=1.0, deadline_s=4050.0)
    assert not world.plan.in_time
    assert world.client().state == "deadline" and world.clock.elapsed_s < 400.0  # not after an hour of training
    world.check_money()


def test_this_months_budget_counts_at_the_gate_like_the_cap(tmp_path):
    world = gated(tmp_path, "stop", slower=1.0)
    outcome = world.client(month_cap=450_000)
    assert outcome.state == "cap" and "of it would fit" in outcome.message and "budget --month MORE" in outcome.hint
    assert world.provider.invoice_micros() < 50_000
    world.check_money()


def test_a_spot_machine_under_this_months_budget_is_judged_by_the_price_it_is_billed_at(tmp_path):
    offers = (fake_offer(spot=True, ceiling_micros_per_hour=1_500_000),)
    plan = make_plan({"train": 3600.0}, cap_micros=9_000_000, offers=offers)
    world = World(tmp_path, plan, work_s={"train": 3600.0})
    world.provider.steps = {"train": 1800}
    world.client(month_cap=900_000)  # pays for 1.8 h as billed, for 0.5 h at the ceiling
    row = world.run.machines[0]
    assert "forecast" in row.facts and "short" not in row.facts


def test_a_spot_machine_is_judged_by_the_price_it_is_billed_at(tmp_path):
    """Its reservation, at twice that price, will not last; what it leaves does."""
    offers = (fake_offer(spot=True, ceiling_micros_per_hour=1_000_000),)
    plan = make_plan({"train": 3600.0, "evaluate": 600.0}, cap_micros=1_000_000, offers=offers)
    world = World(tmp_path, plan, work_s={"train": 3600.0, "evaluate": 600.0})
    world.provider.steps = {"train": 1800}
    world.client()
    row = world.run.machines[0]
    assert "forecast" in row.facts and "short" not in row.facts
    world.check_money()


def test_your_own_machine_and_progress_of_another_attempt_are_not_judged(tmp_path):
    world = gated(tmp_path / "a", "stop")
    local = replace(world.plan.stages[0].offer, infra="local", price_micros_per_hour=500_000)
    stage = replace(world.plan.stages[0], candidates=(local,), candidate_hours=world.plan.stages[0].candidate_hours[:1])
    world = World(tmp_path / "b", replace(world.plan, stages=(stage,)), work_s={"train": 1800.0})
    world.provider.steps = {"train": 1800}
    asked = []
    world.provider.run = lambda name, job, argv, env, real=world.provider.run: (asked.append(name), real(name, job, argv, env))  # noqa: E501
    assert world.client().state == "done" and "forecast" not in world.run.machines[0].facts
    assert Task.from_json(world.bucket.get("train/task.json")[0].decode()).gate is False
    other = gated(tmp_path / "c", "stop", slower=1.0)
    stale = Progress("rehearse", 500, 500.0, 1800.0, phase_s=1e6, attempt=0)
    real = other.bucket.get
    other.bucket.get = lambda key: (stale.to_json().encode(), None) if key == "train/progress.json" else real(key)
    assert other.client().state == "done"


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("on_shortfall", ["stop", "fewer_epochs"])
def test_a_client_killed_at_the_gate_ends_in_the_same_place(tmp_path, seed, on_shortfall):
    random_ = random.Random(seed)
    world = gated(tmp_path, on_shortfall)
    for _ in range(random_.randint(1, 4)):
        if world.client(turns=random_.randint(20, 80), take_over=bool(world.run.machines)):
            break
    states = {"stop": ("cap",), "fewer_epochs": ("done", "cap")}[on_shortfall]
    final = next((e.data["state"] for e in world.run.entries if e.kind == "ended"), None)
    assert (final or world.client(take_over=True).state) in states
    assert world.provider.invoice_micros() < 950_000
    world.check_money()
