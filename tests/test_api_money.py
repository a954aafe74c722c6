"""Is an API's money in the ledger before the first question, under both caps, and settled by what was used?"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from rich.console import Console

from orchestrator import spend
from orchestrator.budget import build_budget, describe
from orchestrator.cli import kdcloud
from orchestrator.clock import SystemClock
from orchestrator.config import Config, Home
from orchestrator.errors import BudgetExceeded, UsageError
from orchestrator.ledger import Ledger, Month
from orchestrator.mirror import adopt
from orchestrator.plan import Micros, Overhead, Plan, plan_to_dict
from orchestrator.report import build_report, render_report
from orchestrator.runner import mark_to_dict
from orchestrator.session import resume_run
from orchestrator.spend import ApiLine
from orchestrator.testing import FakeProvisioner, Faults
from tasks.bucket import open_bucket
from tasks.contract import API_SPENT_FILE, ApiTeacher, DataSource, LabelSettings, ModelSource
from tests.plans import make_plan
from tests.test_runner import World

WHOLE = 400_000  # the API's worst case
WORK = {"label": 300.0, "train": 600.0}
RUN = "test-abc123"
AT = datetime(2026, 1, 31, 12, tzinfo=UTC)


class Api(FakeProvisioner):
    """Each attempt of `label` pays what `costs` says, never more than its limit, and writes down before that it may."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.costs, self.limits, self.paid, self.slack = [50_000], list[int](), 0, 1_000

    def run(self, name: str, job_id: str, *rest: Any) -> None:
        fresh = (m := self._machines.get(name)) is not None and m.ended is None and m.job != job_id
        super().run(name, job_id, *rest)
        if fresh and job_id.startswith("label-"):
            limit = json.loads(self.bucket.get("label/task.json")[0])["settings"]["api"]["max_cost_micros"]
            cost = self.costs[min(len(self.limits), len(self.costs) - 1)]
            self.limits.append(limit)
            before = max(self._told().values())
            self.paid += min(cost, limit - before)
            self._tell(before + min(cost, limit - before), min(limit, before + cost + self.slack))

    def _told(self) -> dict[str, int]:
        found = self.bucket.head(f"label/{API_SPENT_FILE}")
        return json.loads(self.bucket.get(f"label/{API_SPENT_FILE}")[0]) if found else {"micros": 0, "granted": 0}

    def _tell(self, micros: int, granted: int) -> None:
        self.bucket.put(f"label/{API_SPENT_FILE}", json.dumps({"micros": micros, "granted": granted}).encode())

    def _commit(self, stage: str, at: float | None = None) -> None:
        super()._commit(stage, at)
        if stage == "label":
            told = self._told()["micros"]
            self._tell(told, told)
            self.bucket.put("label/result.json", json.dumps({"api": {"cost_micros": told}}).encode())


def asking(cap_micros: int = 1_000_000, work: dict[str, float] = WORK) -> Plan:
    plan = make_plan(work, cap_micros=cap_micros)
    api = ApiTeacher("https://api.example.com/v1", "big", None, 1, 1, WHOLE)
    settings = LabelSettings(ModelSource(path="t"), DataSource("builtin:addition/train"), "exact", 10, api=api)
    stages = tuple(replace(s, kind="label", settings=settings) if s.name == "label" else s for s in plan.stages)
    overhead = (Overhead("answers", Micros(WHOLE, WHOLE, WHOLE), row="label", by="API, big"),)
    return replace(plan, stages=stages, overhead=overhead)


class Asking(World):
    def __init__(self, tmp_path: Path, plan: Plan | None = None, costs: Sequence[int] = (50_000,), **more: Any) -> None:
        super().__init__(tmp_path, plan or asking(), WORK, **more)
        faults = self.provider.faults
        self.provider = Api(self.clock, self.bucket, WORK)
        self.provider.faults, self.provider.costs = faults, list(costs)

    @property
    def line(self) -> ApiLine:
        return self.run.apis["label"]

    def raise_cap(self, cap: int) -> None:
        mark = self.clock.mark()
        Ledger(self.path).set_cap(RUN, cap, None, mark_to_dict(mark), mark.wall)

    def check(self, cap: int) -> None:
        """The money of both bills is in the ledger, and under the cap."""
        run, paid = self.run, self.provider.paid
        assert paid <= run.api_spent_micros + run.api_open_micros
        assert self.provider.invoice_micros() + paid <= run.spent_micros + run.open_micros <= cap


def fails(times: int) -> Any:
    """The first machines end in a bug; the API was paid all the same."""
    return lambda order, count: Faults(rc=1 if count < times else None)


# --- a run -----------------------------------------------------------------------------------------------------------


def test_it_is_set_apart_whole_before_a_machine_is_asked_for_and_settled_by_what_was_used(tmp_path: Path) -> None:
    world, seen = Asking(tmp_path), []
    launch = world.provider.launch

    def watching(order: Any) -> None:
        seen.append((order.stage, world.line.open_micros, world.line.settled_micros))
        in_bucket = [json.loads(world.bucket.get(s.key)[0]) for s in world.bucket.list("ledger/") if "0" in s.key]
        assert any(entry.get("kind") == "api_reserve" for entry in in_bucket)
        launch(order)

    world.provider.launch = watching  # type: ignore[method-assign]
    assert world.client().state == "done"
    assert seen == [("label", WHOLE, 0), ("train", 0, 50_000)]  # free again before the next stage
    assert world.provider.limits == [WHOLE]
    assert (world.line.settled_micros, world.line.open_micros) == (50_000, 0)
    machines = sum(m.settled_micros for m in world.run.machines)
    assert world.run.spent_micros == machines + 50_000
    world.check(1_000_000)
    report = build_report(world.run, world.plan, [])
    assert (report["spend_micros"], report["api_micros"], report["reserved_micros"]) == (machines + 50_000, 50_000, 0)
    console = Console(width=100, record=True, file=io.StringIO())
    render_report(report, world.plan, console)
    assert "($0.050) on APIs) of" in console.export_text()
    month = Ledger(world.path).month(world.clock.mark().wall)
    assert (month.spent_micros, month.api_micros, month.open_micros) == (machines + 50_000, 50_000, 0)
    assert "of it on APIs" in describe(build_budget(month, Config("abc123")), Config("abc123"))


@pytest.mark.parametrize("month_cap", [None, WHOLE - 1])
def test_without_room_for_all_of_it_no_machine_is_rented(tmp_path: Path, month_cap: int | None) -> None:
    world = Asking(tmp_path, asking(cap_micros=WHOLE - 1 if month_cap is None else 10**7))
    outcome = world.client(month_cap=month_cap)
    assert outcome.state == "cap" and "the API of stage label would reserve" in outcome.message
    assert ("--resume test-abc123 --budget" if month_cap is None else "kdcloud budget --month") in outcome.hint
    assert world.provider.calls == [] and world.run.apis == {} and world.run.spent_micros == 0


def test_machines_never_get_the_apis_money_nor_it_the_later_stages(tmp_path: Path) -> None:
    plan = asking()
    train = plan.stages[1].cost_micros.low + plan.stages[1].reserve_micros
    world = Asking(tmp_path, replace(plan, cap_micros=WHOLE + train - 1))
    assert world.client().state == "cap" and world.provider.calls == []
    world = Asking(tmp_path / "more", replace(plan, cap_micros=WHOLE + train + 60_000))
    (tmp_path / "more").mkdir(exist_ok=True)
    seen: list[int] = []
    launch = world.provider.launch

    def watching(order: Any) -> None:
        seen.append(sum(m.open_micros for m in world.run.machines))
        launch(order)

    world.provider.launch = watching  # type: ignore[method-assign]
    world.client()
    assert seen and seen[0] <= 60_000
    world.check(WHOLE + train + 60_000)


@pytest.mark.parametrize("turns", range(1, 60, 3))
def test_a_client_that_is_killed_anywhere_sets_nothing_apart_twice_and_forgets_nothing(
    tmp_path: Path, turns: int
) -> None:
    world = Asking(tmp_path)
    world.client(turns=turns)
    world.check(1_000_000)
    assert world.client(take_over=True).state == "done"
    assert world.provider.limits == [WHOLE] * len(world.provider.limits)
    assert (world.line.settled_micros, world.line.open_micros) == (world.provider.paid, 0)
    world.check(1_000_000)


def test_an_attempt_that_breaks_off_costs_what_it_may_have_used_and_the_next_gets_the_rest(tmp_path: Path) -> None:
    world = Asking(tmp_path, costs=(120_000, 30_000), faults=fails(9))
    assert world.client().state == "failed"
    first = world.line.settled_micros
    assert (first, world.line.open_micros) == (121_000, 0)  # what was granted, not only what was used
    assert Ledger(world.path).month(world.clock.mark().wall).api_micros == first
    world.provider.faults = fails(0)
    assert world.client(take_over=True).state == "done"
    assert set(world.provider.limits) == {WHOLE}  # both together, never more
    assert world.line.settled_micros == first + 30_000
    world.check(1_000_000)


def test_a_line_that_is_used_up_is_filled_again_by_a_larger_budget_only(tmp_path: Path) -> None:
    world = Asking(tmp_path, costs=(WHOLE, WHOLE, 60_000), faults=fails(9))
    assert world.client().state == "failed"
    assert world.line.settled_micros == WHOLE
    assert world.client(take_over=True).state == "failed"
    assert world.provider.limits[-1] == WHOLE and world.line.settled_micros == WHOLE  # nothing was left to pay with
    world.provider.faults = fails(0)
    world.raise_cap(2_000_000)
    assert world.client(take_over=True).state == "done"
    assert world.provider.limits[-1] == 2 * WHOLE
    assert world.line.settled_micros == WHOLE + 60_000
    world.check(2_000_000)


def test_it_is_filled_again_as_far_as_the_budget_reaches_beside_the_machines(tmp_path: Path) -> None:
    world = Asking(tmp_path, asking(cap_micros=700_000), costs=(WHOLE, 60_000), faults=fails(9))
    assert world.client().state == "failed"
    world.provider.faults = fails(0)
    label, train = world.plan.stages
    machines = spend.reserve_micros(label.offer, WORK["label"]) + train.cost_micros.low + train.reserve_micros
    cap = world.run.spent_micros + machines + 80_000
    assert cap > 700_000
    world.raise_cap(cap)
    world.provider.work_s = {**WORK, "label": 250.0}  # what was planned pays for the start of the machine, too
    assert world.client(take_over=True).state == "done"
    assert world.provider.limits[-1] == WHOLE + 80_000
    world.check(cap)


def test_a_raised_line_stays_raised_for_the_next_resume(tmp_path: Path) -> None:
    line = ApiLine(settled_micros=500, open_micros=0, limit_micros=900)
    assert line.to_book_micros(600) == 400  # up to where it was
    assert line.to_book_micros(600, spare=300) == 400
    assert line.to_book_micros(600, spare=10**9) == 600  # all answers at their worst, once more
    assert replace(line, open_micros=400).to_book_micros(600) == 0
    assert ApiLine().to_book_micros(600) == 600


@pytest.mark.parametrize("text", [b"", b"{}", b"[]", b'{"micros": "x", "granted": 1}'])
def test_where_the_bucket_does_not_tell_what_was_used_it_stays_set_apart(tmp_path: Path, text: bytes) -> None:
    world = Asking(tmp_path, faults=fails(9))
    world.provider._tell = lambda *told: world.bucket.put(f"label/{API_SPENT_FILE}", text)  # type: ignore[method-assign]
    world.provider._told = lambda: {"micros": 0, "granted": 0}  # type: ignore[method-assign]
    assert world.client().state == "failed"
    assert (world.line.settled_micros, world.line.open_micros) == (0, WHOLE)
    assert any("stays reserved" in words[2] for words in world.said)
    assert Ledger(world.path).month(world.clock.mark().wall).open_micros == WHOLE


def test_a_run_that_is_stopped_before_it_asked_anything_gives_all_of_it_back(tmp_path: Path) -> None:
    world = Asking(tmp_path)
    assert world.client(stop_after=3).state == "stopped"
    assert world.run.apis and (world.line.settled_micros, world.line.open_micros) == (0, 0)
    assert world.client(take_over=True).state == "done"
    assert world.provider.limits == [WHOLE]


def test_nothing_is_settled_while_a_machine_may_still_ask(tmp_path: Path) -> None:
    world = Asking(tmp_path, faults=lambda order, count: Faults(refuses_teardown=True, ends_itself=False))
    assert world.client().state == "unconfirmed"
    assert (world.line.settled_micros, world.line.open_micros) == (0, WHOLE)


def test_another_computer_reads_the_same_money_from_the_bucket(tmp_path: Path) -> None:
    world = Asking(tmp_path, costs=(120_000,), faults=fails(9))
    world.client()
    other = Ledger(tmp_path / "other.sqlite")
    adopt(other, world.bucket)
    assert other.run(RUN).apis == world.run.apis and other.run(RUN).spent_micros == world.run.spent_micros


def test_a_cap_cannot_be_lowered_below_what_the_api_still_needs(tmp_path: Path) -> None:
    """Whether the ledger holds it, or will have to before the stage goes on; not once the stage is done."""
    plan = asking(cap_micros=10**7)
    here = replace(plan.stages[0].offer, infra="local", price_micros_per_hour=0)
    stages = tuple(replace(s, candidates=(here,), candidate_hours=s.candidate_hours[:1]) for s in plan.stages)
    home, bucket, clock = Home(tmp_path), open_bucket(f"file:{tmp_path}/bucket/{RUN}"), SystemClock()
    ledger, mark = Ledger(home.ledger), clock.mark()
    ledger.create_run(
        RUN, name="t", bucket=bucket.url, cap_micros=10**7, deadline_s=None, mark=mark_to_dict(mark), at=mark.wall,
        data={"schema": 1, "owner": "owner1", "plan": plan_to_dict(replace(plan, stages=stages))},
    )  # fmt: skip

    def lowered(cap: int) -> None:
        resume_run(RUN, ledger=ledger, home=home, cap_micros=cap).lease.release()

    for cap_before in (10**7, WHOLE):
        with pytest.raises(UsageError, match="below what run"):
            lowered(WHOLE - 1)
        assert ledger.run(RUN).cap_micros == cap_before
        lowered(WHOLE)
        if cap_before == 10**7:
            ledger.reserve_api(RUN, "label", WHOLE, mark.wall, later_floor=0)
    ledger.settle_api(RUN, "label", 7, mark.wall)
    with pytest.raises(UsageError, match="below what run"):
        lowered(WHOLE - 1)  # the rest is needed again
    ledger.note(RUN, "stage_done", mark.wall, stage="label", data={"result": {}, "files": {}})
    lowered(7)


# --- the ledger ------------------------------------------------------------------------------------------------------


def booked(cap: int = 1000) -> Ledger:
    ledger = Ledger.in_memory()
    mark = {"wall": AT.isoformat(), "boot_id": "b", "boot_s": 0.0}
    for run in ("a-aaa111", "b-bbb222"):
        ledger.create_run(run, name="q", bucket="f", cap_micros=cap, deadline_s=None, mark=mark, at=AT, data={})
    return ledger


def test_machines_and_apis_draw_on_one_cap_and_on_one_month() -> None:
    ledger = booked()
    ledger.reserve_api("a-aaa111", "label", 600, AT, later_floor=100)
    with pytest.raises(BudgetExceeded, match="400 are left under the cap"):
        ledger.reserve("a-aaa111", "label", "kd-1", 401, AT, later_floor=0, order={})
    with pytest.raises(BudgetExceeded, match="this month's budget"):
        ledger.reserve("b-bbb222", "label", "kd-2", 401, AT, later_floor=0, order={}, month_cap_micros=1000)
    with pytest.raises(BudgetExceeded, match="this month's budget"):
        ledger.reserve_api("b-bbb222", "label", 401, AT, later_floor=0, month_cap_micros=1000)
    ledger.reserve("a-aaa111", "label", "kd-1", 400, AT, later_floor=0, order={})
    with pytest.raises(BudgetExceeded):
        ledger.reserve_api("a-aaa111", "other", 1, AT, later_floor=0)
    with pytest.raises(BudgetExceeded):
        ledger.reserve_api("b-bbb222", "label", 901, AT, later_floor=100)


def test_a_line_counts_in_the_month_in_which_it_is_settled_and_only_what_is_new() -> None:
    ledger, february = booked(), AT + timedelta(days=1)
    ledger.reserve_api("a-aaa111", "label", 600, AT, later_floor=0)
    assert ledger.month(AT) == Month("2026-01", 0, 600, 0)
    ledger.settle_api("a-aaa111", "label", 200, AT)
    assert ledger.month(AT) == Month("2026-01", 200, 0, 200)
    ledger.reserve_api("a-aaa111", "label", 400, february, later_floor=0)
    assert ledger.month(february) == Month("2026-02", 0, 400, 0)
    ledger.settle_api("a-aaa111", "label", 150, february)  # less than before: nobody gets money back
    assert ledger.month(february) == Month("2026-02", 0, 0, 0)
    ledger.reserve_api("a-aaa111", "label", 400, february, later_floor=0)
    ledger.settle_api("a-aaa111", "label", 700, february)  # more than was set apart: counted all the same
    assert ledger.month(february) == Month("2026-02", 500, 0, 500)
    assert ledger.run("a-aaa111").apis["label"] == ApiLine(700, 0, 600, 1000)
    assert ledger.month(AT).spent_micros == 200 and ledger.run("b-bbb222").apis == {}


# --- kdcloud down --all


def test_down_all_settles_an_apis_line_that_no_machine_is_left_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client died between the end of its machine and the settling: nothing runs, and money is still set apart."""
    monkeypatch.setenv("KDCLOUD_HOME", str(tmp_path))
    monkeypatch.delenv("KDCLOUD_PROVIDER", raising=False)
    plan = asking(cap_micros=10**7)
    here = replace(plan.stages[0].offer, infra="local", price_micros_per_hour=0)
    stages = tuple(replace(s, candidates=(here,), candidate_hours=s.candidate_hours[:1]) for s in plan.stages)
    home, clock = Home(tmp_path), SystemClock()
    ledger, mark = Ledger(home.ledger), clock.mark()
    for run, settled in ((RUN, False), ("other-def456", True)):
        bucket = open_bucket(f"file:{tmp_path}/bucket/{run}")
        ledger.create_run(
            run, name="t", bucket=bucket.url, cap_micros=10**7, deadline_s=None, mark=mark_to_dict(mark), at=mark.wall,
            data={"schema": 1, "owner": "owner1", "plan": plan_to_dict(replace(plan, stages=stages))},
        )  # fmt: skip
        ledger.reserve_api(run, "label", WHOLE, mark.wall, later_floor=0)
        told = {"micros": 70_000, "granted": 80_000}
        bucket.put(f"label/{API_SPENT_FILE}", json.dumps(told).encode())
        if settled:
            ledger.settle_api(run, "label", 80_000, mark.wall)
    ledger.close()
    done = CliRunner().invoke(kdcloud, ["down", "--all"])
    assert done.exit_code == 0 and "1 ended; nothing of yours is running" in done.output
    run = Ledger(home.ledger).run(RUN)
    assert (run.apis["label"].open_micros, run.apis["label"].settled_micros) == (0, 80_000)  # what was granted
    assert not any(e.kind == "stop_requested" for e in Ledger(home.ledger).run("other-def456").entries)
    assert "nothing was running" in CliRunner().invoke(kdcloud, ["down", "--all"]).output
