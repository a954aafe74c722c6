"""Does the doctor name what is wrong with a run, with the lines that mend it, and find nothing where all is well?"""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from orchestrator import diagnosis
from orchestrator.diagnosis import curves_of, diagnose_command, located, read, render
from orchestrator.findings import (
    ORDER,
    RULES,
    TITLES,
    Answers,
    Change,
    Curve,
    Finding,
    Seen,
    Severity,
    StageSeen,
    findings,
    shape_of,
)
from orchestrator.ledger import Ledger
from orchestrator.recipe import parse_recipe
from orchestrator.session import newest, plan_of
from tasks.contract import (
    Architecture,
    DataSource,
    EvaluateSettings,
    LabelSettings,
    ModelSource,
    PretrainSettings,
    Settings,
    TrainSettings,
)
from tests.pages import HOSTILE
from tests.whole_runs import ROOT, make_home

BROKEN = Path(__file__).parent / "fixtures" / "broken"
PLANTED = {
    "out-of-memory": "out_of_memory",
    "loss-flat": "loss_flat",
    "rate-far": "learning_rate",
    "loss-swings": "loss_swings",
    "temperature-far": "temperature",
    "alpha-far": "alpha",
    "answers-cut": "answers_cut",
    "answers-repeat": "answers_repeat",
    "labels-dropped": "labels_dropped",
    "student-worse": "student_worse",
    "waiting-data": "waiting_data",
    "waiting-saves": "waiting_save",
}


def unpacked(name: str, folder: Path) -> Path:
    """A bucket folder with what is kept of a run of scripts/break_quickstart.py."""
    files = json.loads((BROKEN / f"{name}.json").read_text())
    for key, text in files.items():
        path = folder / "bucket" / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return folder / "bucket"


def diagnosed(bucket: Path, folder: Path, **data: Any) -> dict[str, Any]:
    ledger = Ledger(folder / "ledger.sqlite")
    run = ledger.run(newest(ledger, f"file:{bucket}"))
    document = diagnosis.diagnosed(replace(run, data={**run.data, **data}), plan_of(run))
    return {**document, "text": run.data["recipe_text"]}


def test_a_smoke_run_is_not_asked_whether_it_learned_but_whether_it_went(tmp_path: Path) -> None:
    document = diagnosed(unpacked("loss-flat", tmp_path), tmp_path, smoke=True)
    assert document["findings"] == [] and "its quality means nothing" in " ".join(document["looked_at"])
    (tmp_path / "other").mkdir()
    (one,) = diagnosed(unpacked("out-of-memory", tmp_path / "other"), tmp_path / "other", smoke=True)["findings"][:1]
    assert one["id"] == "out_of_memory"


def test_every_broken_run_that_is_made_is_kept_and_small() -> None:
    kept = {path.stem: path.stat().st_size for path in BROKEN.iterdir()}
    assert set(kept) == {*PLANTED, "sound"} and len(PLANTED) >= 8
    assert all(size < 100_000 for size in kept.values())
    assert "/work" not in "".join(path.read_text() for path in BROKEN.iterdir())


@pytest.mark.parametrize("name", PLANTED)
def test_the_fault_that_was_planted_is_named_first(name: str, tmp_path: Path) -> None:
    found = diagnosed(unpacked(name, tmp_path), tmp_path)["findings"]
    assert [one["id"] for one in found][:1] == [PLANTED[name]]
    assert found[0]["severity"] != "note" and found[0]["what"] and found[0]["evidence"]
    assert found[0]["change"] or found[0]["advice"]


def test_a_sound_run_has_no_finding(tmp_path: Path) -> None:
    document = diagnosed(unpacked("sound", tmp_path), tmp_path)
    assert document["findings"] == []
    looked = " ".join(document["looked_at"])
    assert "points of its loss" in looked and "400 answers" in looked and "accuracy" in looked
    assert document["not_read"] == []


@pytest.mark.parametrize("name", PLANTED)
def test_each_change_names_its_line_and_leaves_a_recipe_that_is_right(name: str, tmp_path: Path) -> None:
    document = diagnosed(unpacked(name, tmp_path), tmp_path)
    changes = [change for one in document["findings"] for change in one["change"]]
    assert changes or name == "waiting-data"
    for change in changes:
        recipe, lines = yaml.safe_load(document["text"]), document["text"].splitlines()
        stage = next(one for one in recipe["stages"] if one["name"] == change["stage"])
        *outer, last = change["key"].split(".")
        line = lines[change["line"] - 1]
        if change["now"] is None:
            assert line.startswith("-") or "name:" in line
        else:
            assert f"{last}:" in line and change["now"] in line
        for part in outer:
            stage = stage.setdefault(part, {})
        assert stage.get(last) != change["value"]
        stage[last] = change["value"]
        assert yaml.safe_load(change["text"])
        parse_recipe(yaml.safe_dump(recipe), tmp_path / "recipe.yaml")  # raises where something is wrong


def test_a_run_whose_bucket_is_away_is_judged_by_the_ledger_and_says_what_is_missing(tmp_path: Path) -> None:
    bucket = unpacked("student-worse", tmp_path)
    ledger = Ledger(tmp_path / "ledger.sqlite")
    run = replace(ledger.run(newest(ledger, f"file:{bucket}")), bucket="nowhere:/x")
    seen, _, missing = read(run, plan_of(run))
    assert (
        "student_worse" in [one.id for one in findings(seen)] and len(missing) == 1 and "cannot be opened" in missing[0]
    )


def test_the_command_prints_the_document_or_a_list_that_fits_80_columns(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket, ledger = unpacked("out-of-memory", tmp_path), Ledger(tmp_path / "ledger.sqlite")
    diagnose_command(ledger, f"file:{bucket}", True)
    document = json.loads(capsys.readouterr().out)
    assert document["schema"] == 1 and document["state"] == "failed"
    assert set(document["findings"][0]) == {
        "id", "severity", "stage", "title", "what", "evidence", "change", "advice",
    }  # fmt: skip
    monkeypatch.setenv("COLUMNS", "80")
    diagnose_command(ledger, None, False)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert "✗ out of memory  stage train" in lines
    assert any("512 becomes  micro_batch: 128" in line for line in lines)
    assert any("add  checkpointing: true" in line for line in lines)


def test_what_a_machine_said_stays_text(tmp_path: Path) -> None:
    hostile = f"out of memory {HOSTILE[0]} \x1b[2J[bold]x[/bold] [link=http://x]y[/link]"
    settings = TrainSettings(ModelSource(path="some/model"), "label")
    stage = StageSeen("train", "train", settings, False, ended={"message": hostile}, attempts=1)
    one = findings(seen(stage, state="failed"))[0]
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    found = {**vars(one), "title": TITLES[one.id], "change": []}
    render({"run": "r", "state": "failed", "findings": [found], "looked_at": [], "not_read": []}, console)
    text = console.export_text()
    assert "\x1b" not in text and "[bold]x[/bold]" in text and "?[2J" in text


# --- the rules, one by one -------------------------------------------------------------------------------------------


def seen(*stages: StageSeen, state: str = "done", **more: Any) -> Seen:
    return Seen(state=state, **{"message": "", "hint": "", "failed": None, **more}, stages=stages)


def train(**settings: Any) -> StageSeen:
    return StageSeen("train", "train", TrainSettings(ModelSource(path="some/model"), "label", **settings), True)


def label(answers: Answers | None, **settings: Any) -> StageSeen:
    given: dict[str, Any] = {"samples": 400, "verify": "math", **settings}
    made = LabelSettings(ModelSource(path="some/teacher"), DataSource("x.jsonl"), **given)
    return StageSeen("label", "label", made, True, answers=answers)


def ids(*stages: StageSeen, **more: Any) -> list[tuple[str, str]]:
    return [(one.id, str(one.severity)) for one in findings(seen(*stages, **more))]


def fault(found: list[Finding], id_: str) -> Finding:
    return next(one for one in found if one.id == id_)


@pytest.mark.parametrize(
    ("t", "alpha", "found"),
    [
        (2.0, 0.7, []),
        (4.0, 0.7, []),
        (1.0, 0.7, [("temperature", "note")]),
        (0.7, 0.7, [("temperature", "warning")]),
        (0.3, 0.7, [("temperature", "fault")]),
        (6.0, 0.7, [("temperature", "note")]),
        (9.0, 0.7, [("temperature", "warning")]),
        (11.0, 0.7, [("temperature", "fault")]),
        (11.0, 0.0, [("alpha", "warning")]),
        (2.0, 0.05, [("alpha", "warning")]),
        (2.0, 0.2, [("alpha", "note")]),
        (2.0, 1.0, [("alpha", "note")]),
    ],
)
def test_temperature_and_alpha_are_judged_by_how_far_they_are_from_the_usual(
    t: float, alpha: float, found: list[tuple[str, str]]
) -> None:
    assert ids(train(temperature=t, alpha=alpha)) == found


@pytest.mark.parametrize(
    ("t", "found"), [(1.0, []), (1.5, []), (0.9, [("temperature", "warning")]), (6.0, [("temperature", "note")])]
)
def test_a_student_from_nothing_may_learn_the_distribution_as_it_is(t: float, found: list[tuple[str, str]]) -> None:
    student = ModelSource(architecture=Architecture())
    settings = TrainSettings(student, "label", temperature=t, alpha=0.9)
    assert ids(StageSeen("train", "train", settings, True)) == found


def test_alpha_of_hard_labels_is_no_finding() -> None:
    assert ids(label(None, top_k=0), train(temperature=2.0, alpha=0.0)) == []


@pytest.mark.parametrize(
    ("answers", "found"),
    [
        (Answers(100, 80, {"wrong": 20}, 5), []),
        (Answers(100, 80, {"wrong": 20}, 12), [("answers_repeat", "warning")]),
        (Answers(100, 60, {"cut": 40}, 35), [("answers_repeat", "fault")]),  # what loops is cut off: one finding
        (Answers(100, 70, {"cut": 15, "wrong": 15}, 0), [("answers_cut", "warning")]),
        (Answers(100, 60, {"cut": 40}, None), [("answers_cut", "fault")]),
        (Answers(100, 40, {"wrong": 60}, 0), [("labels_dropped", "warning")]),
        (Answers(100, 10, {"wrong": 85, "no_answer": 5}, 0), [("labels_dropped", "fault")]),
        (Answers(400, 100, {"longer": 250, "wrong": 50}, 0), []),  # keep: shortest drops right ones
        (Answers(8, 0, {"wrong": 8}, 0), []),
    ],
)
def test_answers_are_judged_by_shares(answers: Answers, found: list[tuple[str, str]]) -> None:
    assert ids(label(answers)) == found


def test_a_teacher_of_this_run_is_to_be_trained_longer_and_another_one_asked_more_often() -> None:
    poor = Answers(100, 10, {"wrong": 90}, 0)
    other = fault(findings(seen(label(poor))), "labels_dropped")
    assert [(c.key, c.value) for c in other.change] == [("samples_per_prompt", 4), ("keep", "shortest")]
    made = PretrainSettings(Architecture(), "builtin:x", 10, 100, 8, 0.003)
    own = replace(label(poor), settings=replace(label(poor).settings, teacher=ModelSource(stage="pretrain")))
    found = fault(findings(seen(StageSeen("pretrain", "pretrain", made, True), own)), "labels_dropped")
    assert [(c.stage, c.key, c.value) for c in found.change] == [("pretrain", "steps", 400)]


def curve(*losses: float, **more: Any) -> Curve:
    return Curve("", tuple(losses), len(losses) - 1, **more)


def falling(end: float, noise: float, points: int = 200) -> list[float]:
    """From 1 down to `end`, each point off by about `noise` of it."""
    draw = random.Random(0)
    return [(end + (1 - end) * math.exp(-i / 30)) * (1 + draw.gauss(0, noise)) for i in range(points)]


@pytest.mark.parametrize(
    ("losses", "found"),
    [
        (falling(0.5, 0.1), []),
        (falling(0.8, 0.1), []),
        (falling(1.0, 0.1), [("loss_flat", "fault")]),
        (falling(0.96, 0.01), [("loss_flat", "warning")]),
        (
            [(1 - i / 7000) * (1 + 0.1 * (-1) ** i) for i in range(200)],
            [("loss_flat", "fault")],
        ),  # 3 %: chance does more
        ([1.0 / (1 + i) + 0.07 for i in range(50)], []),  # steep at first: that is no noise
        (falling(0.5, 0.6), [("loss_swings", "warning")]),
        ([*falling(0.5, 0.05, 100), *[0.7] * 100], [("loss_swings", "warning")]),
        ([*falling(1.0, 0.05, 100), *[1.5] * 100], [("loss_swings", "fault")]),
        (falling(1.0, 0.1, points=15), []),  # too few to tell
    ],
)
def test_a_curve_is_judged_by_its_first_and_last_tenth_and_its_trembling(
    losses: list[float], found: list[tuple[str, str]]
) -> None:
    assert ids(replace(train(), curves=(curve(*losses),))) == found


@pytest.mark.parametrize(
    ("rate", "method", "found"),
    [
        (2e-3, "lora", []),
        (1e-2, "lora", [("learning_rate", "warning")]),
        (2e-5, "lora", []),
        (5e-6, "lora", [("learning_rate", "warning")]),
        (1e-4, "full", []),
    ],
)
def test_a_rate_far_from_the_usual_is_told_although_the_loss_falls(
    rate: float, method: str, found: list[tuple[str, str]]
) -> None:
    stage = train(learning_rate=rate, method=method)
    assert ids(replace(stage, curves=(curve(*falling(0.5, 0.1)),))) == found
    assert ids(replace(stage, curves=(curve(*falling(1.0, 0.1)),))) == [("loss_flat", "fault")]  # one is enough


@pytest.mark.parametrize(
    ("after", "before", "teacher", "found"),
    [
        (0.05, 0.0, 0.9, [("student_far", "warning")]),
        (0.2, 0.0, 0.9, []),
        (0.5, 0.5, 0.9, [("student_far", "warning")]),
        (0.5, 0.49, 0.55, []),  # there was little to learn
        (0.2, 0.5, 0.9, [("student_worse", "fault")]),  # one is enough
    ],
)
def test_a_student_that_hardly_came_nearer_to_its_teacher_is_told(
    after: float, before: float, teacher: float, found: list[tuple[str, str]]
) -> None:
    stage = evaluated(after, before)
    stage.result["quality"]["teacher"] = {"accuracy": {"mean": teacher, "n": 1000}}
    assert ids(stage) == found


def test_seeds_that_fail_alike_are_one_finding_by_the_worst_of_them() -> None:
    curves = curve(*falling(0.96, 0.01)), curve(*falling(1.0, 0.1)), curve(*falling(0.5, 0.1))
    assert ids(replace(train(), curves=curves)) == [("loss_flat", "fault")]


def test_the_noise_of_a_loss_that_falls_is_no_fault_whatever_the_draw() -> None:
    """Twenty draws of the noise that single batches of eight have."""
    for seed in range(20):
        draw = random.Random(seed)
        losses = [(0.7 + 0.3 * math.exp(-i / 30)) * (1 + draw.gauss(0, 0.12)) for i in range(200)]
        assert ids(replace(train(), curves=(curve(*losses),))) == []


def test_a_loss_that_is_no_number_is_told_with_its_step_and_a_usual_rate() -> None:
    stage = replace(train(learning_rate=0.1), done=False, ended={"message": "soft-0: the loss is nan at step 33"})
    one = findings(seen(stage, state="failed", failed="train", message="stage train: the loss is nan"))[0]
    assert (one.id, one.severity, one.evidence["step"]) == ("loss_swings", Severity.FAULT, 33)
    assert [(c.key, c.value) for c in one.change] == [("learning_rate", 2e-4)]


@pytest.mark.parametrize(
    "message",
    [
        "the stage ran out of memory: [enforce fail] DefaultCPUAllocator: can't allocate memory",
        "a single sample does not fit: CUDA out of memory. Tried to allocate 2 GiB",
        "one of the GPUs ran out of memory with micro_batch 8, and a step of a model in shards cannot be repeated",
        "the system killed the stage, most likely for want of memory: it held 31.0 of 32.0 GiB of memory",
        "vLLM cannot serve x: No available memory for the cache blocks",
    ],
)
def test_every_way_in_which_a_stage_says_that_memory_ran_out_is_known(message: str) -> None:
    stage = replace(train(micro_batch=1, method="full"), done=False, ended={"message": message, "peak_gib": 31.0})
    one = findings(seen(stage, state="failed", failed="train", message=message))[0]
    assert one.id == "out_of_memory" and one.evidence["peak_gib"] == 31.0
    assert [(c.key, c.value) for c in one.change] == [("checkpointing", True), ("method", "lora")]


def test_a_stage_that_had_to_halve_its_micro_batch_is_a_note_with_the_one_that_fits() -> None:
    (one,) = findings(seen(replace(train(micro_batch=8), curves=(curve(*falling(0.5, 0.1), micro_batch=2),))))
    assert (one.id, one.severity) == ("memory_tight", Severity.NOTE)
    assert one.change == (Change("train", "micro_batch", 2),)


def test_waiting_is_told_by_what_was_waited_for() -> None:
    losses = falling(0.5, 0.1)
    data = replace(train(), curves=(curve(*losses, waiting_data=0.4, waiting_save=0.1),))
    assert ids(label(None), data) == [("waiting_data", "warning")]
    saves = replace(train(checkpoint_every_s=10.0), curves=(curve(*losses, waiting_data=0.1, waiting_save=0.5),))
    (one,) = findings(seen(saves))
    # half of the time: as long as the steps; a nineteenth of them is 5 %, so 19 times as rarely
    assert one.id == "waiting_save" and one.change == (Change("train", "checkpoint_every", "3min"),)
    rented = replace(train(), local=False, ended={"seconds": 2000.0, "work_s": 500.0})
    assert ids(rented) == [("waiting_start", "warning")]
    assert ids(replace(rented, local=True)) == ids(replace(rented, ended={"seconds": 800.0, "work_s": 1.0})) == []


def evaluated(after: float, before: float, n: int = 1000, **shares: float) -> StageSeen:
    def one(mean: float) -> dict[str, Any]:
        half = 1.96 * math.sqrt(max(mean * (1 - mean), 1e-4) / n)
        return {"accuracy": {"mean": mean, "n": n, "interval": [mean - half, mean + half]}, **shares}

    settings = EvaluateSettings("train", None, DataSource("x"), "math")
    quality = {"student": one(after), "student_before": one(before)}
    return StageSeen("evaluate", "evaluate", settings, True, result={"quality": quality})


@pytest.mark.parametrize(
    ("after", "before", "n", "found"),
    [
        (0.5, 0.4, 1000, []),
        (0.4, 0.41, 1000, []),
        (0.4, 0.43, 1000, [("student_worse", "warning")]),
        (0.3, 0.5, 1000, [("student_worse", "fault")]),
        (0.3, 0.5, 20, [("student_worse", "warning")]),
    ],
)
def test_a_student_is_worse_where_chance_is_no_excuse(
    after: float, before: float, n: int, found: list[tuple[str, str]]
) -> None:
    assert ids(evaluated(after, before, n)) == found


def test_a_student_that_goes_round_in_circles_is_not_also_told_to_be_cut_off() -> None:
    assert ids(evaluated(0.5, 0.1, cut_share=0.5, loop_share=0.4)) == [("student_repeats", "warning")]
    assert ids(evaluated(0.5, 0.1, cut_share=0.2, loop_share=0.0)) == [("student_cut", "note")]


def test_a_stage_that_failed_otherwise_says_what_it_said_itself() -> None:
    more = {"state": "failed", "failed": "train", "message": "stage train: boom", "hint": "do this"}
    (one,) = findings(seen(replace(train(), done=False, ended={"reason": "bug"}), **more))
    assert (one.id, one.what, one.advice, one.evidence["reason"]) == (
        "stage_failed",
        "stage train: boom",
        "do this",
        "bug",
    )
    for state in ("done", "running", "stopped"):
        assert findings(seen(replace(train(), done=False), **{**more, "state": state})) == []


def test_what_follows_from_a_fault_stands_behind_it(tmp_path: Path) -> None:
    """Of the kept runs; whatever else they show is no more severe."""
    said = {name: diagnosed(unpacked(name, tmp_path / name), tmp_path / name)["findings"] for name in PLANTED}
    faults = {name: [one["id"] for one in found if one["severity"] == "fault"] for name, found in said.items()}
    assert all(len(found) <= 1 for found in faults.values()), faults


def test_causes_stand_before_what_follows_from_them() -> None:
    stages = label(Answers(100, 5, {"wrong": 95}, 0)), train(temperature=40.0), evaluated(0.1, 0.9)
    assert [one for one, _ in ids(*stages)] == ["labels_dropped", "temperature", "student_worse"]
    assert set(ORDER) == set(TITLES) and len(RULES) == 6


def test_metrics_become_curves_without_the_arms_that_are_compared_with_and_with_what_was_repeated_last() -> None:
    rows: list[dict[str, Any]] = [
        {"step": 0, "loss/total": 3.0, "waiting/data": 0.5},
        {"step": 0, "hard-0/loss/total": 9.0},
        {"step": 0, "search-soft-0.1/loss/total": 9.0},
        {"step": 4, "loss/total": 2.0, "micro_batch": 2},
        {"step": 4, "loss/total": 1.0, "waiting/data": 0.25, "micro_batch": 4},
        {"step": 8, "loss/total": None},
        {"step": "x", "loss/total": 1.0},
        {"step": 0, "soft-1/loss/total": 5.0, "soft-1/waiting/save": 0.75},
    ]
    first, second = curves_of(rows)
    assert (first.losses, first.last_step, first.micro_batch) == ((3.0, 1.0), 8, 4)
    assert (second.name, second.losses, second.waiting_save) == ("soft-1", (5.0,), 0.75)


def test_a_change_is_written_as_yaml_reads_it_back() -> None:
    text = "name: x\nstages:\n- {name: train, kind: train, loss: {alpha: 0.1}}\n- name: label\n  top_p: 0.5\n"
    for change, line, now, said in (
        (Change("train", "loss.alpha", 0.7), 3, "0.1", "alpha: 0.7"),
        (Change("train", "loss.temperature", 2), 3, None, "loss: {temperature: 2}"),
        (Change("train", "learning_rate", 2e-5), 3, None, "learning_rate: 0.00002"),
        (Change("label", "top_p", 0.95), 5, "0.5", "top_p: 0.95"),
        (Change("label", "checkpoint_every", "3min"), 4, None, "checkpoint_every: 3min"),
    ):
        found = located(text, change)
        assert (found["line"], found["now"], found["text"]) == (line, now, said)
    assert yaml.safe_load("learning_rate: 0.00002") == {"learning_rate": 2e-5}
    assert located("not: [yaml", Change("train", "steps", 1))["line"] is None
    assert located(text, Change("nobody", "steps", 1))["line"] is None


def test_shapes_of_short_and_empty_curves_are_none() -> None:
    assert shape_of([]) is None and shape_of([1.0] * 20) is None and shape_of([0.0] * 40) is not None


def test_settings_of_any_kind_of_stage_are_judged_without_an_error() -> None:
    kinds: list[Settings] = [
        PretrainSettings(Architecture(), "builtin:x", 10, 100, 8, 0.003),
        TrainSettings(ModelSource(architecture=Architecture()), "label", temperature=2.0),
    ]
    for settings in kinds:
        stage = StageSeen("s", "train", settings, False, ended={"message": "the stage ran out of memory"})
        assert [one.id for one in findings(seen(stage))] == ["out_of_memory"]


@pytest.mark.slow
def test_a_run_that_is_broken_today_is_named_today(tmp_path: Path) -> None:
    """The whole way: a real run of the command line, and what it leaves now."""
    recipe = yaml.safe_load((ROOT / "recipes" / "quickstart.yaml").read_text())
    del recipe["compare"]
    stages = {stage["name"]: stage for stage in recipe["stages"]}
    stages["pretrain"].update(steps=40)
    stages["label"].update(samples=64, max_new_tokens=4)
    home = make_home(tmp_path, yaml.safe_dump(recipe, sort_keys=False))
    assert home.call("run", str(home.recipe), "--yes").returncode == 5
    document = diagnosed(home.bucket, tmp_path)
    assert document["findings"][0]["id"] == "answers_cut"
    assert document["findings"][0]["change"][0]["text"] == "max_new_tokens: 16"
