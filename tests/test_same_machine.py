"""Stages on one machine: it goes on by itself, is paid once, and whatever breaks it the rest is started anew.

Money is read from the fake provider's own invoice, not from the ledger.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from orchestrator.attempts import UNPREPARED
from orchestrator.calibration import TOOK
from orchestrator.clock import SystemClock
from orchestrator.handover import code_wheel, put_code
from orchestrator.lease import Lease
from orchestrator.ledger import Ledger
from orchestrator.page_data import timeline
from orchestrator.plan import Part, Plan, Range, plan_to_dict
from orchestrator.provision_local import LocalProvisioner, local_offer
from orchestrator.report import build_report
from orchestrator.runner import Runner, joined_after, mark_to_dict, snapshot_of
from orchestrator.session import live_machines
from orchestrator.shares import visits
from orchestrator.states import State
from orchestrator.testing import Faults, fake_offer
from tasks.bucket import open_bucket
from tasks.contract import Ended, Exit, Limit, RehearseSettings, Task
from tests.plans import make_plan, make_row
from tests.test_runner import WORK, World


def chained(joins: Collection[str] = ("train", "evaluate"), work_s: Mapping[str, float] = WORK, **changes: Any) -> Plan:
    """A plan whose named stages go on on the machine of the one before them."""
    plan = make_plan(work_s, **changes)
    stages = tuple(replace(s, joins=True, reserve_micros=0) if s.name in joins else s for s in plan.stages)
    return replace(plan, stages=stages)


def launches(world: World) -> list[str]:
    return [name.split("-")[3] for what, name in world.provider.calls if what == "launch"]


def shares(world: World) -> dict[str, list[tuple[float, int]]]:
    """(seconds, micros) of every stage on every machine; checks that nothing is lost on the way."""
    found: dict[str, list[tuple[float, int]]] = {}
    for row in world.run.machines:
        told = visits(row)
        assert sum(one.micros or 0 for one in told) == row.settled_micros
        if "billed_s" in row.facts:
            assert sum(one.seconds or 0.0 for one in told) == pytest.approx(row.facts["billed_s"])
        for one in told:
            found.setdefault(one.stage, []).append((one.seconds or 0.0, one.micros or 0))
    return found


def test_joined_stages_share_one_machine_and_its_cost_is_split_by_their_time(tmp_path: Path) -> None:
    world = World(tmp_path, chained())
    assert world.client().state == "done"
    assert list(world.run.done) == list(WORK)
    assert launches(world) == ["label"] and len(world.run.machines) == 1
    found = {stage: seconds for stage, ((seconds, _),) in shares(world).items()}
    assert found == pytest.approx({"label": 300 + 22.5, "train": 600, "evaluate": 60 + 2.5}, abs=10)
    world.check_money()
    (tmp_path / "alone").mkdir()
    alone = World(tmp_path / "alone")
    alone.client()
    assert world.provider.invoice_micros() < alone.provider.invoice_micros()


def test_only_what_is_planned_so_is_joined(tmp_path: Path) -> None:
    world = World(tmp_path, chained(["evaluate"]))
    assert world.client().state == "done"
    assert launches(world) == ["label", "train"]
    world.check_money()


# -- what breaks it


@pytest.mark.parametrize(
    ("lost_after_s", "machines", "done"),
    [
        (200.0, ["label", "label"], "label 1, train 1, evaluate 1; label 2, train 2, evaluate 2"),
        (600.0, ["label", "train"], "label 1, train 1, evaluate 1; train 2, evaluate 2"),
        (960.0, ["label", "evaluate"], "label 1, train 1, evaluate 1; evaluate 2"),
    ],
)
def test_the_rest_of_what_a_lost_machine_was_to_do_is_started_anew_on_one(
    tmp_path: Path, lost_after_s: float, machines: list[str], done: str
) -> None:
    lost = lambda order, count: Faults(lost_after_s=None if count else lost_after_s)  # noqa: E731
    world = World(tmp_path, chained(), faults=lost)
    assert world.client().state == "done"
    assert launches(world) == machines
    told = "; ".join(", ".join(f"{name} {number}" for name, number in row.chain) for row in world.run.machines)
    assert told == done
    assert world.run.machines[0].serves == machines[1]
    tasks = {name: Task.from_json(world.bucket.get(f"{name}/task.json")[0].decode()) for name in WORK}
    assert {name: task.attempt for name, task in tasks.items()} == {
        name: sum(name in dict(row.chain) for row in world.run.machines) for name in WORK
    }
    assert sum(len(found) for found in shares(world).values()) == len(WORK) + 1
    world.check_money()


@pytest.mark.parametrize(
    ("stage", "rc", "state", "machines"),
    [
        ("train", Exit.BUG, "failed", ["label"]),
        ("evaluate", Exit.BAD_INPUT, "failed", ["label"]),
        ("train", Exit.STALLED, "done", ["label", "train"]),
        ("evaluate", Exit.TERMINATED, "done", ["label", "evaluate"]),
    ],
)
def test_a_stage_that_is_not_done_ends_its_machine_and_is_judged_for_itself(
    tmp_path: Path, stage: str, rc: Exit, state: str, machines: list[str]
) -> None:
    fails = lambda order, count: Faults(rc=None if count else int(rc), strikes=stage)  # noqa: E731
    world = World(tmp_path, chained(), faults=fails)
    outcome = world.client()
    assert (outcome.state, launches(world)) == (state, machines)
    assert outcome.stage == (stage if state == "failed" else None)
    assert world.run.machines[0].serves == stage and world.run.machines[0].job_rc == rc
    assert set(world.run.done) >= set(list(WORK)[: list(WORK).index(stage)])
    world.check_money()


@pytest.mark.parametrize("seed", range(12))
def test_killed_after_any_turn_and_taken_over_it_ends_in_the_same_place(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    lost_s = rng.choice([None, rng.uniform(30, 1200)])
    world = World(tmp_path, chained(), faults=lambda order, count: Faults(lost_after_s=None if count else lost_s))
    outcome = None
    while outcome is None:
        outcome = world.client(turns=rng.randint(1, 60), take_over=bool(world.run.machines))
        world.clock.sleep(rng.choice([30.0, 60.0, 500.0]))
    assert outcome.state == "done"
    assert list(world.run.done) == list(WORK)
    assert len(world.run.machines) <= (1 if lost_s is None else 2)
    shares(world)
    world.check_money()


def test_a_closed_laptop_does_not_stop_it_and_finds_every_stage_with_its_own_time(tmp_path: Path) -> None:
    world = World(tmp_path, chained())
    world.client(turns=12)
    assert world.run.machines[0].state is State.LIVE and not world.run.done
    world.clock.sleep(8 * 3600)
    assert world.client(take_over=True).state == "done"
    assert launches(world) == ["label"]
    found = {stage: seconds for stage, ((seconds, _),) in shares(world).items()}
    assert found["train"] == pytest.approx(600) and found["label"] == pytest.approx(300, abs=60)
    assert found["evaluate"] < 60 + 400  # and the delays of its end
    world.check_money()


def test_a_stage_cannot_eat_what_later_ones_on_the_machine_need(tmp_path: Path) -> None:
    plan = chained(cap_micros=400_000)
    world = World(tmp_path, plan, work_s={**WORK, "label": 1e6})
    outcome = world.client()
    assert (outcome.state, outcome.stage) == ("cap", "label")
    later = sum(stage.cost_micros.low for stage in plan.stages[1:])
    assert world.run.cap_micros - world.run.spent_micros >= later
    world.check_money()


def test_the_last_stage_may_use_what_those_before_it_left(tmp_path: Path) -> None:
    world = World(tmp_path, chained(cap_micros=400_000), work_s={**WORK, "evaluate": 1000.0})
    assert world.client().state == "done"
    world.check_money()


def test_a_deadline_holds_for_all_stages_of_a_machine(tmp_path: Path) -> None:
    world = World(tmp_path, chained(deadline_s=1500.0), work_s={**WORK, "train": 3000.0})
    outcome = world.client()
    assert (outcome.state, outcome.stage) == ("deadline", "train")
    assert world.clock.elapsed_s < 1500.0
    world.check_money()


def test_packages_that_a_later_stage_cannot_be_given_are_that_stages_trouble(tmp_path: Path) -> None:
    world = World(tmp_path, chained())
    provider, fault = world.provider, UNPREPARED

    def end(machine: Any, rc: int, at: float) -> None:
        if rc != Exit.DONE or machine.stage != "label":
            return real(machine, rc, at)
        then, machine.then = machine.then, ()
        real(machine, rc, at)
        machine.rc, machine.then = fault, then

    real = provider._end
    provider._end = end  # type: ignore[method-assign]
    assert world.client().state == "done"
    first, second = world.run.machines
    assert (first.serves, first.job_rc, second.serves) == ("train", UNPREPARED, "evaluate")
    assert second.order["offer_index"] == 1  # what could not be prepared is not tried again
    world.check_money()


def test_a_job_that_ends_before_its_next_stage_began_is_no_failure_of_that_stage(tmp_path: Path) -> None:
    world = World(tmp_path, chained(["train"]))
    real = world.provider._end

    def end(machine: Any, rc: int, at: float) -> None:
        machine.then = ()
        real(machine, rc, at)

    world.provider._end = end  # type: ignore[method-assign]
    assert world.client().state == "done"
    assert launches(world) == ["label", "train", "evaluate"]
    assert (world.run.machines[0].serves, world.run.machines[0].job_rc) == ("train", None)
    world.check_money()


# -- what else must know where a machine is


def shrinking(tmp_path: Path, on_shortfall: str) -> World:
    """Training on the machine of its labels is three times slower than planned."""
    plan = chained(["train", "evaluate"], {"label": 300.0, "train": 3600.0, "evaluate": 60.0}, cap_micros=800_000)
    work_s = {"label": 300.0, "train": 10_800.0, "evaluate": 60.0}
    world = World(tmp_path, replace(plan, on_shortfall=on_shortfall), work_s=work_s)
    world.provider.steps = {"label": 300, "train": 3600}
    return world


def test_the_gate_judges_the_stage_that_a_machine_is_at(tmp_path: Path) -> None:
    world = shrinking(tmp_path, "stop")
    outcome = world.client()
    assert (outcome.state, outcome.stage) == ("cap", "train")
    (row,) = world.run.machines
    by_stage = {one.stage: one for one in visits(row)}
    assert by_stage["label"].facts["forecast"]["hours"] == pytest.approx(320 / 3600, rel=0.05)
    assert by_stage["train"].facts["forecast"]["hours"] == pytest.approx(3.0, rel=0.01)
    world.check_money()


def test_a_later_stage_may_do_less_and_leaves_the_rest_its_money(tmp_path: Path) -> None:
    world = shrinking(tmp_path, "fewer_epochs")
    assert world.client().state == "done"
    assert launches(world) == ["label"]
    limit = Limit.from_json(world.bucket.get("train/limit.json")[0].decode())
    assert limit.attempt == 1 and 900 < limit.total < 3600
    world.check_money()


def test_what_each_stage_took_is_its_own(tmp_path: Path) -> None:
    plan = chained()
    later = {"around": Part("around", Range(1.0, 100.0, 200.0)), "work": Part("work", Range(1.0, 300.0, 600.0))}
    own = {"create": Part("create fake", Range(1.0, 10.0, 100.0)), **later}
    stages = [replace(s, candidate_parts=(later if s.joins else own,) * 2) for s in plan.stages]
    world = World(tmp_path, replace(plan, stages=tuple(stages)))
    real = world.provider._put

    def put(key: str, data: bytes, at: float) -> None:
        if key.endswith("/ended.json"):  # as a machine that tells how long it worked
            ended = Ended.from_json(data.decode())
            data = replace(ended, work_s=ended.seconds - 50.0).to_json().encode()
        real(key, data, at)

    world.provider._put = put  # type: ignore[method-assign]
    assert world.client().state == "done"
    told = {
        e.stage: {part["key"]: part["actual_s"] for part in e.data["parts"]}
        for e in world.run.entries
        if e.kind == TOOK
    }
    assert {stage: set(parts) for stage, parts in told.items()} == {
        "label": {"create fake", "around", "work"}, "train": {"around", "work"}, "evaluate": {"around", "work"},
    }  # fmt: skip
    assert all(parts["around"] == pytest.approx(50.0) for parts in told.values())


def test_on_your_own_machine_and_where_an_offer_is_missing_nothing_is_joined() -> None:
    plan = chained()
    head = plan.stages[0]
    assert [one.name for one in joined_after(plan, head, head.candidates[1])] == ["train", "evaluate"]
    other = fake_offer(1, gpu="H100")
    assert joined_after(replace(plan, stages=(replace(head, candidates=(other,)), *plan.stages[1:])), head, other) == ()
    mine = fake_offer(infra="local")
    local = chained(offers=(mine,))
    assert joined_after(local, local.stages[0], mine) == ()


def test_a_settled_cost_is_split_to_the_last_micro(tmp_path: Path) -> None:
    rng = random.Random(1)
    for _ in range(300):
        billed, micros = rng.uniform(0, 5000), rng.randint(0, 10**7)
        ends = sorted(rng.uniform(-10, 6000) for _ in range(2))
        facts = {
            "billed_s": billed,
            "serves": "c",
            "passed": {s: {"until_s": e} for s, e in zip("ab", ends, strict=True)},
        }
        row = replace(
            make_row("kd-x", State.GONE), stage="a", settled_micros=micros, facts=facts,
            order={"attempt": 1, "then": [["b", 1, 0.0], ["c", 1, 0.0]]},
        )  # fmt: skip
        told = visits(row)
        assert [one.stage for one in told] == ["a", "b", "c"]
        assert sum(one.micros or 0 for one in told) == micros and all((one.micros or 0) >= 0 for one in told)
        assert sum(one.seconds or 0.0 for one in told) == pytest.approx(billed)


# -- what people are told


def test_the_report_gives_each_stage_its_share_and_together_what_was_spent(tmp_path: Path) -> None:
    lost = lambda order, count: Faults(lost_after_s=None if count else 700.0)  # noqa: E731
    world = World(tmp_path, chained(), faults=lost)
    assert world.client().state == "done"
    report = build_report(world.run, world.plan, [])
    stages = {stage["name"]: stage for stage in report["stages"]}
    assert sum(stage["actual"]["cost_micros"] for stage in stages.values()) == report["spend_micros"]
    assert {name: (stage["attempts"], stage["joins"]) for name, stage in stages.items()} == {
        "label": (1, False), "train": (2, True), "evaluate": (1, True),
    }  # fmt: skip
    billed = sum(row.facts["billed_s"] for row in world.run.machines)
    assert sum(stage["actual"]["hours"] for stage in stages.values()) * 3600 == pytest.approx(billed)
    assert "lost" in stages["train"]["ends"][0] and not stages["label"]["ends"]


def test_while_it_runs_the_stage_at_hand_is_the_one_that_is_shown(tmp_path: Path) -> None:
    world = World(tmp_path, chained())
    world.client(turns=110)
    (row,) = world.run.machines
    assert (row.state, row.serves) == (State.LIVE, "train")
    report = build_report(world.run, world.plan, [])
    assert [stage["state"] for stage in report["stages"]] == ["done", "running", "waiting"]
    assert report["stages"][0]["actual"]["cost_micros"] is None  # the machine is not settled yet
    (live,) = live_machines(world.run, None, world.clock)
    assert (live["stage"], live["stages"]) == ("train", list(WORK))
    seen = snapshot_of(world.run, world.plan, world.bucket, world.clock)
    assert (seen.stage, seen.machine) == ("train", row)
    stretches = timeline(world.run, world.clock.mark().wall)["machines"]
    assert [one["stage"] for one in stretches] == ["label", "train"]
    assert stretches[0]["end_s"] == pytest.approx(stretches[1]["start_s"])


@pytest.mark.slow
@pytest.mark.parametrize("away", [False, True])
def test_real_supervisors_do_it_whether_or_not_a_client_is_there(tmp_path: Path, away: bool) -> None:
    """Machines are processes here, and stand in for rented ones."""
    offer = replace(local_offer(360_000), infra="rented")
    plan = chained(["second"], {"first": 2.0, "second": 3.0}, offers=(offer,), bucket=f"file:{tmp_path / 'bucket'}")
    rehearsal = RehearseSettings(steps=10, seconds_per_step=0.1, checkpoint_every_steps=4)
    plan = replace(plan, stages=tuple(replace(stage, settings=rehearsal) for stage in plan.stages))
    bucket, clock, ledger = open_bucket(f"{plan.bucket}/r-abc123"), SystemClock(), Ledger(tmp_path / "ledger.sqlite")
    data, sha = code_wheel()
    put_code(bucket, data, sha)
    head = {"schema": 1, "code_sha256": sha, "owner": "owner1", "plan": plan_to_dict(plan)}
    mark = clock.mark()
    ledger.create_run(
        "r-abc123", name="r", bucket=bucket.url, cap_micros=plan.cap_micros, deadline_s=None, mark=mark_to_dict(mark),
        at=mark.wall, data=head,
    )  # fmt: skip

    def client() -> Runner:
        return Runner(
            ledger=ledger, provider=LocalProvisioner(tmp_path), bucket=bucket, clock=clock, plan=plan,
            run_id="r-abc123", owner="owner1", lease=Lease.acquire(bucket, "owner1", clock), code_folder=tmp_path,
        )  # fmt: skip

    runner = client()
    if away:
        while not any("job" in row.facts for row in ledger.run("r-abc123").machines):
            runner.turn()
        until(lambda: bucket.head("second/COMMIT") is not None)
        runner.lease.release()
        runner = client()
    assert runner.run().state == "done"
    run = ledger.run("r-abc123")
    (row,) = run.machines
    assert row.stages == ("first", "second") and row.job_rc == Exit.DONE and LocalProvisioner(tmp_path).ours() == []
    first, second = visits(row)
    assert first.facts["ended"]["reason"] == second.facts["ended"]["reason"] == "done"
    assert min(first.seconds or 0, second.seconds or 0) > 1.0
    assert (first.micros or 0) + (second.micros or 0) == run.spent_micros > 0
    for stage in ("first", "second"):
        assert f"of stage {stage}" in bucket.get(f"{stage}/log.txt")[0].decode()


def until(condition: Callable[[], bool], limit_s: float = 60.0) -> None:
    end_s = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end_s
        time.sleep(0.1)
