"""What an open machine may cost at most is shown everywhere, and grows while its end is not confirmed."""

from __future__ import annotations

import io
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest
from rich.console import Console

from orchestrator import spend
from orchestrator.ledger import Ledger, Run
from orchestrator.live import money
from orchestrator.plan import plan_to_dict
from orchestrator.report import build_report, render_report
from orchestrator.runner import Snapshot, machine_age_s, mark_to_dict, offer_to_dict, worst_case_micros
from orchestrator.scene import Curve, scene_of
from orchestrator.session import live_machines
from orchestrator.states import Event
from orchestrator.status import build_status, render_status
from orchestrator.testing import START, VirtualClock, fake_offer
from tests.plans import make_plan

PLAN = make_plan({"train": 600.0})
OFFER = fake_offer(3_600_000)  # 1,000 micro-USD a second; calls 60 s, provider 60 s


def open_machine(clock: VirtualClock, *, reserved: int = 600_000, landed: int | None = None) -> tuple[Ledger, Run]:
    """A machine sent now, whose teardown was asked for and never confirmed."""
    ledger = Ledger.in_memory()
    mark = mark_to_dict(clock.mark())
    ledger.create_run(
        "r-abc123", name="r", bucket="file:/nowhere/r-abc123", cap_micros=10**7, deadline_s=None, mark=mark, at=START,
        data={"schema": 1, "plan": plan_to_dict(PLAN)},
    )  # fmt: skip
    order = {"offer": offer_to_dict(OFFER), "lifetime_s": 100.0}
    ledger.reserve("r-abc123", "train", "kd-1", reserved, START, later_floor=0, order=order)
    ledger.move("kd-1", Event.SENT, START, data={"sent": mark})
    if landed is not None:
        ledger.move(
            "kd-1", Event.UP, START, data={"landed": offer_to_dict(replace(OFFER, price_micros_per_hour=landed))}
        )
    ledger.move("kd-1", Event.STOP, START)
    return ledger, ledger.run("r-abc123")


@pytest.mark.parametrize(
    ("age_s", "worst"),
    [
        (0, 600_000),  # its reservation
        (480, 600_000),  # 480 + 60 + 60 = 600 s: just what was reserved
        (481, 601_000),
        (10_000, 10_120_000),
    ],
)
def test_the_worst_case_is_the_reservation_until_it_is_used_up_and_then_grows(age_s, worst):
    clock = VirtualClock()
    _, run = open_machine(clock)
    clock.sleep(age_s)
    assert spend.worst_case_micros(OFFER, reserved=600_000, age_s=age_s) == worst
    assert worst_case_micros(run.machines[0], clock) == worst
    assert live_machines(run, None, clock)[0]["worst_case_micros"] == worst


def test_it_counts_at_the_price_that_landed():
    clock = VirtualClock()
    _, run = open_machine(clock, landed=7_200_000)
    clock.sleep(1000)
    assert worst_case_micros(run.machines[0], clock) == 2_000 * 1120


def shown(render: Any) -> str:
    console = Console(file=io.StringIO(), width=200)
    render(console)
    return " ".join(console.file.getvalue().split())  # type: ignore[attr-defined]


def test_status_and_report_show_it_and_say_that_it_grows():
    clock = VirtualClock(datetime.now(UTC))
    _, run = open_machine(clock)
    live = live_machines(run, None, clock)
    quiet = shown(lambda console: render_report(build_report(run, PLAN, live), PLAN, console))
    assert "1 machine may still bill, in the worst case ¥4.26 ($0.60)" in quiet and "growing" not in quiet
    clock.sleep(1880)
    live = live_machines(run, None, clock)
    loud = shown(lambda console: render_report(build_report(run, PLAN, live), PLAN, console))
    assert "in the worst case ¥14.20 ($2.00), growing until their end is confirmed" in loud

    document = build_status([run], lambda known: None)
    (row,) = document["runs"]
    assert row["worst_case_micros"] == row["live"][0]["worst_case_micros"] >= 600_000
    assert row["currency"] == "CNY" and row["rate"] == {"usd_to_cny": 7.1, "as_of": "2026-01-15"}
    row["live"] = live
    told = shown(lambda console: render_status(document, console))
    assert "beyond their reservations of ¥4.26: in the worst case ¥14.20 by now, and it grows" in told
    assert "$" not in told
    assert "kdcloud reap --yes" in told


def test_the_live_view_shows_it_once_the_reservation_is_used_up():
    clock = VirtualClock()
    _, run = open_machine(clock)

    def told() -> str:
        row = run.machines[0]
        seen = Snapshot(run, "train", row, machine_age_s(row, clock), None, 0)
        return money(scene_of(seen, PLAN, now=clock.mark().wall, curve=Curve()))

    assert "worst case" not in told()
    clock.sleep(1880)
    assert told().endswith("; kd-1 is not confirmed gone: in the worst case ¥14.20")


def test_what_is_gone_has_no_worst_case():
    clock = VirtualClock()
    ledger, _ = open_machine(clock)
    ledger.move("kd-1", Event.ABSENT, START)
    ledger.move("kd-1", Event.GONE, START, micros=123)
    document = build_status([ledger.run("r-abc123")], lambda known: None)
    assert document["runs"][0]["worst_case_micros"] == 123
    assert "nothing bills" in shown(lambda console: render_status(document, console))
