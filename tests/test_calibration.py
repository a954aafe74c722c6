"""Does a plan learn from what earlier runs took, as much as they can tell and no more?"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator import calibration
from orchestrator.calibration import ALIKE, LAST, Took, calibrated, card_of, ratios_of, said, took_of, work_key
from orchestrator.plan import Part, Plan, Range, StagePlan, plan_from_dict, plan_to_dict, plan_to_json
from orchestrator.testing import fake_offer
from tasks.contract import LabelSettings, TrainSettings
from tests.recipes import RENTED as RECIPE
from tests.test_plan import table
from tests.test_planner import CARDS, plan

RENTED = RECIPE.replace("labels: label", "labels: label, compile: false")  # what is slow is not chosen again
MODEL = Range(500.0, 1000.0, 2000.0)
SQRT_HALF = math.sqrt(0.5)
ratios = st.lists(st.floats(0.05, 20.0), min_size=1, max_size=LAST)
ranges = st.tuples(st.floats(0.1, 1.0), st.floats(1.0, 1e5), st.floats(1.0, 10.0)).map(
    lambda t: Range(t[0] * t[1], t[1], t[1] * t[2])
)


def part(*seen: float, seconds: Range = MODEL) -> Part:
    return Part("work train", seconds, seen)


@pytest.mark.parametrize(
    ("seen", "wanted"),
    [
        ((), MODEL),
        ((1.2,), Range(1200 / 2**SQRT_HALF, 1200, 1200 * 2**SQRT_HALF)),  # 2 to the power of 1 / sqrt(1 + 1)
        ((1.0, 1.0, 1.0), Range(1000 / math.sqrt(2), 1000, 1000 * math.sqrt(2))),  # 2 to the power of 1 / sqrt(1 + 3)
        ((0.5, 1.0, 3.0), Range(500, 1000, 3000)),  # as wide as what was seen
    ],
)
def test_the_range_is_the_median_with_the_models_own_width_shrunk(seen: tuple[float, ...], wanted: Range) -> None:
    assert asdict(calibrated(part(*seen))) == pytest.approx(asdict(wanted))


@given(ranges, st.floats(0.05, 20.0))
def test_alike_runs_narrow_the_range_and_it_never_gets_wider_than_the_models(seconds: Range, ratio: float) -> None:
    widths = []
    for count in range(LAST + 1):
        found = calibrated(part(*[ratio] * count, seconds=seconds))
        widths.append(found.high / found.low)
        if count:
            assert found.expected == pytest.approx(ratio * seconds.expected)
            assert found.low <= found.expected <= found.high
    assert all(b <= a * (1 + 1e-9) for a, b in pairwise(widths))
    if widths[0] > 1.5:
        assert widths[LAST] < widths[1] < widths[0]


@given(ranges, ratios)
def test_the_range_holds_everything_that_was_seen(seconds: Range, seen: list[float]) -> None:
    found = calibrated(part(*seen, seconds=seconds))
    assert found.low <= found.expected <= found.high
    for ratio in seen:
        assert found.low / (1 + 1e-9) <= ratio * seconds.expected <= found.high * (1 + 1e-9)


def test_a_range_stays_as_wide_as_two_machines_of_a_kind_differ() -> None:
    found = calibrated(part(*[1.0] * LAST, seconds=Range(950.0, 1000.0, 1080.0)))
    assert found.high == pytest.approx(1000 * ALIKE) and found.low == pytest.approx(1000 / ALIKE, rel=0.01)


# --- what is compared with what


def test_work_is_compared_with_work_of_its_kind_size_and_card() -> None:
    train = plan(RENTED, *CARDS, join=False).stages[1]
    assert isinstance(train.settings, TrainSettings)
    key = lambda settings=train.settings, params=1.54e9, offer=train.offer: work_key("train", settings, params, offer)  # noqa: E731
    assert key() == f"train lora 2.1B on {train.offer.gpu}" == key(params=1.78e9)
    different = {
        key(), key(params=7.6e9), key(offer=fake_offer(gpu="H100")), key(replace(train.settings, method="full")),
        key(replace(train.settings, compile=True)), key(offer=fake_offer(gpu="A10G", gpus=8)),
    }  # fmt: skip
    assert len(different) == 6
    assert card_of(fake_offer(gpu=None, instance="4 cores")) == "CPU 4 cores"


# --- what a run tells


def done(stage: StagePlan, **changes: Any) -> dict[str, Any]:
    """A machine on which the stage was done in an hour, half of it work."""
    ended = {"rc": 0, "seconds": 3600.0, "work_s": 1800.0, **changes.pop("ended", {})}
    facts = {"job_age_s": 150.0, "ended": ended, "offer": stage.offer, "offer_index": 0}
    return {**facts, **changes}


def trained(stage: StagePlan, **changes: Any) -> dict[str, Any]:
    settings = stage.settings
    assert isinstance(settings, TrainSettings)
    steps = {"steps_done": stage.uses["steps_in_all"], "row_tokens": stage.uses["row_tokens"]}
    return {"micro_batch": settings.micro_batch, **steps, "setup": {"seconds": 60.0}, **changes}


def by_part(took: list[Took]) -> dict[str, Took]:
    return {one.key.partition(" ")[0]: one for one in took}


@pytest.fixture(scope="module")
def made() -> Plan:
    return plan(RENTED, *CARDS, join=False)


def test_start_packages_and_work_are_told_apart(made: Plan) -> None:
    train = made.stages[1]
    took = by_part(took_of(train, [done(train)], trained(train)))
    assert {name: one.actual_s for name, one in took.items()} == {
        "create": 150.0, "setup": 60.0, "around": 1800.0, "work": 1800.0,
    }  # fmt: skip
    assert all(took[name].estimated_s == train.parts[name].seconds.expected for name in took)


def test_what_scales_with_networks_or_other_work_is_no_part_of_a_machines_own_time(made: Plan) -> None:
    """Of an hour: 1,800 s work, 300 s checkpoints, 400 s weights, 60 s bucket for twice the bytes, 700 s lm_eval."""
    train = made.stages[1]
    phases = {"checkpoint": 300.0, "fetch": 400.0, "upload": 40.0, "download": 20.0, "lm_eval": 700.0, "load": 90.0}
    planned_bytes = train.uses["bucket_gb"] * 1e9
    moved = {"upload": 1.5 * planned_bytes, "download": 0.5 * planned_bytes, "checkpoint": 9e9}
    ended = {"phases_s": phases, "moved_bytes": moved}
    took = by_part(took_of(train, [done(train, ended=ended)], trained(train)))
    assert {name: round(one.actual_s) for name, one in took.items()} == {
        "create": 150, "setup": 60, "download": 400, "bucket": 30, "work": 2100, "around": 3600 - 1800 - 1460,
    }  # fmt: skip
    assert took["around"].actual_s >= phases["load"]


def test_a_slow_bucket_or_hub_is_learnt_of_its_place_and_leaves_all_else_as_it_was(made: Plan) -> None:
    train = made.stages[1]
    assert train.parts["bucket"].key.startswith("bucket s3://bucket from ") and "hub" in train.parts["download"].key
    slow = {train.parts[name].key: (3.0,) for name in ("bucket", "download")}
    seen = plan(RENTED, *CARDS, join=False, calibration=slow).stages[1]
    elsewhere = plan(RENTED.replace("s3://bucket/kd", "s3://other/kd"), *CARDS, join=False, calibration=slow).stages[1]
    same = [name for name in train.parts if seen.parts[name].ratios == ()]
    assert set(train.parts) - set(same) == {"bucket", "download"} and seen.hours.expected > train.hours.expected
    assert elsewhere.parts["bucket"].ratios == () and elsewhere.parts["download"].ratios == (3.0,)
    assert all("on " in train.parts[name].key for name in ("around", "work"))  # a card


def test_more_steps_or_longer_rows_than_expected_are_no_slower_card(made: Plan) -> None:
    train = made.stages[1]
    more = trained(train, steps_done=2 * train.uses["steps_in_all"], row_tokens=1.5 * train.uses["row_tokens"])
    assert by_part(took_of(train, [done(train)], more))["work"].actual_s == pytest.approx(1800 / 3)
    label = made.stages[0]
    assert isinstance(label.settings, LabelSettings)
    tokens = label.uses["answers"] * label.uses["expected_answer_tokens"]
    result = {"engine": "vllm", "generated_tokens": tokens / 4}
    assert by_part(took_of(label, [done(label)], result))["work"].actual_s == pytest.approx(1800 * 4)


def test_shorter_rows_save_only_the_time_that_goes_with_them(made: Plan) -> None:
    """Small models on a CPU take about as long for a step of any length."""
    train = made.stages[1]
    assert train.uses["row_share"] > 0.9
    small = replace(train, uses={**train.uses, "row_share": 0.2})
    half = trained(train, row_tokens=0.5 * train.uses["row_tokens"])
    assert by_part(took_of(small, [done(train)], half))["work"].actual_s == pytest.approx(1800 / 0.9)
    tiny = plan().stages[2]
    assert tiny.kind == "train" and 0 < tiny.uses["row_share"] < 0.6


def test_what_was_not_done_in_one_piece_as_planned_says_nothing(made: Plan) -> None:
    label, train = made.stages[:2]
    lost = {**done(train), "ended": None}
    assert took_of(train, [done(train), lost], trained(train)) == []  # preempted, and went on
    assert took_of(train, [done(train, offer=fake_offer(gpu="T4"))], trained(train)) == []  # something else landed
    assert took_of(train, [done(train, ended={"rc": 10})], trained(train)) == []
    assert len(took_of(train, [{"offer": train.offer, "offer_index": 1}, done(train)], trained(train))) == 4
    smaller = trained(train, micro_batch=train.settings.micro_batch // 2)  # type: ignore[union-attr]
    assert "work" not in by_part(took_of(train, [done(train)], smaller))
    fallback = {"engine": "transformers", "generated_tokens": 1e6}
    assert "work" not in by_part(took_of(label, [done(label)], fallback))
    assert "work" not in by_part(took_of(train, [done(train)], trained(train), smoke=True))
    assert "setup" in by_part(took_of(train, [done(train)], trained(train), smoke=True))


def test_only_the_last_runs_count_newest_first() -> None:
    told = [{"parts": [Took("work", 10.0, 10.0 + n).to_dict()]} for n in range(LAST + 5)]
    assert ratios_of(told) == {"work": tuple((10.0 + n) / 10 for n in range(LAST))}


# --- what a plan says


def test_a_plan_uses_what_was_seen_says_so_and_is_narrower(made: Plan) -> None:
    train = made.stages[1]
    ratio = 1.5
    seen = plan(RENTED, *CARDS, join=False, calibration={train.parts["work"].key: (ratio,) * 4})
    after = seen.stages[1]
    assert after.offer == train.offer
    width = lambda one: one.high / one.low  # noqa: E731
    assert width(after.hours) < width(train.hours)
    beside = sum(train.parts[name].seconds.expected for name in ("around", "download", "bucket"))
    measured = after.startup_hours.expected + beside / 3600
    measured += ratio * train.parts["work"].seconds.expected / 3600
    assert after.hours.low <= measured <= after.hours.high and after.hours.expected == pytest.approx(measured)
    assert after.cost_micros.expected > train.cost_micros.expected
    assert "measured on 4 earlier runs: 1.5 times the estimate" in " ".join(table(seen, 120).split())
    document = plan_to_json(seen)["stages"][1]["calibration"]
    assert (document["runs"], document["parts"]["work"]["factor"]) == (4, ratio)
    assert document["parts"]["work"]["estimated_s"] == asdict(train.parts["work"].seconds)
    assert list(document["parts"]) == ["work"]


def test_another_card_or_kind_leaves_a_plan_as_it_was(made: Plan) -> None:
    other = plan(RENTED, *CARDS, join=False, calibration={"work train lora 2.1B on H100": (3.0,)})
    assert [stage.hours for stage in other.stages] == [stage.hours for stage in made.stages]
    assert plan_to_json(other)["stages"][1]["calibration"] is None and not said(other.stages[1].parts)


def test_a_plan_comes_back_from_the_ledger_with_it_and_an_older_one_without(made: Plan) -> None:
    seen = plan(RENTED, *CARDS, join=False, calibration={made.stages[1].parts["work"].key: (1.5, 2.0)})
    assert plan_from_dict(json.loads(json.dumps(plan_to_dict(seen)))) == seen
    older = plan_to_dict(made)
    for stage in older["stages"]:
        del stage["candidate_parts"]
    found = plan_from_dict(older)
    assert found.stages[1].parts == {} and calibration.took_of(found.stages[1], [], {}) == []


@pytest.mark.parametrize(("factor", "told"), [(0.5, "0.5"), (12.3, "12"), (110.0, "110")])
def test_a_large_factor_is_a_number_that_people_read(factor: float, told: str) -> None:
    part = Part("key", Range(1.0, 1.0, 1.0), (factor,))
    assert said({"work": part}) == f"work measured on 1 earlier run: {told} times the estimate"
