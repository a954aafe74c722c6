"""The plan as a value, as JSON and as the table people read."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest
from rich.console import Console

from orchestrator.plan import Plan, digest_of, plan_from_dict, plan_to_dict, plan_to_json, render_plan
from tests.recipes import RENTED, SMALL
from tests.test_planner import CARDS, LOCAL, plan

GOLDEN = Path(__file__).parent / "golden"
ROOT = Path(__file__).resolve().parent.parent


def table(made: Plan, width: int) -> str:
    console = Console(file=io.StringIO(), width=width, color_system=None, force_terminal=False)
    render_plan(replace(made, digest="0123456789abcdef"), console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    return "\n".join(line.rstrip() for line in text.splitlines()) + "\n"


PLANS = {
    "local": lambda: plan(),
    "free": lambda: plan(SMALL, replace(LOCAL, price_micros_per_hour=0)),
    "rented": lambda: plan(RENTED, *CARDS),
    "over": lambda: plan(RENTED, *CARDS, cap_micros=1_000_000),
}


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("width", [80, 120])
def test_the_table_is_the_one_people_know(name: str, width: int) -> None:
    """Run with KDCLOUD_WRITE_GOLDEN=1 to write the files anew, then read them."""
    path = GOLDEN / f"plan_{name}_{width}.txt"
    got = table(PLANS[name](), width)
    if os.environ.get("KDCLOUD_WRITE_GOLDEN"):
        path.write_text(got)
    assert got == path.read_text()


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("width", [60, 80, 120])
def test_no_line_is_wider_than_the_terminal_and_every_stage_and_total_is_there(name: str, width: int) -> None:
    made = PLANS[name]()
    text = table(made, width)
    assert max(map(len, text.splitlines())) <= width
    assert all(stage.name in text for stage in made.stages)
    assert "total" in text and "cap" in text and "fit" in text


def test_colour_adds_no_word_and_no_colour_loses_none() -> None:
    made = plan(RENTED, *CARDS, cap_micros=2_000_000)
    console = Console(file=io.StringIO(), width=100, color_system="truecolor", force_terminal=True, record=True)
    render_plan(replace(made, digest="0123456789abcdef"), console)
    plain = "\n".join(line.rstrip() for line in console.export_text(styles=False).splitlines()) + "\n"
    assert plain == table(made, 100)


@pytest.mark.parametrize("name", PLANS)
def test_a_plan_comes_back_from_the_ledger_as_it_was(name: str) -> None:
    made = PLANS[name]()
    assert plan_from_dict(json.loads(json.dumps(plan_to_dict(made)))) == made
    assert plan_from_dict(plan_to_dict(made)) == made


def test_a_plan_of_another_schema_is_refused() -> None:
    raw = {**plan_to_dict(plan()), "plan_schema": 2}
    with pytest.raises(ValueError, match="schema 2"):
        plan_from_dict(raw)


def test_the_json_has_the_keys_that_were_promised() -> None:
    document = json.loads(json.dumps(plan_to_json(plan(RENTED, *CARDS)), allow_nan=False))
    promised = {
        "schema",
        "recipe",
        "digest",
        "currency",
        "offers_as_of",
        "stages",
        "overhead",
        "total",
        "cap_micros",
        "fits",
        "tight",
    }
    assert promised <= set(document)
    assert (
        document["schema"] == 1
        and document["recipe"] == "rented"
        and document["offers_as_of"] == "2026-06-01T00:00:00Z"
    )
    in_stage = {
        "name",
        "kind",
        "vram_gib",
        "vram_breakdown_gib",
        "hours",
        "offer",
        "cost_micros",
        "settings",
        "rejected",
    }
    in_offer = {"infra", "region", "instance", "gpu", "gpus", "spot", "price_micros_per_hour", "as_of"}
    for stage in document["stages"]:
        assert in_stage <= set(stage) and in_offer <= set(stage["offer"])
        assert set(stage["vram_gib"]) == set(stage["hours"]) == set(stage["cost_micros"]) == {"low", "expected", "high"}
        assert all(type(value) is int for value in stage["cost_micros"].values())
        assert all(set(one) >= {"gpu", "why"} for one in stage["rejected"])
    assert document["stages"][1]["settings"]["lora"]["r"] == 8


def test_totals_are_sums_of_what_is_shown() -> None:
    document = plan_to_json(plan(RENTED, *CARDS))
    for point in ("low", "expected", "high"):
        costs = [item["cost_micros"][point] for item in document["stages"] + document["overhead"]]
        assert document["total"]["cost_micros"][point] == sum(costs)
        assert document["total"]["hours"][point] == pytest.approx(
            sum(stage["hours"][point] for stage in document["stages"])
        )
    reserves = sum(stage["reserve_micros"] for stage in document["stages"])
    assert document["fits"] == (document["total"]["cost_micros"]["expected"] + reserves <= document["cap_micros"])
    assert document["tight"] == (document["total"]["cost_micros"]["high"] > document["cap_micros"])


def test_prices_of_the_own_machine_have_no_date() -> None:
    assert plan_to_json(plan())["offers_as_of"] is None


def test_the_oldest_price_is_the_date_of_all() -> None:
    old = datetime(2025, 1, 1, tzinfo=UTC)
    made = plan(RENTED, *(replace(offer, as_of=old) for offer in CARDS[:1]), *CARDS[1:])
    assert made.offers_as_of == min(stage.offer.as_of for stage in made.stages)


def test_planning_imports_nothing_heavy() -> None:
    code = (
        "import sys; import orchestrator.recipe, orchestrator.planner, orchestrator.plan, orchestrator.offers;"
        "print([m for m in ('torch', 'transformers', 'boto3', 'sky', 'rich', 'asyncio') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_stage_that_joins_the_machine_before_it_says_so_everywhere_and_changes_what_is_approved() -> None:
    made = plan(RENTED, *CARDS)
    made = replace(made, stages=tuple(replace(stage, joins=False) for stage in made.stages))
    first, second, *rest = made.stages
    joined = replace(made, stages=(first, replace(second, joins=True), *rest))
    assert plan_from_dict(json.loads(json.dumps(plan_to_dict(joined)))) == joined
    assert [stage["joins"] for stage in plan_to_json(joined)["stages"][:2]] == [False, True]
    assert "same machine" in table(joined, 120) and "same machine" not in table(made, 120)

    def digest(one: Plan) -> str:
        return digest_of("recipe", one.stages, one.cap_micros, one.deadline_s, one.rate)

    assert digest(joined) != digest(made)
