"""The right model of a run is found, and comes to this machine whole or not at all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator.config import Home
from orchestrator.errors import UsageError
from orchestrator.plan import StagePlan
from orchestrator.student import Role, choose, fetch, find, student_folder
from orchestrator.testing import FakeBucket, VirtualClock
from tasks.bucket import Corrupt, FileEntry, Manifest, commit_folder, open_bucket
from tasks.contract import (
    ApiTeacher,
    Architecture,
    DataSource,
    ExportSettings,
    LabelSettings,
    ModelSource,
    PretrainSettings,
    TrainSettings,
)
from tests.recorded_runs import recorded, stages

HUB = ModelSource(path="some/base")
TINY = ModelSource(architecture=Architecture())


def label(teacher: ModelSource, api: ApiTeacher | None = None) -> LabelSettings:
    return LabelSettings(teacher=teacher, prompts=DataSource("p"), verify="exact", samples=1, api=api)


def committed(*files: str) -> Manifest:
    return Manifest(1, {name: FileEntry(10, "0" * 64) for name in files})


QUICK = stages(
    pretrain=PretrainSettings(Architecture(), "builtin:addition/corpus", 1, 1, 1, 0.1),
    label=label(ModelSource(stage="pretrain")),
    train=TrainSettings(TINY, "label", method="full"),
    export=ExportSettings("train", ("hf",)),
)
TRAIN_FILES = committed("model/w", "before/w", "arms/soft-0/w", "students.json")
ALL = {"pretrain": committed("model/w"), "train": TRAIN_FILES, "export": committed("hf/w", "hf/README.md", "x.gguf")}


def said(plan: Sequence[StagePlan], manifests: dict[str, Manifest], **rest: object) -> str:
    with pytest.raises(UsageError) as raised:
        choose("r", plan, manifests, **rest)  # type: ignore[arg-type]
    return f"{raised.value.message} | {raised.value.hint}"


def test_the_export_is_the_student_and_only_what_is_needed_is_wanted():
    found = choose("r", QUICK, ALL)
    assert [(m.role, m.stage, m.part) for m in found.models] == [
        ("student", "export", "hf"), ("before", "train", "before"), ("teacher", "pretrain", "model"),
    ]  # fmt: skip
    assert found.missing == {}
    assert {stage: set(found.files(stage)) for stage in found.parts} == {
        "export": {"hf/w", "hf/README.md"}, "train": {"before/w"}, "pretrain": {"model/w"},
    }  # fmt: skip
    assert found.size == 40


def test_without_an_export_the_student_is_what_training_left():
    for export in ({}, {"export": committed("student.gguf")}):  # an export of other formats has no folder to load
        found = choose("r", QUICK, {"train": TRAIN_FILES, **export}, roles=[Role.STUDENT])
        assert [(m.stage, m.part) for m in found.models] == [("train", "model")]


def test_one_stage_can_be_named():
    assert choose("r", QUICK, ALL, stage="train").models[0].stage == "train"
    assert said(QUICK, ALL, stage="label") == "run r has no student of a stage 'label' | there is one of: train, export"


def test_what_is_published_is_an_export_though_a_later_stage_trained_on():
    plan = [*QUICK, *stages(more=TrainSettings(ModelSource(stage="train"), "label", method="full"))]
    manifests = {**ALL, "more": TRAIN_FILES}
    assert choose("r", plan, manifests).models[0].stage == "more"
    assert choose("r", plan, manifests, exported=True).models[0].stage == "export"
    del manifests["export"]
    assert choose("r", plan, manifests, exported=True).models[0].stage == "more"  # which is refused


def test_a_run_without_a_student_says_which_stage_is_missing():
    early = {"pretrain": committed("model/w")}
    assert said(QUICK, early, state="failed") == (
        "run r has no student yet: stage train is not done (failed) | go on with `kdcloud run --resume r`"
    )
    assert "`kdcloud attach r` watches it" in said(QUICK, early, state="running")
    assert "not in the bucket any more" in said(QUICK, early, done={"train"})
    assert "trains no student" in said(QUICK[:2], early)


def test_a_teacher_of_the_hub_is_named_and_nothing_of_the_run_is_fetched_for_it():
    plan = stages(label=label(HUB), train=TrainSettings(ModelSource(path="some/small"), "label"))
    files = committed("model/adapter", "model/student.json", "tokenizer/t", "students.json")
    found = choose("r", plan, {"train": files})
    student, before, teacher = found.models
    assert student.adapter and (before.source, before.tokenizer) == (ModelSource(path="some/small"), "train")
    assert (teacher.name, teacher.source) == ("some/base", HUB)
    assert found.parts == {"train": {"model", "tokenizer"}}


def test_an_adapter_on_an_earlier_student_needs_that_one_too():
    plan = stages(
        label=label(HUB),
        first=TrainSettings(HUB, "label"),
        second=TrainSettings(ModelSource(stage="first"), "label"),
    )
    adapter = committed("model/adapter", "model/student.json", "tokenizer/t")
    found = choose("r", plan, {"first": adapter, "second": adapter}, roles=[Role.STUDENT])
    assert found.parts == {"second": {"model"}, "first": {"model"}}


@pytest.mark.parametrize(
    ("plan", "why"),
    [
        (stages(label=label(HUB, ApiTeacher("http://x", "big", None, 1, 1, 1)), train=QUICK[2].settings),
         "big answered by its API, and costs money"),
        (stages(train=replace(QUICK[2].settings, labels="data/labels-0")), "the labels came with the recipe"),  # type: ignore[type-var]
        (QUICK[:3], "stage pretrain left no model"),
    ],
)  # fmt: skip
def test_a_teacher_that_is_not_at_hand_has_a_reason(plan: list[StagePlan], why: str):
    found = choose("r", plan, {"train": TRAIN_FILES})
    assert [m.role for m in found.models] == ["student", "before"] and found.missing == {Role.TEACHER: why}


def put(folder: Path, *files: str) -> Path:
    for name in files:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"bytes of {name}")
    return folder


def test_only_the_parts_come_from_a_store_and_they_are_checked(tmp_path: Path):
    bucket, home = FakeBucket(VirtualClock()), Home(tmp_path / "home")
    commit_folder(bucket, put(tmp_path / "t", "model/w", "before/w", "arms/soft-0/w"), "train", fence=1)
    commit_folder(bucket, put(tmp_path / "e", "hf/w", "big.gguf"), "export", fence=1)
    manifests = {name: manifest_of(bucket, name) for name in ("train", "export")}
    found = choose("r", QUICK, manifests)
    root = fetch(found, bucket, home)
    assert sorted(p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file()) == [
        "export/hf/w", "train/before/w",
    ]  # fmt: skip
    (root / "export/hf/w").write_text("other bytes")
    assert fetch(found, bucket, home) == root and (root / "export/hf/w").read_text() == "bytes of hf/w"
    bucket.put("export/hf/w", b"other bytes")
    (root / "export/hf/w").unlink()
    with pytest.raises(Corrupt):
        fetch(found, bucket, home)


def manifest_of(bucket: FakeBucket, stage: str) -> Manifest:
    return Manifest.from_json(bucket.get(f"{stage}/COMMIT")[0])


def test_a_run_on_this_machine_is_used_where_it_lies_and_checked(tmp_path: Path):
    bucket, home = open_bucket(f"file:{tmp_path}/bucket/r-abc123"), Home(tmp_path / "home")
    commit_folder(bucket, put(tmp_path / "e", "hf/w", "hf/README.md"), "export", fence=1)
    run = recorded(home, "r-abc123", bucket.url, QUICK)
    student = student_folder(run, home)
    assert student.folder == tmp_path / "bucket/r-abc123/export/hf" and not student.adapter
    assert student.card() == "bytes of hf/README.md"
    assert find(run, bucket).missing == {
        Role.BEFORE: "stage train left nothing of its start", Role.TEACHER: "stage pretrain left no model",
    }  # fmt: skip
    (student.folder / "w").write_text("BYTES of hf/w")
    with pytest.raises(Corrupt, match="is not what was committed"):
        student_folder(run, home)
