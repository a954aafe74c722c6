"""When a run ends and what it will have cost: by the plan before anything is seen, by its speed after."""

from __future__ import annotations

from dataclasses import replace

import pytest

from orchestrator import outlook
from orchestrator.plan import Micros, Overhead, Range
from orchestrator.spend import ApiLine
from orchestrator.testing import fake_offer
from tasks.contract import Progress
from tests.plans import make_plan

PLAN = make_plan({"label": 300.0, "train": 600.0, "evaluate": 60.0})
TRAIN = replace(PLAN.stages[1], kind="train", hours=Range(0.1, 0.2, 0.4))  # 360, 720, 1440 s


def progress(done: float, total: float | None, phase_s: float, *, phase: str = "train", **more: float) -> Progress:
    return Progress(
        phase=phase, done=done, total=total, phase_from=more.pop("phase_from", 0.0), phase_s=phase_s, **more
    )


def test_before_anything_is_seen_the_plan_counts_down():
    assert outlook.left_s(TRAIN, TRAIN.hours, 100.0, None) == Range(260.0, 620.0, 1340.0)


def test_past_the_plans_expected_time_it_is_half_of_what_may_still_come_and_past_its_longest_nobody_knows():
    assert outlook.left_s(TRAIN, TRAIN.hours, 1000.0, None) == Range(0.0, 220.0, 440.0)
    assert outlook.left_s(TRAIN, TRAIN.hours, 1441.0, None) is None


def test_speed_replaces_the_plan_as_soon_as_steps_were_seen():
    # 100 of 400 steps in 50 s: 300 more take 150 s; three quarters unseen: 5 % + 0.75 * 25 % either way
    found = outlook.left_s(TRAIN, TRAIN.hours, 5000.0, progress(100, 400, 50.0))
    assert found is not None
    assert (found.low, found.expected, found.high) == pytest.approx((150 * 0.7625, 150.0, 150 * 1.2375))


def test_a_resumed_stage_goes_by_the_steps_of_this_attempt_alone():
    found = outlook.left_s(TRAIN, TRAIN.hours, 10.0, progress(300, 400, 50.0, phase_from=200))
    assert found is not None and found.expected == pytest.approx(50.0)


def test_the_range_narrows_as_the_end_comes_nearer_and_what_is_done_has_nothing_left():
    widths = []
    for done in (1, 100, 300, 399):
        found = outlook.left_s(TRAIN, TRAIN.hours, 0.0, progress(done, 400, float(done)))
        assert found is not None and found.low <= found.expected <= found.high
        widths.append((found.high - found.low) / found.expected)
    assert widths == sorted(widths, reverse=True) and widths[0] > 0.55 and widths[-1] < 0.11
    assert outlook.left_s(TRAIN, TRAIN.hours, 0.0, progress(400, 400, 400.0)) == Range(0.0, 0.0, 0.0)


def test_other_phases_say_nothing_of_the_end():
    assert outlook.left_s(TRAIN, TRAIN.hours, 100.0, progress(9, 10, 5.0, phase="checkpoint")) == Range(260, 620, 1340)
    assert outlook.left_s(TRAIN, TRAIN.hours, 100.0, progress(9, None, 5.0)) == Range(260, 620, 1340)


def test_an_evaluation_counts_the_time_in_which_answers_are_checked():
    stage = replace(TRAIN, kind="evaluate")
    seen = Progress(phase="evaluate", done=6, total=11, phase_s=1.8, work_s=3.9)  # measured: 3.0 s were left
    found = outlook.left_s(stage, stage.hours, 0.0, seen)
    assert found is not None and found.expected == pytest.approx(5 * 3.9 / 6) and found.low < 3.0 < found.high


def test_an_evaluation_that_loads_its_models_slowly_takes_as_long_for_the_others():
    stage = replace(TRAIN, kind="evaluate", startup_hours=Range(0.0, 0.0, 20 / 3600))
    seen = Progress(phase="evaluate", done=3, total=11, phase_s=1.8, work_s=4.0)
    found = outlook.left_s(stage, stage.hours, 170.0, seen)  # 150 s for three models
    assert found is not None and found.expected == pytest.approx(8 * 50.0)


def test_the_share_of_a_stage_is_that_of_its_main_phase():
    assert outlook.work_share(TRAIN, progress(100, 400, 50.0)) == 0.25
    assert outlook.work_share(TRAIN, progress(1, 2, 50.0, phase="verify")) is None
    assert outlook.work_share(TRAIN, None) is None


def test_a_sum_with_an_unknown_part_is_not_known():
    assert outlook.together([Range(1, 2, 3), Range(10, 20, 30)]) == Range(11, 22, 33)
    assert outlook.together([Range(1, 2, 3), None]) is None


def test_a_machine_costs_what_its_time_will_have_cost_but_never_more_than_it_has_reserved():
    offer = fake_offer(3_600_000)  # 1,000 micro-USD a second
    left = Range(10.0, 20.0, 500.0)
    assert outlook.machine_micros(offer, age_s=100, left=left, reserved=200_000) == Micros(110_000, 120_000, 200_000)
    assert outlook.machine_micros(offer, age_s=100, left=None, reserved=900_000) == Micros(100_000, 200_000, 900_000)


def test_the_whole_is_what_is_settled_open_and_still_to_come():
    waiting = PLAN.stages[2]
    found = outlook.total_micros(
        PLAN, spent=1_000, open_machines=[Micros(1, 2, 3)], waiting=[waiting], apis={}
    )  # fmt: skip
    assert found == Micros(1_000, 1_000, 1_000) + Micros(1, 2, 3) + waiting.cost_micros


def test_an_api_counts_as_planned_until_it_is_settled():
    plan = replace(PLAN, overhead=(Overhead("answers", Micros(500, 500, 500), row="label", by="API"),))

    def total(line: ApiLine) -> int:
        apis = {"label": line}
        return outlook.total_micros(plan, spent=70, open_machines=[], waiting=[], apis=apis).expected

    assert total(ApiLine(open_micros=500)) == 570
    assert total(ApiLine(settled_micros=60, open_micros=0)) == 70
