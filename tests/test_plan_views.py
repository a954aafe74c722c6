"""Cost against time, why each other card lost, what a change would make: as tables and as JSON."""

from __future__ import annotations

import io
import json
import os
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from rich.console import Console

from orchestrator import money
from orchestrator import plan_views as views
from orchestrator.errors import UsageError
from orchestrator.planner import Planner
from tests.recipes import API, RENTED, recipe
from tests.test_planner import CARDS, ROOMY, card, plan, planner_of

GOLDEN = Path(__file__).parent / "golden"
MARKET = [*CARDS, replace(CARDS[0], price_micros_per_hour=150_000, spot=True), card("T4", 100_000), card("H100", None)]
SPOT = RENTED.replace("budget:", "spot: true\nbudget:")


def shown(planner: Planner, width: int) -> str:
    made = planner.plan()
    console = Console(file=io.StringIO(), width=width, color_system=None, force_terminal=False)
    views.render_frontier(planner.frontier(), made, console)
    views.render_explained("train", planner.explain("train"), made, console)
    texts = ("gpu=L4", "spot=no", "gpu=T4 stage=label")
    changes = [views.compared(planner, views.parse_what_if(text)) for text in texts]
    views.render_what_if(changes, made, console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    return "\n".join(line.rstrip() for line in text.splitlines()) + "\n"


@pytest.mark.parametrize("width", [80, 120])
def test_the_tables_are_those_people_know(width: int) -> None:
    """Run with KDCLOUD_WRITE_GOLDEN=1 to write the files anew, then read them."""
    path = GOLDEN / f"plan_looks_{width}.txt"
    got = shown(planner_of(SPOT, *MARKET), width)
    if os.environ.get("KDCLOUD_WRITE_GOLDEN"):
        path.write_text(got)
    assert got == path.read_text() and max(map(len, got.splitlines())) <= width


def test_the_frontier_begins_with_the_cheapest_plan_and_each_next_one_is_faster_and_dearer() -> None:
    planner = planner_of(SPOT, *MARKET)
    made, front = planner.plan(), planner.frontier()
    assert len(front) > 2
    assert (front[0].needed_micros, front[0].hours) == (made.needed_micros, made.hours.expected)
    assert all(one.hours > more.hours and one.needed_micros < more.needed_micros for one, more in pairwise(front))
    for one in front:  # each can be had by asking for its time
        hurried = plan(SPOT, *MARKET, deadline_s=one.needed_hours * 3600 + 1)
        assert hurried.hours.expected == pytest.approx(one.hours)
        assert tuple(stage.offer for stage in hurried.stages) == one.machines


def test_a_plan_of_the_frontier_is_late_where_its_last_machine_could_not_end_by_the_deadline() -> None:
    front = planner_of(SPOT, *MARKET).frontier()
    one = front[1]
    for more_s, in_time in ((1, True), (-1, False)):
        made = plan(SPOT, *MARKET, deadline_s=one.needed_hours * 3600 + more_s)
        assert views.frontier_to_json(front, made)[1]["in_time"] == in_time
    assert one.needed_hours == pytest.approx(one.hours + MARKET[0].latencies.total_s / 3600)


def test_each_card_says_why_it_lost() -> None:
    looked = planner_of(SPOT, *MARKET, join=False).explain("label")
    first, why = looked[0], {(one.gpu, one.spot): one.why for one in looked}
    assert first.taken and (first.gpu, first.spot) == ("RTX3090", True) and not any(one.taken for one in looked[1:])
    assert "dearer" in why["RTX3090", False] and "dearer" in why["A100-80GB", False]
    assert "faster" in why["A100-80GB", False] and "slower" in why["L4", False]
    assert "needs" in why["T4", False] and "has 14.6" in why["T4", False]
    assert why["H100", False] == "its price is not known"
    costs = [one.needed_micros for one in looked if one.needed_micros is not None]
    assert costs == sorted(costs)
    named = RENTED.replace("budget:", "gpus: [RTX3090, H200]\nbudget:")
    assert planner_of(named, *MARKET).explain("label")[-1].why == "not on offer where this stage may run"
    with pytest.raises(UsageError, match="no stage"):
        planner_of(RENTED, *MARKET).explain("labels")


def test_a_card_that_would_part_stages_from_a_machine_says_so() -> None:
    planner = planner_of(RENTED, *CARDS)
    looked = planner.explain("train")
    assert looked[0].taken and looked[0].joins and looked[0].gpu == "RTX3090"
    assert all("dearer in all: fewer stages share one" in one.why for one in looked[1:])
    only = RENTED.replace("kind: train,", "kind: train, gpus: [A100-80GB],")
    made, other = planner.plan(), plan(only, *CARDS)  # the whole with that card for this stage
    more = money.shown(other.needed_micros - made.needed_micros, made.rate, made.currency)
    assert next(one.why for one in looked if one.gpu == "A100-80GB").startswith(f"{more} dearer")


def test_a_card_is_compared_with_the_machine_it_would_share() -> None:
    """Where all stages would move to the other machine, that is what it would cost, for the first as for the last."""
    market = [card("RTX3090", 340_000, spot=True), card("RTX3090", 360_000)]
    planner = planner_of(SPOT, *market)
    made, moved = planner.plan(), plan(SPOT, market[1])
    assert all(stage.offer.spot for stage in made.stages)
    more = money.shown(moved.needed_micros - made.needed_micros, made.rate, made.currency)
    for name, stage in zip(("label", "train", "export"), (moved.stages[at] for at in (0, 1, 3)), strict=True):
        taken, other = planner.explain(name)
        assert taken.taken and not other.spot and other.why == f"{more} dearer, as fast"
        assert (other.joins, other.hours, other.cost_micros) == (stage.joins, stage.hours, stage.cost_micros)


def test_a_card_that_is_cheaper_but_late_says_so() -> None:
    slow, fast = card("L4", 100_000), card("H100", 3_000_000)
    cheap = plan(RENTED, slow, fast)
    within = 0.5 * cheap.hours.expected * 3600
    looked = planner_of(RENTED, slow, fast, deadline_s=within).explain("label")
    assert [(one.gpu, one.why) for one in looked] == [("H100", ""), ("L4", "too slow for the deadline")]


def test_what_if_keeps_all_that_it_does_not_name() -> None:
    planner = planner_of(SPOT, *MARKET, cap_micros=3_000_000, deadline_s=90_000.0, join=False)
    made = planner.plan()
    one = views.compared(planner, views.parse_what_if("gpu=A10G,stage=train")).plan
    assert one is not None and [stage.offer.gpu for stage in one.stages] == ["RTX3090", "A10G", "RTX3090", "T4"]
    assert (one.cap_micros, one.deadline_s, one.currency) == (3_000_000, 90_000.0, made.currency)
    dear = views.compared(planner, views.parse_what_if("spot=no")).plan
    assert dear is not None and not any(stage.offer.spot for stage in dear.stages)
    spot = views.compared(planner_of(RENTED, *MARKET), views.parse_what_if("spot=yes")).plan
    assert spot is not None and all(stage.offer.spot for stage in spot.stages)
    none = views.compared(planner, views.parse_what_if("gpu=T4"))
    assert none.plan is None and "no machine fits" in none.why
    only = views.compared(planner, views.parse_what_if("spot=no stage=train")).plan
    assert only is not None and [stage.offer.spot for stage in only.stages] == [True, False, True, False]
    assert planner.plan() == made
    two = views.compared(planner, views.parse_what_if("gpus=2"))
    assert two.plan is None and "no machine is on offer" in two.why
    asks = views.compared(planner_of(API, ROOMY, *CARDS), views.parse_what_if("gpu=A10G infra=runpod")).plan
    assert asks is not None and [stage.offer.infra for stage in asks.stages] == ["local", "runpod", "runpod"]


@pytest.mark.parametrize("text", ["", "gpu", "gpu=", "card=A10G", "gpus=two", "gpus=0", "spot=perhaps", "stage=train"])
def test_a_change_that_is_none_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        views.parse_what_if(text)
    assert "gpu" in caught.value.hint or "spot" in caught.value.hint


def test_a_card_that_nobody_knows_is_refused_with_those_that_are_known() -> None:
    with pytest.raises(UsageError, match="unknown GPU 'RTX9090'") as caught:
        views.parse_what_if("gpu=RTX9090")
    assert "did you mean RTX4090" in caught.value.hint and "A100-80GB" in caught.value.hint
    assert views.parse_what_if("gpu=rtx3090").gpu == "RTX3090"


def test_a_change_of_a_stage_that_is_not_there_is_refused() -> None:
    with pytest.raises(UsageError, match="no stage 'tarin'"):
        views.compared(planner_of(RENTED, *MARKET), views.parse_what_if("gpu=L4 stage=tarin"))


def test_the_json_of_each_look_has_the_keys_that_are_documented() -> None:
    planner = planner_of(SPOT, *MARKET)
    made = planner.plan()
    front = json.loads(json.dumps(views.frontier_to_json(planner.frontier(), made)))
    assert {"hours", "needed_hours", "needed_micros", "fits", "in_time", "machines", "joins"} == set(front[0])
    assert list(front[0]["machines"]) == [stage.name for stage in made.stages]
    assert type(front[0]["needed_micros"]) is int and front[0]["machines"]["label"]["gpu"] == "RTX3090"
    cards = json.loads(json.dumps(views.explain_to_json(planner.explain("train")), allow_nan=False))
    keys = {
        "gpu",
        "spot",
        "taken",
        "why",
        "offer",
        "vram_gib",
        "hours",
        "cost_micros",
        "needed_micros",
        "settings",
        "joins",
    }
    assert all(set(one) == keys for one in cards)
    assert cards[0]["taken"] and cards[0]["settings"]["compile"] in (True, False) and cards[-1]["offer"] is None
    changes = [views.compared(planner, views.parse_what_if(text)) for text in ("gpu=L4", "gpu=T4")]
    found, none = json.loads(json.dumps(views.what_if_to_json(changes)))
    assert not found["fits"] and found["in_time"] and found["why_not"] is None
    assert found["machines"]["train"]["gpu"] == "L4" and found["joins"] == ["train", "evaluate", "export"]
    assert front[0]["joins"] == ["train", "evaluate", "export"] and none["joins"] == []
    assert cards[0]["joins"]
    assert not none["fits"] and none["hours"] is None and "no machine fits" in none["why_not"]
    assert recipe(SPOT).spot
