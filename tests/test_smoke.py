"""Does `kdcloud run --smoke` try the whole way for little money, and say what it is?"""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.plan import Plan
from orchestrator.recipe import EvaluateStage, LabelStage, Recipe, TrainStage, load_recipe
from orchestrator.smoke import NOTE, SAMPLES, STEPS, cap_of, smoke_of
from tests.recipes import RENTED, SMALL, recipe
from tests.test_planner import CARDS, CONFIG, LOCAL, NOW, make_plan, offering
from tests.whole_runs import make_home

REHEARSAL = """\
name: trial
budget: 10 CNY
infra: local
local: {price: 0.10 USD/h}
stages:
  - {name: rehearse, kind: rehearse, steps: 40, seconds_per_step: 0.1, checkpoint_every_steps: 40}
"""


def planned(one: Recipe, cap: int | None = None) -> Plan:
    return make_plan(one, config=CONFIG, offers_for=offering(LOCAL, *CARDS), now=NOW, cap_micros=cap)


@pytest.mark.parametrize("text", [SMALL, RENTED])
def test_every_stage_stays_with_few_samples_and_nothing_else_changes(text: str) -> None:
    whole = recipe(text)
    small = smoke_of(whole)
    assert small.name == f"smoke-{whole.name}" and small.compare.seeds == 1
    assert [stage.name for stage in small.stages] == [stage.name for stage in whole.stages]
    for before, after in zip(whole.stages, small.stages, strict=True):
        changed = {key for key, value in after.model_dump().items() if value != before.model_dump()[key]}
        assert changed <= {"samples", "keep", "max_cut_share", "steps", "epochs", "limit"}
        if isinstance(after, LabelStage):
            assert (after.samples, after.keep) == (SAMPLES, "all")
        if isinstance(after, TrainStage):
            assert (after.steps, after.epochs) == (STEPS, None)
        if isinstance(after, EvaluateStage):
            assert after.limit == SAMPLES
    assert smoke_of(small).stages == small.stages


def test_a_recipe_that_is_smaller_than_that_is_not_made_larger() -> None:
    text = RENTED.replace("samples: 1200", "samples: 4").replace("labels: label", "labels: label, steps: 2")
    label, train, *_ = smoke_of(recipe(text)).stages
    assert (label.samples, train.steps) == (4, 2)  # type: ignore[union-attr]


def test_its_plan_is_cheap_and_its_cap_is_its_own_high_estimate_and_never_more_than_the_recipes() -> None:
    whole, small = planned(recipe(RENTED)), planned(smoke_of(recipe(RENTED)))
    assert small.cost_micros.expected < 0.35 * whole.cost_micros.expected
    again = planned(smoke_of(recipe(RENTED)), cap_of(small))
    assert again.fits and not again.tight
    assert again.cap_micros == small.cost_micros.high + small.reserve_micros < whole.cap_micros
    poor = planned(smoke_of(recipe(RENTED)), 1000)
    assert cap_of(poor) == 1000


def test_a_smoke_run_is_marked_and_a_whole_run_teaches_the_next_plan(tmp_path: Path) -> None:
    home = make_home(tmp_path, REHEARSAL)
    done = home.call("run", "recipe.yaml", "--smoke", "--yes")
    assert done.returncode == 0, done.stderr
    assert NOTE in " ".join(done.stderr.split()) and NOTE in " ".join(done.stdout.split())
    report = home.check_over()
    assert report["smoke"] is True and report["recipe"] == "smoke-trial" and report["run"].startswith("smoke-trial-")
    assert report["cap_micros"] < 1_408_451  # of 10 CNY
    (stage,) = home.json("plan", "recipe.yaml")["stages"]
    assert "work" not in (stage["calibration"] or {"parts": {}})["parts"]  # ten steps say nothing of many
    done = home.call("run", "recipe.yaml", "--yes")
    assert done.returncode == 0, done.stderr
    assert home.json("report")["smoke"] is False
    (stage,) = home.json("plan", "recipe.yaml")["stages"]
    work = stage["calibration"]["parts"]["work"]
    assert stage["calibration"]["runs"] == work["runs"] == 1 and 0.9 < work["factor"] < 1.5
    assert "measured on 1 earlier run" in " ".join(home.call("plan", "recipe.yaml").stdout.split())


def test_a_run_that_was_begun_cannot_become_a_smoke_run(tmp_path: Path) -> None:
    done = make_home(tmp_path, REHEARSAL).call("run", "--resume", "last", "--smoke")
    assert done.returncode == 2 and "leave --smoke out" in done.stderr


@pytest.mark.slow
@pytest.mark.alone  # its cap is what it costs on an idle machine
def test_the_quickstart_goes_its_whole_way_in_a_minute(tmp_path: Path) -> None:
    assert {stage.kind for stage in load_recipe("quickstart").stages} >= {"label", "train", "evaluate", "export"}
    home = make_home(tmp_path, REHEARSAL)
    done = home.call("run", "quickstart", "--smoke", "--yes", timeout_s=180)
    assert done.returncode == 0, done.stderr
    report = home.check_over()
    assert report["smoke"] and report["quality"]["student"]["accuracy"]["n"] == SAMPLES
    assert [stage["state"] for stage in report["stages"]] == ["done"] * 5
