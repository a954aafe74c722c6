"""How long until a rented machine has its packages: the figures, and where they show in a plan."""

from __future__ import annotations

from dataclasses import replace

import pytest

from orchestrator import planner, setup_time
from orchestrator.catalog import GPUS
from orchestrator.plan import Plan, Range
from orchestrator.setup_time import environment_of, fetched_bytes, runs_vllm, setup_s
from tasks.contract import DataSource, LabelSettings, ModelSource, RehearseSettings
from tests.recipes import RENTED
from tests.test_planner import CARDS, card, plan

LABEL = LabelSettings(ModelSource(path="m"), DataSource("p"), "math", 10)


@pytest.mark.parametrize(("name", "measured_s"), [("train", 26.8), ("label", 43.3), ("label", 48.5)])
def test_what_was_measured_is_a_fast_machine_of_the_model(name: str, measured_s: float) -> None:
    """From an empty cache, a Python and the check left out; a disk and a line that most rented machines do not have."""
    made = setup_s(name)
    least = setup_time.PYTHON_S.low + setup_time.CHECK_S.low
    assert measured_s == pytest.approx(made.low - least, rel=0.15)
    assert measured_s < made.expected < made.high


def test_a_larger_environment_takes_longer_and_one_that_is_there_takes_no_time() -> None:
    assert 4e9 < fetched_bytes("label") < 5e9 and 2.5e9 < fetched_bytes("train") < 3.5e9
    assert setup_s(None).expected < setup_s("train").expected < setup_s("label").expected
    for name in ("label", "train", None):
        assert setup_s(name, first=False).high <= 5.0 < setup_s(name).high
    saved = setup_s("train").expected - setup_s("train", others=True).expected
    assert saved == pytest.approx(setup_time.PYTHON_S.expected)  # uv and a Python are there


def test_the_slower_of_line_and_disk_sets_the_pace(monkeypatch: pytest.MonkeyPatch) -> None:
    usual = setup_s("train")
    monkeypatch.setattr(setup_time, "UNPACK_GB_S", Range(1.0, 1.0, 1.0))  # a disk that is never waited for
    line = setup_s("train")
    # what is fetched, at 0.06 GB/s, and 8 s + 6 s
    assert line.expected == pytest.approx(fetched_bytes("train") / 0.06e9 + 14)
    assert line.low <= usual.low and line.expected <= usual.expected


def test_the_card_decides_which_environment_a_label_stage_gets() -> None:
    assert [environment_of("label", LABEL, GPUS[gpu]) for gpu in ("T4", "V100", "A100")] == ["label", "train", "label"]
    assert environment_of("label", replace(LABEL, engine="transformers"), GPUS["A100"]) == "train"
    assert environment_of("rehearse", RehearseSettings(1, 1.0), GPUS["A100"]) is None
    assert not runs_vllm(None) and GPUS.keys() > setup_time.VLLM_CARD_MISSING


def stage_hours(made: Plan) -> dict[str, float]:
    return {stage.name: stage.startup_hours.expected * 3600 for stage in made.stages}


def test_setting_up_is_part_of_every_rented_stage_its_hours_and_its_price(monkeypatch: pytest.MonkeyPatch) -> None:
    made = plan(RENTED, *CARDS, join=False)
    wanted = {"label": "label", "train": "train", "evaluate": "label", "export": "train"}
    for name, seconds in stage_hours(made).items():
        environment = setup_s(wanted[name])
        assert seconds == pytest.approx(planner.CLOUD_STARTUP_S.expected + environment.expected)
        assert made.stages[list(wanted).index(name)].uses["setup_s"] == round(environment.expected)
    monkeypatch.setattr(setup_time, "setup_s", lambda environment, first=True: Range(0.0, 0.0, 0.0))
    bare = plan(RENTED, *CARDS, join=False)
    price = made.stages[0].offer.price_micros_per_hour or 0
    more = made.stages[0].cost_micros.expected - bare.stages[0].cost_micros.expected
    seconds = fetched_bytes("label") / 1e9 / 0.06 + 8 + 6
    assert more == pytest.approx(seconds * price / 3600, abs=price / 3600)  # whole seconds are billed


def test_nothing_is_set_up_on_your_own_machine() -> None:
    made = plan()
    assert all("setup_s" not in stage.uses for stage in made.stages)
    assert all(stage.startup_hours == planner.duration.hours(planner.LOCAL_STARTUP_S) for stage in made.stages)


def test_labels_are_planned_with_vllm_where_the_card_allows_it() -> None:
    text = RENTED.replace("DeepSeek-R1-Distill-Qwen-7B", "DeepSeek-R1-Distill-Qwen-1.5B")
    fast, slow = (plan(text, card(gpu, 1_000_000), *CARDS) for gpu in ("A100", "V100"))
    assert fast.stages[0].settings.batch_size == LabelSettings.shard_size  # type: ignore[union-attr]
    said = "transformers write them, several times slower"
    assert any(said in note for note in fast.notes) and not any(said in note for note in plan().notes)
    v100 = plan(text.replace("kind: label,", "kind: label, gpus: [V100],"), card("V100", 1), *CARDS).stages[0]
    assert v100.settings.batch_size < LabelSettings.shard_size  # type: ignore[union-attr]
    assert v100.hours.expected > 3 * slow.stages[0].hours.expected


def test_a_recipe_that_insists_on_vllm_gets_no_card_without_it() -> None:
    text = RENTED.replace("kind: label,", "kind: label, engine: vllm,").replace("Qwen-7B", "Qwen-1.5B")
    label = plan(text, card("V100", 1), *CARDS).stages[0]
    assert {one.why for one in label.rejected if one.gpu == "V100"} == {"vLLM does not run on it"}
    assert all(offer.gpu != "V100" for offer in label.candidates)
