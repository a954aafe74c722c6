"""What somebody who watches sees of a run: from the fake provider's runs, and from text that others wrote."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import timedelta

import pytest

from orchestrator.ledger import Ledger
from orchestrator.runner import Snapshot, snapshot_of
from orchestrator.scene import (
    DONE,
    RUNNING,
    STOPPED,
    WAITING,
    Curve,
    clean,
    curve_of,
    load_of,
    scene_of,
    sparkline,
    speed_of,
    told_by,
)
from orchestrator.states import Event
from orchestrator.testing import START, FakeBucket, VirtualClock, fake_offer
from tasks.contract import Progress
from tests.plans import make_plan

OFFER = fake_offer(3_600_000)  # 1,000 micro-USD a second
PLAN = make_plan({"label": 100.0, "train": 200.0, "export": 10.0}, offers=(OFFER,), cap_micros=2_000_000)


class World:
    """A ledger in memory, and a clock that the test moves."""

    def __init__(self) -> None:
        self.clock, self.ledger = VirtualClock(), Ledger.in_memory()
        self.bucket = FakeBucket(self.clock)
        mark = {"wall": START.isoformat(), "boot_id": "b", "boot_s": 0.0}
        self.ledger.create_run(
            "r-abc123",
            name="r",
            bucket="fake:",
            cap_micros=PLAN.cap_micros,
            deadline_s=None,
            mark=mark,
            at=START,
            data={},
        )

    def order(
        self, stage: str, attempt: int = 1, reserved: int = 400_000, then: list[list[object]] | None = None
    ) -> str:
        from orchestrator.runner import mark_to_dict, offer_to_dict

        name = f"kd-{stage}-{attempt}"
        order = {"offer": offer_to_dict(OFFER), "offer_index": 0, "attempt": attempt, "lifetime_s": 300.0}
        order |= {"then": then} if then else {}
        now = self.clock.mark()
        self.ledger.reserve("r-abc123", stage, name, reserved, now.wall, later_floor=0, order=order)
        self.ledger.move(name, Event.SENT, now.wall, data={"sent": mark_to_dict(now)})
        return name

    def up(self, name: str) -> None:
        self.ledger.move(name, Event.UP, self.clock.mark().wall)

    def gone(self, name: str, micros: int, billed_s: float) -> None:
        now = self.clock.mark().wall
        self.ledger.move(name, Event.STOP, now, data={"why": "its work is done"})
        self.ledger.move(name, Event.ABSENT, now)
        self.ledger.move(name, Event.GONE, now, micros=micros, data={"billed_s": billed_s})

    def done(self, stage: str) -> None:
        self.ledger.note(
            "r-abc123", "stage_done", self.clock.mark().wall, stage=stage, data={"result": {}, "files": {}}
        )

    def snapshot(self, progress: Progress | None = None) -> Snapshot:
        seen = snapshot_of(self.ledger.run("r-abc123"), PLAN, self.bucket, self.clock)
        return replace(seen, progress=progress)

    def scene(self, progress: Progress | None = None, **more):
        return scene_of(
            self.snapshot(progress), PLAN, now=self.clock.mark().wall, curve=more.pop("curve", Curve()), **more
        )


def states(scene) -> dict[str, str]:
    return {stage.name: stage.state for stage in scene.stages}


def test_before_anything_runs_it_is_the_plan():
    scene = World().scene()
    assert set(states(scene).values()) == {WAITING}
    assert scene.forecast == PLAN.cost_micros and scene.spent_micros == 0
    assert scene.left is not None and scene.left.expected == pytest.approx(310.0)
    assert scene.work is not None and scene.work.doing == "choosing a machine"


def test_a_running_stage_has_its_machine_its_age_and_its_money():
    world = World()
    name = world.order("label")
    world.clock.sleep(30)
    assert world.scene().work.doing == "waiting for the machine"
    world.up(name)
    label = world.scene().stages[0]
    assert (label.state, label.took_s, label.spent_micros) == (RUNNING, 30.0, 30_000)
    assert label.left is not None and label.left.expected == pytest.approx(70.0)


def test_the_forecast_follows_the_speed_of_the_stage_and_never_passes_its_reservation():
    world = World()
    world.up(world.order("label"))
    world.clock.sleep(100)
    seen = Progress("rehearse", 1, done=50, total=100, phase_s=100.0, attempt=1)
    scene = world.scene(seen)
    # 100 s at 1,000, about 100 s more, and the later stages as planned
    assert scene.forecast.expected == 200_000 + 210_000
    assert scene.forecast.low < scene.forecast.expected < scene.forecast.high
    slow = world.scene(replace(seen, done=1))
    assert slow.forecast.high == 400_000 + 210_000


def test_what_an_earlier_attempt_reported_says_nothing_of_this_one():
    world = World()
    world.gone(world.order("label"), 5_000, 5.0)
    world.up(world.order("label", attempt=2))
    old = Progress("rehearse", 1, done=99, total=100, phase_s=1.0, attempt=1)
    scene = world.scene(old)
    assert scene.work is not None and scene.work.total is None
    assert scene.stages[0].left is not None and scene.stages[0].left.expected == pytest.approx(100.0)
    assert scene.stages[0].attempts == 2 and scene.stages[0].spent_micros == 5_000


def test_a_stage_that_is_done_keeps_its_time_and_money_and_one_that_broke_off_is_marked():
    world = World()
    world.gone(world.order("label"), 80_000, 80.0)
    world.done("label")
    world.gone(world.order("train"), 7_000, 7.0)
    scene = world.scene(state="stopped")
    assert states(scene) == {"label": DONE, "train": STOPPED, "export": WAITING}
    assert (scene.stages[0].took_s, scene.stages[0].spent_micros) == (80.0, 80_000)
    assert scene.spent_micros == 87_000 and scene.work is None and scene.left is None


def test_a_stage_done_on_another_ones_machine_took_from_its_first_word_to_its_result():
    world = World()
    world.ledger.note("r-abc123", "job", world.clock.mark().wall, stage="label", data={})
    world.clock.sleep(40)
    world.done("label")
    assert world.scene().stages[0].took_s == 40.0


def test_while_it_saves_or_loads_the_end_that_was_seen_comes_nearer():
    world = World()
    world.up(world.order("label"))
    world.clock.sleep(50)
    seen = Progress("rehearse", 1, done=50, total=100, phase_s=50.0, attempt=1)
    told = told_by(world.snapshot(seen), PLAN.stages[0])
    world.clock.sleep(10)
    saving = Progress("checkpoint", 2, done=1e6, unit="bytes", attempt=1)
    assert world.scene(saving, told=told).stages[0].left.expected == pytest.approx(40.0)
    assert told_by(world.snapshot(saving), PLAN.stages[0]) is None
    faster = replace(told, progress=replace(seen, done=75))
    assert world.scene(saving, told=faster).stages[0].left.expected == pytest.approx(50.0 / 75 * 25 - 10)
    world.clock.sleep(60)
    assert world.scene(saving, told=faster).stages[0].left is None  # nobody knows: it should have been done
    world.clock.sleep(-60)
    other = replace(faster, machine="kd-another")  # the plan's again
    assert world.scene(saving, told=other).stages[0].left.expected == pytest.approx(40.0)


def test_between_two_looks_ages_and_money_go_on():
    world = World()
    world.up(world.order("label"))
    world.clock.sleep(20)
    seen = Progress("rehearse", 1, done=50, total=100, phase_s=20.0, attempt=1)
    before, after = world.scene(seen), world.scene(seen, since_s=5.0)
    assert after.stages[0].took_s == before.stages[0].took_s + 5
    assert after.spent_micros == before.spent_micros + 5_000
    assert after.stages[0].left.expected == before.stages[0].left.expected - 5


def test_a_machine_older_than_its_money_is_a_warning():
    world = World()
    world.up(world.order("label", reserved=200_000))
    assert world.scene().warning == ""
    world.clock.sleep(3600)
    scene = world.scene()
    assert "kd-label-1 is not confirmed gone" in scene.warning and "¥" in scene.warning
    assert scene.spent_micros == 200_000  # what is known; the worst case stands beside it


def test_the_clock_of_a_run_counts_from_its_beginning():
    world = World()
    scene = scene_of(world.snapshot(), PLAN, now=START + timedelta(hours=2), curve=Curve())
    assert scene.took_s == 7200.0


# --- speed, load, losses


def rated(done: float, seconds: float, **more) -> str:
    stage = replace(PLAN.stages[0], **more)
    phase = {"label": "generate", "rehearse": "rehearse", "evaluate": "evaluate"}[stage.kind]
    unit = "shards" if stage.kind == "label" else "steps"
    return speed_of(stage, Progress(phase, 1, done=done, total=10, unit=unit, phase_s=seconds))


def test_speed_is_in_tokens_where_they_are_told_else_in_what_a_person_can_count():
    told = Progress("train", 1, done=1, total=2, phase_s=1.0, numbers={"tokens_per_s": 26_714.4})
    assert speed_of(PLAN.stages[0], told) == "26,714 tokens/s"
    assert rated(5, 2.0) == "2.5 steps/s"
    assert rated(5, 60.0) == "5.0 steps/min"
    assert rated(5, 36_000.0) == "0.5 steps/h"
    assert rated(5, 50.0, kind="label", uses={"answers": 2000.0}) == "20 answers/s"  # 200 a shard
    assert rated(0, 50.0) == "" and rated(5, 0.0) == ""


@pytest.mark.parametrize(
    ("numbers", "text"),
    [
        ({"gpu_use": 0.97, "gpu_used_gib": 61.24, "gpu_total_gib": 79.6, "rss_gib": 3.0}, "GPU 97 %, 61.2 of 80 GiB"),
        ({"gpu_used_gib": 61.24}, "GPU 61.2 GiB"),
        ({"cpu_cores": 1.9, "rss_gib": 0.404}, "1.9 cores, 0.40 GiB"),
        ({"rss_gib": 0.404}, "0.40 GiB"),
        ({}, ""),
    ],
)
def test_load_is_the_gpus_where_there_is_one(numbers, text):
    assert load_of(numbers) == text


def rows(*values: tuple[int, str, object]) -> str:
    return "".join(json.dumps({"step": step, f"{arm}loss/total": loss}) + "\n" for step, arm, loss in values)


def test_the_curve_is_that_of_the_model_trained_now():
    text = rows((0, "search-a/", 5.0), (1, "search-a/", 4.0), *((i, "soft-0/", 3.0 - i / 10) for i in range(9)))
    assert curve_of(text) == Curve("soft-0", tuple(3.0 - i / 10 for i in range(9)))


def test_of_two_models_side_by_side_the_curve_does_not_jump_between_them():
    both = [(i, arm, 1.0 * i) for i in range(9) for arm in ("soft-1/", "hard-1/")]
    assert curve_of(rows(*both)).name == curve_of(rows(*both[:-1])).name == "soft-1"


def test_repeated_steps_count_as_they_were_last():
    assert curve_of(rows((0, "", 5.0), (1, "", 4.0), (2, "", 9.0), (1, "", 4.5), (2, "", 4.0))).values == (
        5.0,
        4.5,
        4.0,
    )


def test_half_written_and_senseless_rows_are_left_out():
    text = rows((0, "", 5.0), (1, "", None), (2, "", float("nan"))) + '[1]\n{"loss/total": 7}\n{"step": 3, "loss/to'
    assert curve_of(text) == Curve("", (5.0,))
    assert curve_of("") == Curve()


def test_a_sparkline_goes_from_its_highest_to_its_lowest_and_is_no_wider_than_asked():
    assert sparkline([8, 7, 6, 5, 4, 3, 2, 1]) == "█▇▆▅▄▃▂▁"
    assert sparkline([1.0]) == "▁" and sparkline([]) == "" and sparkline([2, 2, 2]) == "▁▁▁"
    line = sparkline([100.0 - i for i in range(100)], 10)
    assert len(line) == 10 and line[0] == "█" and line[-1] == "▁"


def test_losses_that_fall_a_hundredfold_keep_their_shape():
    assert sparkline([100.0, 10.0, 1.0]) == "█▄▁" or sparkline([100.0, 10.0, 1.0]) == "█▅▁"


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("\x1b[31mred\x1b[0m", "red"),
        ("a\x1b]0;owned\x07b\x1b]8;;http://x\x1b\\c", "abc"),
        ("a\x9b2Jb", "ab"),
        ("a\x1bPq#0\x1b\\b", "ab"),
        ("bell\x07 back\x08 null\x00", "bell back null"),
        ("\u202egnp.exe", "gnp.exe"),
        ("tab\tstop", "tab stop"),
        ("学生 ¥ ✓", "学生 ¥ ✓"),
        ("[bold]not markup[/]", "[bold]not markup[/]"),
        ("unfinished \x1b[3", "unfinished 3"),
    ],
)
def test_text_of_others_loses_what_steers_terminals_and_nothing_else(text, left):
    assert clean(text) == left


def test_no_character_survives_that_a_terminal_would_act_on():
    every = "".join(map(chr, [*range(0x20), *range(0x7F, 0xA0), 0x200E, 0x202E, 0x2066, 0x2028]))
    assert clean(every).strip() == ""


def test_a_machine_of_several_stages_gives_each_its_own_time_and_money():
    """30 s for the first; the second stands at 12 s of its own, and the third waits for the same machine."""
    world = World()
    name = world.order("label", then=[["train", 1, 0.0], ["export", 1, 0.0]], reserved=900_000)
    world.up(name)
    world.clock.sleep(30)
    world.done("label")
    passed = {"label": {"until_s": 30.0}}
    now = world.clock.mark().wall
    world.ledger.note("r-abc123", "next", now, stage="label", machine=name, data={"serves": "train", "passed": passed})
    world.clock.sleep(12)
    scene = world.scene()
    label, train, export = scene.stages
    assert states(scene) == {"label": DONE, "train": RUNNING, "export": WAITING}
    assert (label.took_s, label.spent_micros) == (30.0, 30_000)
    assert (train.took_s, train.spent_micros) == (12.0, 12_000)
    assert train.left is not None and train.left.expected == pytest.approx(188.0)
    assert export.took_s is None and export.spent_micros == 0
    assert scene.forecast.expected == 42_000 + 188_000 + 10_000  # the export's seconds are on this machine, too
    assert scene.spent_micros == 42_000
