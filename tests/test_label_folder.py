"""Can labels that somebody else made be trained on: named in a recipe, planned as they are, checked, learnt?"""

from __future__ import annotations

import json
import struct
from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator.errors import UsageError
from orchestrator.handover import upload_data
from orchestrator.label_folder import SCHEMA, read_label_folder
from orchestrator.recipe import Recipe, parse_recipe
from orchestrator.workload import World
from tasks import models
from tasks.bucket import open_bucket
from tasks.contract import LABELS_PREFIX, Task, TaskError, TrainSettings
from tasks.labels import LABELS_SCHEMA, read_labels, shard_name, write_shard
from tasks.labels_text import import_jsonl
from tasks.stage import StageContext
from tests.test_planner import CONFIG, LOCAL, NOW, make_plan, offering
from tests.whole_runs import make_home

RECIPE = """\
name: given
budget: 1 CNY
infra: local
local: {price: 0.10 USD/h}
data: {held_out: "builtin:addition/held_out", verify: exact}
stages:
  - name: train
    kind: train
    student: {hidden_size: 16, intermediate_size: 32, num_hidden_layers: 1, num_attention_heads: 2}
    labels: LABELS
    method: full
    loss: {alpha: 0.7, temperature: 1}
    epochs: 2
    batch_size: 4
    learning_rate: 3e-3
    threads: 1
  - {name: evaluate, kind: evaluate, student: train, limit: 4, threads: 1}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Ten samples of uneven lengths, over two shards, as `kdcloud labels import` makes them."""
    tokenizer = models.tiny_tokenizer()
    tokenizer.save_pretrained(tmp_path / "tok")
    lines = []
    for i in range(10):
        target = f"{7 * i}</think>{i + 20}"
        ids = [*tokenizer.encode(target, add_special_tokens=False), tokenizer.eos_token_id]
        soft = [{str(j): 0.75, str((j + 1) % 200): 0.125} for j in ids]
        lines.append({"input": f"{i}+20", "target": target, "target_ids": ids, "soft_label": soft, "key": f"k{i}"})
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tasks.labels_import.SHARD_SAMPLES", 6)
        assert import_jsonl(tmp_path / "in.jsonl", tmp_path / "given", str(tmp_path / "tok")) == 10
    return tmp_path / "given"


def recipe(folder: Path, named: str = "./given") -> Recipe:
    return parse_recipe(RECIPE.replace("LABELS", named), folder.parent / "recipe.yaml")


def test_what_is_planned_with_is_what_the_folder_holds(folder: Path) -> None:
    found, labels = read_label_folder(folder), read_labels(folder)
    prompts, answers = labels.prompt_offsets.diff(), labels.completion_offsets.diff()
    assert SCHEMA == LABELS_SCHEMA
    assert (found.samples, found.prompt, found.answer) == (10, prompts.sum() / 10, answers.sum() / 10)
    assert (found.longest_prompt, found.longest) == (prompts.max(), (prompts + answers).max())
    header = labels.header
    assert (found.teacher, found.top_k, found.temperature) == (header.teacher, header.top_k, header.temperature)
    assert found.vocabulary == header.vocabulary and found.size > (folder / shard_name(0)).stat().st_size


@pytest.mark.parametrize("named", ["./given", "given", "given/"])
def test_a_plan_counts_its_samples_steps_and_lengths(folder: Path, named: str) -> None:
    made = recipe(folder, named)
    (train, evaluate) = make_plan(made, config=CONFIG, offers_for=offering(LOCAL), now=NOW).stages
    labels = read_labels(folder)
    lengths = labels.prompt_offsets.diff() + labels.completion_offsets.diff()
    assert isinstance(train.settings, TrainSettings)
    assert Path(train.settings.labels).samefile(folder) and Path(train.settings.labels).is_absolute()
    assert train.settings.max_seq_len == lengths.max()
    assert train.uses["samples"] == 10 and train.uses["steps"] == 5  # twice 10 samples, 4 a step
    assert train.uses["row_tokens"] == pytest.approx(float(lengths.sum()) / 10)
    assert train.after == () and evaluate.after == ("train",)
    (stage, _) = made.stages
    assert World(made, CONFIG.rate).student_shape(stage).vocab == labels.header.vocabulary  # type: ignore[arg-type]


def test_other_labels_make_another_plan_to_approve(folder: Path) -> None:
    first = make_plan(recipe(folder), config=CONFIG, offers_for=offering(LOCAL), now=NOW).digest
    assert make_plan(recipe(folder), config=CONFIG, offers_for=offering(LOCAL), now=NOW).digest == first
    labels = read_labels(folder)
    write_shard(folder / shard_name(1), labels.header, [replace(labels.sample(i), key=f"x{i}") for i in range(6, 10)])
    assert make_plan(recipe(folder), config=CONFIG, offers_for=offering(LOCAL), now=NOW).digest != first


def damage(folder: Path, how: str) -> None:
    shard = folder / shard_name(1)
    if how == "none":
        for file in folder.glob("labels-*"):
            file.unlink()
    elif how == "tokenizer":
        (folder / "tokenizer").rename(folder / "elsewhere")
    elif how == "mixed":
        labels = read_labels(folder)
        write_shard(shard, replace(labels.header, teacher="another"), [labels.sample(0)])
    elif how == "schema":
        labels = read_labels(folder)
        write_shard(shard, replace(labels.header, schema=1), [labels.sample(0)])
    elif how == "cut":
        shard.write_bytes(shard.read_bytes()[:-9])
    elif how == "other":
        shard.write_bytes(struct.pack("<Q", 2) + b"{}")
    elif how == "huge":
        shard.write_bytes(struct.pack("<Q", 2**62) + b"{}")
    else:
        shard.write_bytes(b"")


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("none", "holds no labels"), ("tokenizer", "no tokenizer beside"), ("mixed", "differ in their settings"),
        ("schema", "label schema 1"), ("cut", "damaged"), ("other", "damaged"), ("huge", "damaged"),
        ("empty", "damaged"),
    ],
)  # fmt: skip
def test_a_folder_that_cannot_be_learnt_from_is_said_with_the_line_of_the_recipe(
    folder: Path, how: str, says: str
) -> None:
    damage(folder, how)
    with pytest.raises(UsageError, match=says) as raised:
        recipe(folder)
    assert "recipe.yaml:10: stages[0].labels: " in raised.value.message


def test_hard_labels_need_alpha_0_and_a_stages_name_comes_first(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "hard.jsonl").write_text('{"input": "1", "target": "4"}\n')
    import_jsonl(tmp_path / "hard.jsonl", tmp_path / "hard", str(tmp_path / "tok"))
    with pytest.raises(UsageError, match="set alpha: 0"):
        recipe(folder, "./hard")
    with pytest.raises(UsageError, match=r"there is no stage 'nowhere' before this one"):
        recipe(folder, "nowhere")
    with pytest.raises(UsageError, match=r"holds no labels"):
        recipe(folder, "./nowhere")
    label = "- {name: given, kind: label, teacher: Qwen/Qwen2.5-1.5B, samples: 9, prompts: builtin:addition/train}"
    text = RECIPE.replace("LABELS", "given").replace("stages:\n", f"stages:\n  {label}\n")
    assert parse_recipe(text, folder.parent / "recipe.yaml").labels == {}


def uploaded(folder: Path, tmp_path: Path) -> tuple[TrainSettings, StageContext]:
    (train, _) = make_plan(recipe(folder), config=CONFIG, offers_for=offering(LOCAL), now=NOW).stages
    (folder / "notes.txt").write_text("mine alone")
    bucket = open_bucket(f"file:{tmp_path}/bucket/run")
    settings = upload_data(bucket, train.settings)
    assert isinstance(settings, TrainSettings) and upload_data(bucket, train.settings) == settings
    task = Task("run", "train", "train", 1, 1, bucket.url, settings)
    return settings, StageContext(task, tmp_path / "machine" / "work", bucket)


def test_shards_and_tokenizer_reach_the_machine_and_nothing_else(folder: Path, tmp_path: Path) -> None:
    settings, ctx = uploaded(folder, tmp_path)
    assert settings.labels == f"{LABELS_PREFIX}{read_label_folder(folder).sha256}"
    there = ctx.input(settings.labels)
    assert read_labels(there).keys == read_labels(folder).keys and not (there / "notes.txt").exists()
    assert not list((tmp_path / "bucket").rglob("notes.txt"))
    assert models.vocabulary_hashes(models.load_tokenizer(models.ModelSource(path=str(there / "tokenizer"))))


@pytest.mark.parametrize("whole", [True, False])
def test_labels_that_were_changed_in_the_bucket_are_refused(folder: Path, tmp_path: Path, whole: bool) -> None:
    settings, ctx = uploaded(folder, tmp_path)
    place = tmp_path / "bucket" / "run" / settings.labels
    if whole:  # a manifest that fits what was put there
        text = (place / "COMMIT").read_text().replace(shard_name(1), shard_name(7))
        (place / shard_name(1)).rename(place / shard_name(7))
        (place / "COMMIT").write_text(text)
    else:
        (place / shard_name(1)).write_bytes((place / shard_name(0)).read_bytes())
    with pytest.raises(TaskError, match="not those this run was started with" if whole else "corrupt"):
        ctx.input(settings.labels)
    (place / "COMMIT").unlink()
    with pytest.raises(TaskError, match="not in the bucket"):
        ctx.input(settings.labels)


@pytest.mark.slow
def test_a_run_learns_from_a_folder_of_labels(folder: Path, tmp_path: Path) -> None:
    home = make_home(tmp_path, RECIPE.replace("LABELS", "./given"))
    done = home.call("run", "recipe.yaml", "--yes")
    assert done.returncode == 0, done.stderr
    report = home.check_over()
    assert [stage["state"] for stage in report["stages"]] == ["done", "done"]
    result = json.loads((home.bucket / "train" / "result.json").read_text())
    assert (result["samples"], result["too_long"]) == (10, 0)
    labels = read_labels(folder)
    assert result["supervised_tokens"] == len(labels.completion_ids)
