"""From a recipe file to one frozen value, or to everything that is wrong with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import pytest
from pydantic import ValidationError

import orchestrator.recipe as module
from orchestrator import shipped
from orchestrator.errors import UsageError
from orchestrator.recipe import (
    KINDS,
    ArchitecturePart,
    LabelStage,
    RecipeSpec,
    TrainStage,
    load_recipe,
    on_infra,
    parse_recipe,
    recipe_schema,
)
from orchestrator.shipped import builtin_recipes
from tasks.contract import (
    BOX,
    SETTINGS,
    LabelSettings,
    TrainSettings,
)
from tests.recipes import API, DATA, RENTED, SMALL, recipe

GOLDEN = Path(__file__).parent / "golden"


def problems(text: str, folder: Path = GOLDEN) -> list[str]:
    """What is wrong with a recipe, a line each, without the path."""
    with pytest.raises(UsageError) as caught:
        parse_recipe(text, folder / "r.yaml")
    assert caught.value.exit_code == 2 and caught.value.hint
    return [line.removeprefix(f"{folder / 'r.yaml'}:") for line in caught.value.message.splitlines()]


def only(text: str, folder: Path = GOLDEN) -> str:
    """The one thing that is wrong with a recipe."""
    (line,) = problems(text, folder)
    return line


def test_a_recipe_is_read_into_frozen_types() -> None:
    got = recipe(SMALL)
    pretrain, label, train, _, _ = got.stages
    assert got.local is not None and got.local.price.hourly
    assert isinstance(label, LabelStage) and label.soft_labels.top_k == 8 and label.batch_size is None
    assert isinstance(train, TrainStage) and isinstance(train.student, ArchitecturePart)
    assert train.learning_rate == 3e-3 and train.epochs is None
    assert got.idle == 3600 and got.infra == ("local",)
    with pytest.raises(ValidationError):
        pretrain.name = "other"  # type: ignore[misc]
    assert got.text == SMALL and got.path.endswith("recipe.yaml")


def test_everything_wrong_shows_at_once_with_line_key_and_nearest_key() -> None:
    text = (GOLDEN / "bad_recipe.yaml").read_text()
    with pytest.raises(UsageError) as caught:
        parse_recipe(text, Path("bad_recipe.yaml"))
    said = f"{caught.value.message}\nhint: {caught.value.hint}\n".replace(f"{Path.cwd()}/", "")
    assert said == (GOLDEN / "bad_recipe.txt").read_text()


def test_a_missing_file_names_the_nearest_recipe(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        load_recipe("rehersal")
    assert "did you mean rehearsal?" in caught.value.hint
    (tmp_path / "mine.yaml").write_text(SMALL)
    with pytest.raises(UsageError) as caught:
        load_recipe(str(tmp_path / "nine.yaml"))
    assert f"did you mean {tmp_path / 'mine.yaml'}?" in caught.value.hint
    with pytest.raises(UsageError, match="is a folder"):
        load_recipe(str(tmp_path))


def test_built_in_recipes_load_by_name_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    known = builtin_recipes()
    assert {"rehearsal", "r1-qwen-1.5b"} <= set(known)
    for name in known:
        assert load_recipe(name).stages


def test_recipes_inside_the_package_win_as_in_a_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "orchestrator" / "recipes").mkdir(parents=True)
    (tmp_path / "orchestrator" / "recipes" / "one.yaml").write_text(SMALL)
    monkeypatch.setattr(shipped, "__file__", str(tmp_path / "orchestrator" / "shipped.py"))
    assert list(builtin_recipes()) == ["one"]


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "is empty"),
        ("# only a comment\n", "is empty"),
        ("- a\n", ":1: a recipe holds keys and values"),
        ("name: x\n  budget: 3\n", ":2:9: not YAML"),
        ('name: "x\n', ":2:1: not YAML"),
        ("name: a\n---\nname: b\n", "another document"),
        ("a: &a [*a]\n", ":1:4: not YAML: an alias contains itself"),
        ("a: !!python/object:os.system x\n", ":1:4: not YAML"),
        ("a: \x00\n", "not YAML"),
        ("a: !!int x\n", "not YAML"),
        ("a: " + "[" * 5000, "not YAML"),
    ],
)
def test_what_is_not_yaml_is_said_with_its_place(text: str, part: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_recipe(text, Path("r.yaml"))
    assert part in caught.value.message or "nested too deeply" in caught.value.message
    assert "r.yaml" in caught.value.message and caught.value.hint


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(UsageError, match="not a text file"):
        load_recipe(str(tmp_path / "r.yaml"))


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("budget: 1 CNY", "budget: 0 CNY", "2: budget: must be above 0, not 0 CNY"),
        ("budget: 1 CNY", "budget: -5 USD", "2: budget: must be above 0, not -5 USD"),
        ("budget: 1 CNY", "budget: 5 EUR", "2: budget: unknown currency 'EUR': kdcloud counts in CNY and USD"),
        ("budget: 1 CNY", "budget: 1 CNY\nbudgt: 1 CNY", "3: budgt: unknown key; did you mean budget?"),
        ("budget: 1 CNY\n", "", "1: budget: is missing: what the run may cost in all"),
        ("name: evaluate", "name: evaluate-student", "26: stages[3].name: 'evaluate-student' is longer than 12"),
        ("name: evaluate", "name: Evaluate", "26: stages[3].name: 'Evaluate' may hold a-z, 0-9 and - only"),
        ("name: evaluate", "name: 'rm -rf /'", "26: stages[3].name: 'rm -rf /' may hold"),
        ("name: evaluate", "name: train", "26: stages[3].name: 'train' is also the name of stages[2]"),
        (
            "teacher: pretrain",
            "teacher: pretrian",
            "16: stages[1].teacher: there is no stage 'pretrian' before this one; did you mean pretrain?",
        ),
        ("teacher: pretrain", "teacher: train", "16: stages[1].teacher: stage 'train' comes later"),
        ("teacher: pretrain", "teacher: label", "16: stages[1].teacher: a stage cannot use its own result"),
        (
            "teacher: pretrain",
            "teacher: Qwen/Qwen2.5-15B",
            "16: stages[1].teacher: the shape of model 'Qwen/Qwen2.5-15B' is not known; did you mean",
        ),
        (
            "labels: label",
            "labels: pretrain",
            "20: stages[2].labels: stage 'pretrain' is of kind pretrain; needed is one of kind label",
        ),
        (
            "{name: evaluate, kind: evaluate, student: train",
            "{name: evaluate, kind: evaluate, student: label",
            "26: stages[3].student: stage 'label' is of kind label",
        ),
        ("verify: exact", "verify: none", "26: stages[3].verify: an evaluation needs right answers"),
        ("method: full", "method: lora", "21: stages[2].method: LoRA on random weights learns nothing"),
        ("top_k: 8", "top_k: 0", "22: stages[2].loss: alpha above 0 learns from soft labels"),
        ("steps: 800", "steps: 800\n    epochs: 2", "24: stages[2].epochs: steps and epochs exclude each other"),
        (
            "batch_size: 64",
            "batch_size: 64\n    micro_batch: 48",
            "25: stages[2].micro_batch: must divide batch_size 64",
        ),
        ("alpha: 0.9", "alpha: 1.9", "22: stages[2].loss.alpha: must be at most 1, not 1.9"),
        ("temperature: 1}", "temperature: 0}", "22: stages[2].loss.temperature: must be above 0, not 0"),
        ("steps: 550", "steps: 5.5", "13: stages[0].steps: 5.5 is not a whole number"),
        ("steps: 550", "steps: true", "13: stages[0].steps: True is not a whole number"),
        ("learning_rate: 3e-3\n  - {name: l", "learning_rate: .nan\n  - {name: l", "15: stages[0].learning_rate:"),
        ("infra: local", "infra: 'local; rm'", "3: infra: 'local; rm' is not an infra"),
        ("infra: local", "infra: local\ngpus: [RTX3091]", "4: gpus[0]: unknown GPU 'RTX3091'; did you mean RTX3090?"),
        ("infra: local", "infra: local\nidle: 60", "4: idle: 60 has no unit"),
        ("infra: local", "infra: local\ndeadline: 0s", "4: deadline: must be longer than 0"),
        ("infra: local", "infra: local\nbucket: gs://b", "4: bucket: 'gs://b' is not a bucket"),
        ("infra: local", "infra: local\nbucket: 's3://'", "4: bucket: 's3://' is not a bucket"),
        ("0.10 USD/h", "0.10 USD", "4: local.price: '0.10 USD' is not a price an hour"),
        ("0.10 USD/h", "-0.10 USD/h", "4: local.price: must not be below 0"),
        ("builtin:addition/train", "none.jsonl", "5: data.prompts: cannot read"),
        ("kind: export", "kind: exprot", "27: stages[4].kind: unknown kind of stage 'exprot'; did you mean export?"),
        ("kind: export, ", "", "27: stages[4].kind: is missing: one of pretrain"),
        ("formats: [hf]", "formats: []", "27: stages[4].formats: must be a list with at least one entry"),
        (
            "formats: [hf]",
            "formats: [gguff]",
            "27: stages[4].formats[0]: 'gguff' is not known here; did you mean gguf?",
        ),
        ("formats: [hf]", "student: train", "27: stages[4].student: stands here twice, first in line 27"),
    ],
)
def test_one_mistake_is_one_sentence_in_its_line(old: str, new: str, expected: str) -> None:
    assert SMALL.count(old) == 1
    assert only(SMALL.replace(old, new)).startswith(expected)


def test_numbers_mean_what_people_read() -> None:
    text = SMALL.replace("learning_rate: 3e-3\n  - {name: l", "learning_rate: 5E-4\n    seed: 010\n  - {name: l")
    assert "seed: '010' is not a whole number" in only(text)  # octal in YAML 1.1
    assert recipe(SMALL.replace("1e-3, 3e-3", "1e-3, .5, 2")).compare.learning_rates == (1e-3, 0.5, 2.0)


def test_paths_start_at_the_recipes_folder(tmp_path: Path) -> None:
    (tmp_path / "mine.jsonl").write_text('{"input": "1+1", "answer": "2"}\n\n{"input": "1+2", "answer": "3"}\n')
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(
        json.dumps(
            {
                "model_type": "llama",
                "hidden_size": 64,
                "intermediate_size": 128,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "vocab_size": 1000,
            }
        )
    )
    text = RENTED.replace(f"{DATA}/algebra.jsonl", "mine.jsonl").replace("Qwen/Qwen2.5-1.5B", "./model")
    got = recipe(text.replace("s3://bucket/kd", "file:out"), tmp_path)
    assert got.files["mine.jsonl"].rows == 2 and got.files["mine.jsonl"].path == str(tmp_path / "mine.jsonl")
    assert got.models["./model"].hidden == 64 and got.folders["./model"] == str(tmp_path / "model")
    assert got.bucket_url == f"file:{tmp_path / 'out'}"
    (tmp_path / "mine.jsonl").write_text("\n")
    assert only(text.replace("s3://bucket/kd", "file:out"), tmp_path).endswith("mine.jsonl is empty")


def test_a_folder_named_like_no_stage_can_be_a_model(tmp_path: Path) -> None:
    config = {
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 1000,
    }
    (tmp_path / "teacher").mkdir()
    (tmp_path / "teacher" / "config.json").write_text(json.dumps(config))
    got = recipe(SMALL.replace("teacher: pretrain", "teacher: teacher"), tmp_path)
    assert got.models["teacher"].vocab == 1000


def test_a_train_stage_may_be_the_teacher_of_a_later_one() -> None:
    text = SMALL + (
        "  - {name: again, kind: label, teacher: train, samples: 10}\n"
        "  - {name: small, kind: train, student: train, labels: again, method: full, steps: 5}\n"
    )
    assert [stage.name for stage in recipe(text).stages][-2:] == ["again", "small"]


def test_every_setting_a_user_may_want_has_a_key() -> None:
    """What the machine is told (contract) can be said in a recipe, apart from what the planner fills in itself."""
    elsewhere = {
        "label": {"prompts", "verify", "top_k", "label_temperature", "logprob_bits", "api", "tensor_parallel"},
        "train": {
            "alpha",
            "temperature",
            "compare_hard",
            "compare_seeds",
            "arms_at_once",
            "learning_rates",
            "search_steps",
            "checkpoint_every_s",
        },
        "pretrain": {"checkpoint_every_s"},
        "export": {"origin"},
    }
    assert set(KINDS) == set(SETTINGS) - {BOX}  # which no recipe asks for: `kdcloud dev` does
    for kind, settings in SETTINGS.items():
        if kind == BOX:
            continue
        assert KINDS[kind].model_fields["kind"].annotation == Literal[kind]  # type: ignore[valid-type]
        keys = set(KINDS[kind].model_fields)
        missing = set(settings.__dataclass_fields__) - keys - elsewhere.get(kind, set())
        assert not missing, f"{kind}: {missing}"


def test_defaults_of_the_recipe_are_those_of_the_machine() -> None:
    label = LabelStage(name="l", kind="label", teacher="t", samples=1)
    assert (label.temperature, label.top_p, label.soft_labels.top_k, label.keep, label.max_cut_share) == (
        LabelSettings.temperature,
        LabelSettings.top_p,
        LabelSettings.top_k,
        LabelSettings.keep,
        LabelSettings.max_cut_share,
    )
    train = TrainStage(name="t", kind="train", student="s", labels="l")
    assert (train.loss.alpha, train.loss.temperature, train.learning_rate, train.warmup_share, train.batch_size) == (
        TrainSettings.alpha,
        TrainSettings.temperature,
        TrainSettings.learning_rate,
        TrainSettings.warmup_share,
        TrainSettings.batch_size,
    )


def test_the_schema_accepts_what_the_types_accept_and_describes_every_stage() -> None:
    import yaml

    jsonschema = pytest.importorskip("jsonschema")
    schema = recipe_schema()
    checker = jsonschema.Draft202012Validator(schema)
    assert len(builtin_recipes()) >= 2
    for text in (SMALL, RENTED, *(path.read_text() for path in builtin_recipes().values())):
        checker.validate(yaml.load(text, Loader=module._Loader))
    assert not checker.is_valid({"name": "x", "budget": "1 CNY", "stages": [], "colour": "red"})
    assert {"PretrainStage", "LabelStage", "TrainStage", "EvaluateStage", "ExportStage", "RehearseStage"} <= set(
        schema["$defs"]
    )
    assert schema["properties"]["budget"]["description"]
    json.dumps(schema)


def test_every_part_of_a_recipe_can_name_its_nearest_key() -> None:
    """_PARTS leads from the place of an unknown key to the keys that are known there."""
    parts: set[Any] = set()

    def walk(model: Any) -> None:
        parts.add(model)
        for one in model.__subclasses__():
            walk(one)

    walk(module._Part)
    used = {part for part in parts if not part.__name__.startswith("_")} - {module.Recipe, RecipeSpec}
    assert used == set(module._PARTS.values())


def test_another_infra_replaces_the_recipes_and_its_stages() -> None:
    moved = on_infra(recipe(SMALL), "slurm/lab, local")
    assert moved.infra == ("slurm/lab", "local")
    assert {stage.infra for stage in moved.stages} == {None}
    with pytest.raises(UsageError, match="--infra"):
        on_infra(recipe(SMALL), "a b")


@pytest.mark.parametrize(
    ("line", "changed", "says"),
    [
        ("EXAMPLE_API_KEY", "AWS_SECRET_ACCESS_KEY", "not the variable of a model API's key"),
        ("EXAMPLE_API_KEY", "RUNPOD_API_KEY", "not the variable of a model API's key"),
        ("EXAMPLE_API_KEY", "HF_TOKEN", "not the variable of a model API's key"),
        ("https://api", "http://api", "not an address of an API"),
        ("https://api", "https://me:pw@api", "not an address of an API"),
        ("0.55 USD", "0.55 USD/h", "not the price of a million tokens"),
        ("0.55 USD", "-1 USD", "not the price of a million tokens"),
        ("      input_price: 0.55 USD\n", "", "api.input_price: is missing: of 1e6 tokens of prompts"),
        ("input_price", "inputprice", "did you mean input_price?"),
        ("student: train}", "student: train, teacher: label}", "behind an API cannot be evaluated"),
        ("samples: 300", "samples: 300\n    temperature: 0\n    samples_per_prompt: 2", "0 gives the same answer"),
    ],
)
def test_an_api_that_could_leak_a_secret_or_has_no_price_is_refused(line: str, changed: str, says: str) -> None:
    parse_recipe(API, GOLDEN / "r.yaml")
    assert line in API
    assert any(says in problem for problem in problems(API.replace(line, changed)))
