"""Will the money last at the speed that was seen? Tables of progress and what follows."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.forecast import SLACK, Ok, Shortfall, forecast, shrinks
from tasks.contract import (
    DataSource,
    EvaluateSettings,
    LabelSettings,
    ModelSource,
    Progress,
    RehearseSettings,
    TrainSettings,
)

# 30 steps after the first one, 2 s each: 570 are left, 1,140 s.
TRAINING = Progress("train", 31, 31.0, 601.0, phase_from=1.0, phase_s=60.0)
LABELLING = Progress("generate", 9, 2.0, 8.0, unit="shards", phase_from=0.0, phase_s=200.0)
MODEL = ModelSource(path="m")


@pytest.mark.parametrize(
    ("kind", "progress", "allowed_s", "wanted"),
    [
        ("train", TRAINING, 1140.0, Ok(1140.0)),
        ("train", TRAINING, 1140.0 * SLACK, Ok(1140.0)),  # a tenth is no shortfall
        ("train", TRAINING, 1000.0, Shortfall(1140.0, 1000.0, 506.0, 506 / 601)),  # 31 + 0.95 * 1000 / 2
        ("train", TRAINING, -50.0, Shortfall(1140.0, 0.0, 31.0, 31 / 601)),  # nothing is left: what is done
        ("train", replace(TRAINING, done=19.0, phase_s=36.0), 0.0, None),  # 18 steps after the first
        ("train", replace(TRAINING, done=20.0, phase_s=38.0), 0.0, Shortfall(1162.0, 0.0, 20.0, 20 / 601)),
        ("train", replace(TRAINING, phase_from=20.0), 0.0, None),  # resumed at 19: this machine did few of them
        ("train", replace(TRAINING, phase="checkpoint", declared=True), 0.0, None),
        ("train", replace(TRAINING, total=None), 0.0, None),
        ("train", replace(TRAINING, done=601.0, phase_s=1200.0), 0.0, Ok(0.0)),
        ("label", LABELLING, 600.0, Ok(600.0)),
        ("label", LABELLING, 300.0, Shortfall(600.0, 300.0, 4.0, 0.5)),  # 2 + 0.95 * 3, whole shards
        ("label", replace(LABELLING, done=2.4), 0.0, None),  # within a shard answers do not come evenly
        ("label", replace(LABELLING, done=0.9), 0.0, None),
        ("label", replace(LABELLING, phase="score"), 0.0, None),
        ("pretrain", TRAINING, 1140.0, Ok(1140.0)),
        ("export", replace(TRAINING, phase="export"), 0.0, None),
    ],
)
def test_what_is_left_and_whether_it_fits(
    kind: str, progress: Progress, allowed_s: float, wanted: Ok | Shortfall | None
) -> None:
    assert forecast(kind, progress, allowed_s=allowed_s) == wanted


def test_an_evaluation_is_judged_by_the_model_at_hand_after_four_batches() -> None:
    """A teacher is slower than the students after it: nothing is said of them."""
    now = Progress("evaluate", 5, 0.5, 3.0, unit="models", phase_from=0.0, phase_s=100.0)
    ask = lambda progress, share=0.1: forecast("evaluate", progress, allowed_s=50.0, batch_share=share)  # noqa: E731
    assert ask(now) == Shortfall(100.0, 50.0, 0.0, 0.0)  # half a model is left
    assert ask(replace(now, done=0.8)) == Ok(pytest.approx(25.0))
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
