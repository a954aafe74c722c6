"""Will the money last at the speed that was seen? Tables of progress and what follows."""

from __future__ import annotations

import math
import random
import statistics
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.forecast import LEAST_STEPS, SLACK, Ok, Planned, Shortfall, forecast, part_of, planned_of, shrinks
from tasks.contract import (
    DataSource,
    EvaluateSettings,
    LabelSettings,
    ModelSource,
    Progress,
    RehearseSettings,
    TrainSettings,
    Writing,
)
from tasks.generate import lengths_so_far
from tests.recipes import RENTED
from tests.test_planner import CARDS, plan

# 30 steps after the first one, 2 s each: 570 are left, 1,140 s.
TRAINING = Progress("train", 31, 31.0, 601.0, phase_from=1.0, phase_s=60.0)
LABELLING = Progress("generate", 9, 2.0, 8.0, unit="shards", phase_from=0.0, phase_s=200.0)
MODEL = ModelSource(path="m")


@pytest.mark.parametrize(
    ("kind", "progress", "allowed_s", "wanted"),
    [
        ("train", TRAINING, 1140.0, Ok(1140.0)),
        ("train", TRAINING, 1140.0 * SLACK, Ok(1140.0)),  # a tenth is no shortfall
        ("train", TRAINING, 1000.0, Shortfall(1140.0, 1000.0, 506.0, 601.0)),  # 31 + 0.95 * 1000 / 2
        ("train", TRAINING, -50.0, Shortfall(1140.0, 0.0, 31.0, 601.0)),  # nothing is left: what is done
        ("train", replace(TRAINING, done=19.0, phase_s=36.0), 0.0, None),  # 18 steps after the first
        ("train", replace(TRAINING, done=20.0, phase_s=38.0), 0.0, Shortfall(1162.0, 0.0, 20.0, 601.0)),
        ("train", replace(TRAINING, phase_from=20.0), 0.0, None),  # resumed at 19: this machine did few of them
        ("train", replace(TRAINING, phase="checkpoint", declared=True), 0.0, None),
        ("train", replace(TRAINING, total=None), 0.0, None),
        ("train", replace(TRAINING, done=601.0, phase_s=1200.0), 0.0, Ok(0.0)),
        ("label", LABELLING, 600.0, Ok(600.0)),
        ("label", LABELLING, 300.0, Shortfall(600.0, 300.0, 4.0, 8.0)),  # 2 + 0.95 * 3, whole shards
        ("label", replace(LABELLING, done=2.4), 0.0, None),  # within a shard answers do not come evenly
        ("label", replace(LABELLING, done=0.9), 0.0, None),
        ("label", replace(LABELLING, phase="score", done=0.2), 0.0, None),
        ("pretrain", TRAINING, 1140.0, Ok(1140.0)),
        ("export", replace(TRAINING, phase="export"), 0.0, None),
    ],
)
def test_what_is_left_and_whether_it_fits(
    kind: str, progress: Progress, allowed_s: float, wanted: Ok | Shortfall | None
) -> None:
    assert forecast(kind, progress, allowed_s=allowed_s) == wanted


def test_an_evaluation_is_judged_by_the_model_at_hand_after_four_batches() -> None:
    """A teacher is slower than the students after it: without a plan's word nothing is said of them."""
    now = Progress("evaluate", 5, 0.5, 3.0, unit="models", phase_from=0.0, phase_s=100.0)
    ask = lambda now, share=0.1: forecast("evaluate", now, allowed_s=50.0, planned=Planned(batch_share=share))  # noqa: E731
    assert ask(now) == Shortfall(100.0, 50.0, 0.0, 3.0, whole=False)  # half a model is left
    assert ask(replace(now, done=0.8)) == Ok(pytest.approx(25.0), whole=False)
    assert ask(replace(now, total=1.0)) == Shortfall(100.0, 50.0, 0.0, 1.0)  # there is no other
    assert ask(replace(now, done=1.5)) is None
    assert ask(now, share=0.2) is None and ask(now, share=1.0) is None


@given(
    st.integers(25, 1000), st.integers(1, 100), st.floats(0.01, 100), st.floats(-10, 1e5),
)  # fmt: skip
def test_what_is_said_to_fit_does_fit_and_what_is_done_stays(
    total: int, part: int, step_s: float, allowed: float
) -> None:
    done = max(21, total * part // 101)
    progress = Progress("train", done, done, total, phase_from=1.0, phase_s=(done - 1) * step_s)
    found = forecast("train", progress, allowed_s=allowed)
    assert found is not None
    if isinstance(found, Ok):
        assert (total - done) * step_s * SLACK <= allowed + 1e-6 or done >= total
        return
    assert done <= found.total <= total and found.share == found.total / total
    assert (found.total - done) * step_s <= max(0.0, allowed) + 1e-6


@pytest.mark.parametrize(
    ("settings", "allowed"),
    [
        (LabelSettings(MODEL, DataSource("p"), "none", 10), {"fewer_samples"}),
        (TrainSettings(MODEL, "label"), {"fewer_samples", "fewer_epochs"}),
        (TrainSettings(MODEL, "label", compare_hard=True), set()),
        (TrainSettings(MODEL, "label", learning_rates=(1e-4, 2e-4)), set()),
        (EvaluateSettings("train", None, DataSource("p"), "math"), set()),
        (RehearseSettings(10, 1.0), {"fewer_samples", "fewer_epochs"}),
    ],
)
def test_which_stages_can_do_less_and_how(settings: object, allowed: set[str]) -> None:
    ways = ("stop", "fewer_samples", "fewer_epochs")
    assert {way for way in ways if shrinks(settings, way)} == allowed  # type: ignore[arg-type]


def test_an_evaluation_is_forecast_whole_by_what_the_plan_says_of_the_other_models() -> None:
    """A teacher of 0.6 of the work, and two students; half of the teacher took 100 s, and a model's start takes 30."""
    planned = Planned(batch_share=0.1, models=(0.6, 0.2, 0.2), load_s=30.0)
    now = Progress("evaluate", 5, 0.5, 3.0, unit="models", phase_from=0.0, phase_s=100.0)
    assert forecast("evaluate", now, allowed_s=1e9, planned=planned) == Ok(pytest.approx(100 + 2 * 200 / 3 + 2 * 30))
    found = forecast("evaluate", now, allowed_s=150.0, planned=planned)  # the teacher alone would fit
    assert isinstance(found, Shortfall) and found.whole


# --- the second pass of a label stage


@pytest.mark.parametrize(
    ("progress", "allowed_s", "wanted"),
    [
        # 2 of 8 shards in 200 s: 600 s for the rest, and a quarter of all 800 s for scoring.
        (LABELLING, 1e9, Ok(800.0)),
        (LABELLING, 400.0, Shortfall(800.0, 400.0, 4.0, 8.0)),  # (2 + 0.95 * 4) / 1.25
        # Once some is scored, by its own speed: 60 s a shard, whatever was planned.
        (replace(LABELLING, phase="score", done=1.0, phase_s=60.0), 1e9, Ok(420.0)),
        (replace(LABELLING, phase="score", done=2.0, phase_s=120.0), 200.0, Shortfall(360.0, 200.0, 5.0, 8.0)),
        (replace(LABELLING, phase="score", done=0.2, phase_s=12.0), 0.0, None),
    ],
)
def test_what_is_written_is_scored_as_well(progress: Progress, allowed_s: float, wanted: Ok | Shortfall | None) -> None:
    assert forecast("label", progress, allowed_s=allowed_s, planned=Planned(scoring=0.25)) == wanted


# --- doing less more than once


def test_a_share_is_of_the_stage_as_it_was_planned_however_often_it_shrinks() -> None:
    """Told to end at 300 of 601 and still too slow: 160 steps are a quarter of the plan, and more than half of 300."""
    now = replace(TRAINING, total=300.0)
    found = forecast("train", now, allowed_s=272.0, size=601.0)
    assert isinstance(found, Shortfall) and found.total == 160 and found.share == 160 / 601
    assert part_of(TrainSettings(MODEL, "label"), found.total, found.size, "steps") == "160 of 601 steps"


# --- answers in the middle


class Simulated:
    """An engine with room for `flight` answers; a step takes `step_s` and `token_s` for each answer in it."""

    def __init__(self, lengths: list[int], flight: int, step_s: float, token_s: float) -> None:
        self.waiting, self.flight, self.cost = list(lengths), flight, (step_s, token_s)
        self.going: list[list[int]] = []
        self.ended: list[int] = []
        self.steps, self.seconds, self.all = 0, 0.0, len(lengths)

    def step(self) -> None:
        while self.waiting and len(self.going) < self.flight:
            self.going.append([0, self.waiting.pop(0)])
        self.seconds += self.cost[0] + self.cost[1] * len(self.going)
        self.steps += 1
        for one in self.going:
            one[0] += 1
        self.ended += [length for at, length in self.going if at >= length]
        self.going = [one for one in self.going if one[0] < one[1]]

    def run(self) -> float:
        while self.waiting or self.going:
            self.step()
        return self.seconds

    def progress(self, later: int = 0) -> Progress:
        going = [at for at, _ in self.going]
        mean, share, longest = lengths_so_far(self.ended, going)
        writing = Writing(
            self.all, 0, later, len(self.ended), min(self.flight, self.all), sum(self.ended) + sum(going), self.steps,
            self.seconds, mean, share, longest,
        )  # fmt: skip
        done = 0.9 * writing.tokens / (self.all * 4096)
        return Progress("generate", 9, done, 1.0, unit="shards", phase_s=self.seconds, numbers=writing.numbers())


def lengths_of(answers: int, mean: float, *, seed: int = 0, longest: int = 8192) -> list[int]:
    """Lognormal ones, as reasoning answers are, cut at the limit."""
    rng = random.Random(seed)
    middle = mean / math.exp(0.8**2 / 2)
    return [min(longest, max(1, round(rng.lognormvariate(math.log(middle), 0.8)))) for _ in range(answers)]


COSTS = [(0.004, 24e-6), (0.03, 1e-4), (0.001, 60e-6)]  # a small model on a large card, a large one on a small, others


@pytest.mark.parametrize(("step_s", "token_s"), COSTS)
@pytest.mark.parametrize(("answers", "flight", "mean"), [(256, 256, 2500), (512, 128, 2500), (1000, 64, 900)])
def test_a_shard_is_forecast_from_its_first_steps(
    answers: int, flight: int, mean: float, step_s: float, token_s: float
) -> None:
    """Tokens a second alone would promise a third of the time: the last answers end in small company."""
    engine = Simulated(lengths_of(answers, mean), flight, step_s, token_s)
    share = step_s / (step_s + flight * token_s)
    planned = Planned(answer_tokens=mean, longest=8192, shard_answers=256, step_share=share)
    looks = list[tuple[float, float]]()
    while engine.going or engine.waiting:
        engine.step()
        if engine.steps in (LEAST_STEPS, 600, 1500):
            found = forecast("label", engine.progress(), allowed_s=1e9, planned=planned)
            assert isinstance(found, Ok)
            looks.append((engine.seconds, found.left_s))
    assert len(looks) >= 3
    for at, left in looks:
        assert 0.75 * (engine.seconds - at) <= left <= 1.33 * (engine.seconds - at), (at, left, engine.seconds)


def test_answers_longer_than_planned_are_seen_before_they_end() -> None:
    """Planned at 800 tokens, written at 3,000 on average: those that ended by then are short."""
    engine = Simulated(lengths_of(256, 3000), 256, 0.004, 24e-6)
    for _ in range(1500):
        engine.step()
    planned = Planned(answer_tokens=800, longest=8192, shard_answers=256)
    found = forecast("label", engine.progress(), allowed_s=1e9, planned=planned)
    at, by_those_that_ended = engine.seconds, statistics.fmean(engine.ended)
    assert by_those_that_ended < 1000  # as if it was nearly as planned
    assert isinstance(found, Ok) and found.left_s == pytest.approx(engine.run() - at, rel=0.35)


@pytest.mark.parametrize("scoring", [0.0, 0.2])
@pytest.mark.parametrize(("step_s", "token_s"), COSTS)
def test_as_many_answers_as_are_said_to_fit_do_fit(step_s: float, token_s: float, scoring: float) -> None:
    lengths = lengths_of(1000, 2000)
    whole = Simulated(lengths, 128, step_s, token_s).run() * (1 + scoring)
    engine = Simulated(lengths, 128, step_s, token_s)
    for _ in range(LEAST_STEPS):
        engine.step()
    share = step_s / (step_s + 128 * token_s)
    planned = Planned(answer_tokens=2000, longest=8192, shard_answers=1000, scoring=scoring, step_share=share)
    allowed = 0.6 * whole - engine.seconds
    found = forecast("label", engine.progress(), allowed_s=allowed, planned=planned)
    assert isinstance(found, Shortfall) and 0.25 < found.total < 0.75 and found.size == 1.0
    less = Simulated(lengths[: round(found.total * 1000)], 128, step_s, token_s).run() * (1 + scoring)
    assert less <= 1.15 * 0.6 * whole


def test_what_an_engine_writes_is_scored_as_well() -> None:
    engine = Simulated(lengths_of(256, 2000), 256, 0.004, 24e-6)
    for _ in range(600):
        engine.step()
    planned = Planned(answer_tokens=2000, longest=8192, shard_answers=256)
    ask = lambda planned: forecast("label", engine.progress(), allowed_s=1e9, planned=planned)  # noqa: E731
    alone, scored = ask(planned), ask(replace(planned, scoring=0.5))
    assert isinstance(alone, Ok) and isinstance(scored, Ok)
    whole_s = engine.seconds + alone.left_s  # of which the half comes on top, of what is written already as well
    assert scored.left_s - alone.left_s == pytest.approx(0.5 * whole_s, rel=0.1)


def test_too_few_steps_of_an_engine_say_nothing() -> None:
    engine = Simulated(lengths_of(64, 2000), 64, 0.01, 1e-5)
    for _ in range(LEAST_STEPS - 1):
        engine.step()
    planned = Planned(answer_tokens=2000, longest=8192)
    assert forecast("label", engine.progress(), allowed_s=0.0, planned=planned) is None
    engine.step()
    assert isinstance(forecast("label", engine.progress(), allowed_s=0.0, planned=planned), Shortfall)


def test_an_evaluation_is_judged_within_its_only_batch() -> None:
    engine = Simulated(lengths_of(200, 2000), 200, 0.004, 24e-6)
    for _ in range(600):
        engine.step()
    planned = Planned(answer_tokens=2000, longest=8192, models=(0.5, 0.25, 0.25), load_s=60.0)
    now = replace(engine.progress(), phase="evaluate", unit="models", total=3.0, done=0.2)
    found = forecast("evaluate", now, allowed_s=1e9, planned=planned)
    at, model = engine.seconds, engine.run()
    assert isinstance(found, Ok) and found.whole and found.left_s == pytest.approx(2 * model - at + 120, rel=0.35)
    over = replace(engine.progress(), phase="evaluate", unit="models", total=3.0, done=1.0)
    assert forecast("evaluate", over, allowed_s=0.0, planned=planned) is None  # the next one has not begun


def test_transformers_batches_are_judged_within_a_shard_once_four_have_ended() -> None:
    planned = Planned(shard_answers=256, batch_share=0.125)
    now = Progress("generate", 9, 0.5, 1.0, unit="shards", phase_s=100.0)
    assert forecast("label", now, allowed_s=1e9, planned=planned) == Ok(100.0)
    found = forecast("label", now, allowed_s=50.0, planned=planned)
    assert found == Shortfall(100.0, 50.0, 188 / 256, 1.0)  # 256 * (0.5 + 0.95 * 50 / 200) = 188.8
    assert forecast("label", replace(now, done=0.4), allowed_s=50.0, planned=planned) is None
    settings = LabelSettings(MODEL, DataSource("p"), "none", 200)
    assert part_of(settings, 188 / 256, 200 / 256, "shards") == "188 of 200 answers"


# --- what the plan says


def test_the_plan_says_what_the_gate_needs_of_a_rented_stage() -> None:
    label, _, evaluate = plan(RENTED, *CARDS).stages[:3]
    assert isinstance(label.settings, LabelSettings) and isinstance(evaluate.settings, EvaluateSettings)
    known = planned_of(label, plain_batches=False)
    each = label.settings.shard_size * label.settings.samples_per_prompt
    assert (known.shard_answers, known.longest) == (each, label.settings.max_new_tokens)
    assert 0 < known.scoring < 0.5 and 0 < known.step_share < 1
    assert known.answer_tokens == label.uses["expected_answer_tokens"]
    assert known.batch_share == math.inf and planned_of(label, plain_batches=True).batch_share < math.inf
    models = planned_of(evaluate, plain_batches=False)
    assert len(models.models) == evaluate.uses["models"] and sum(models.models) == pytest.approx(1.0)
    if evaluate.settings.teacher is not None:
        assert models.models[0] > models.models[1] and len(set(models.models[1:])) == 1
    assert models.load_s > 0 and models.batch_share == 1.0 / evaluate.settings.seeds


def test_a_plan_of_an_older_version_says_less() -> None:
    label, _, evaluate = plan(RENTED, *CARDS).stages[:3]
    older = [planned_of(replace(one, uses={}, candidate_parts=()), plain_batches=True) for one in (label, evaluate)]
    assert older[0].scoring == 0 and older[1].models == ()
