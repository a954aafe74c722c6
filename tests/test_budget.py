"""One cap for all runs of a calendar month together: set, shown, and kept by two runs at once."""

from __future__ import annotations

import threading
from datetime import UTC, date, datetime, timedelta, timezone
from decimal import Decimal

import pytest

from orchestrator.budget import build_budget, describe, month_cap_micros, shortage
from orchestrator.config import Config
from orchestrator.errors import BudgetExceeded
from orchestrator.ledger import Ledger, Month
from orchestrator.money import Amount, Rate
from orchestrator.states import Event
from tests.whole_runs import make_home

AT = datetime(2026, 1, 31, 12, tzinfo=UTC)
MARK = {"wall": AT.isoformat(), "boot_id": "b", "boot_s": 0.0}
RATE = Rate(Decimal("8"), date(2026, 1, 1))


def make_run(ledger: Ledger, run: str, cap: int = 10**9) -> str:
    ledger.create_run(run, name="q", bucket="file:/x", cap_micros=cap, deadline_s=None, mark=MARK, at=AT, data={})
    return run


def reserve(ledger: Ledger, run: str, machine: str, micros: int, month_cap: int | None, at: datetime = AT) -> None:
    ledger.reserve(run, "train", machine, micros, at, later_floor=0, order={}, month_cap_micros=month_cap)


def settle(ledger: Ledger, machine: str, micros: int, at: datetime = AT) -> None:
    for event in (Event.SENT, Event.UP, Event.STOP, Event.ABSENT):
        ledger.move(machine, event, at)
    ledger.move(machine, Event.GONE, at, micros=micros)


@pytest.fixture
def ledger():
    return Ledger.in_memory()


def test_all_runs_together_may_reserve_the_months_cap_and_no_more(ledger):
    one, two = make_run(ledger, "a-aaa111"), make_run(ledger, "b-bbb222")
    reserve(ledger, one, "kd-1", 600, 1000)
    with pytest.raises(BudgetExceeded) as caught:
        reserve(ledger, two, "kd-2", 401, 1000)
    assert "kdcloud budget" in caught.value.hint
    assert ledger.run(two).machines == ()
    reserve(ledger, two, "kd-3", 400, 1000)
    settle(ledger, "kd-1", 100)  # what was not used is free again: 100 + 400 of 1,000
    assert ledger.month(AT) == Month("2026-01", 100, 400)
    reserve(ledger, one, "kd-4", 500, 1000)


def test_without_a_cap_for_the_month_only_the_runs_own_holds(ledger):
    one, two = make_run(ledger, "a-aaa111"), make_run(ledger, "b-bbb222")
    reserve(ledger, one, "kd-1", 10**8, None)
    reserve(ledger, two, "kd-2", 10**8, None)


def test_a_new_month_begins_at_midnight_utc_and_only_what_is_open_crosses_it(ledger):
    run = make_run(ledger, "a-aaa111")
    for machine, micros in (("kd-1", 300), ("kd-2", 200)):
        reserve(ledger, run, machine, 500, None)
        if machine == "kd-1":
            settle(ledger, machine, micros)
    last = datetime(2026, 1, 31, 23, 59, 59, 999999, tzinfo=UTC)
    assert ledger.month(last) == Month("2026-01", 300, 500)
    first = last + timedelta(microseconds=1)
    assert ledger.month(first) == Month("2026-02", 0, 500)
    settle(ledger, "kd-2", 200, first)
    assert (ledger.month(last), ledger.month(first)) == (Month("2026-01", 300, 0), Month("2026-02", 200, 0))
    china = timezone(timedelta(hours=8))  # there it is February already
    assert ledger.month(datetime(2026, 2, 1, 7, 0, tzinfo=china)).name == "2026-01"
    reserve(ledger, run, "kd-3", 700, 1000, first + timedelta(days=27))
    with pytest.raises(BudgetExceeded):
        reserve(ledger, run, "kd-4", 101, 1000, first + timedelta(days=27))


def test_a_reservation_that_was_never_sent_is_free_again(ledger):
    run = make_run(ledger, "a-aaa111")
    reserve(ledger, run, "kd-1", 1000, 1000)
    ledger.move("kd-1", Event.DROPPED, AT)
    assert ledger.month(AT) == Month("2026-01", 0, 0)


def test_a_month_that_is_over_its_cap_has_nothing_left_and_lets_what_costs_nothing_go_on(ledger):
    run = make_run(ledger, "a-aaa111")
    reserve(ledger, run, "kd-1", 500, None)
    assert ledger.month(AT).left_micros(400) == 0
    reserve(ledger, run, "kd-2", 0, 400)


def test_two_runs_at_once_cannot_reserve_the_same_dollar(tmp_path):
    """Eight clients, each with a run of its own and a connection of its own, want 100 each of 500."""
    path = tmp_path / "ledger.sqlite"
    first = Ledger(path)
    runs = [make_run(first, f"r-{number:06d}") for number in range(8)]
    barrier, refused = threading.Barrier(8), []

    def client(number: int) -> None:
        own = Ledger(path)
        own.run(runs[number])
        barrier.wait()
        try:
            reserve(own, runs[number], f"kd-{number}", 100, 500)
        except BudgetExceeded:
            refused.append(number)
        finally:
            own.close()

    threads = [threading.Thread(target=client, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert first.month(AT).open_micros == 500
    assert len(refused) == 3


# -- shown -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cap", "micros"),
    [
        (Amount(Decimal(200), "CNY"), 25_000_000),  # 200 / 8
        (Amount(Decimal("12.5"), "USD"), 12_500_000),
        (Amount(Decimal("0.0000001"), "USD"), 0),  # rounded down
        (None, None),
    ],
)
def test_the_cap_counts_at_the_exchange_rate_set_now(cap, micros):
    assert month_cap_micros(Config("abc123", rate=RATE, monthly_cap=cap)) == micros


def test_the_document_and_the_words_say_the_same():
    config = Config("abc123", rate=RATE, monthly_cap=Amount(Decimal(200), "CNY"))
    document = build_budget(Month("2026-01", 1_000_000, 2_000_000), config)
    assert document == {
        "schema": 1, "month": "2026-01", "currency": "CNY", "cap": "200 CNY", "cap_micros": 25_000_000,
        "spent_micros": 1_000_000, "api_micros": 0, "open_micros": 2_000_000, "left_micros": 22_000_000,
        "usd_to_cny": "8",
    }  # fmt: skip
    assert describe(document, config) == (
        "2026-01 (UTC): spent ¥8.00 ($1.00), reserved and not settled ¥16.00 ($2.00); "
        "left ¥176.00 ($22.00) of ¥200.00 ($25.00)"
    )
    free = Config("abc123", rate=RATE)
    without = build_budget(Month("2026-01", 0, 0), free)
    assert without["cap_micros"] is None and without["left_micros"] is None
    assert "no cap" in describe(without, free)


def test_a_run_hears_when_the_month_leaves_it_less_than_its_cap(ledger):
    config = Config("abc123", rate=RATE, monthly_cap=Amount(Decimal(8), "CNY"))
    assert shortage(ledger, config, 1_000_000, AT) == ""
    assert "¥8.00" in shortage(ledger, config, 1_000_001, AT)
    reserve(ledger, make_run(ledger, "a-aaa111"), "kd-1", 1, None)
    assert shortage(ledger, config, 1_000_000, AT) != ""
    assert shortage(ledger, Config("abc123", rate=RATE), 10**12, AT) == ""


RECIPE = """
name: tiny
budget: 1 CNY
infra: local
local: {price: 0.10 USD/h}
stages:
  - {name: only, kind: rehearse, steps: 5, seconds_per_step: 0.01}
"""


def test_the_command_sets_shows_and_removes_it_and_a_run_keeps_to_it(tmp_path):
    home = make_home(tmp_path, RECIPE)
    assert home.json("budget")["cap_micros"] is None
    assert home.json("budget", "--month", "0.0001CNY")["cap"] == "0.0001 CNY"
    planned = home.call("plan", str(home.recipe))
    assert planned.returncode == 0
    assert "this month's budget has" in planned.stderr and "kdcloud budget" in planned.stderr
    ran = home.call("run", str(home.recipe), "--yes")
    assert ran.returncode == 3, ran.stderr
    assert "this month's budget has" in ran.stderr
    assert "kdcloud budget" in ran.stdout + ran.stderr
    assert home.json("budget")["spent_micros"] == 0
    assert home.json("budget", "--month", "none")["cap_micros"] is None
    assert home.call("run", "--resume", "last", "--budget", "1CNY").returncode == 0
    shown = home.json("budget")
    assert shown["spent_micros"] > 0 and shown["open_micros"] == 0
    assert "no cap" in home.call("budget").stdout
    for wrong in ("200", "0 CNY", "much", "1 CNY/h"):
        refused = home.call("budget", "--month", wrong)
        assert refused.returncode == 2 and "--month" in refused.stderr and "  -> " in refused.stderr
