"""Are the numbers of the evaluation those of the models, and does the exported folder answer like the student?"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ml_support import context, run_stage
from transformers import AutoModelForCausalLM, AutoTokenizer

from tasks import evaluate, export, models
from tasks.contract import (
    Architecture,
    DataSource,
    EvaluateSettings,
    ExportSettings,
    LabelSettings,
    ModelSource,
    PretrainSettings,
    TaskError,
    TrainSettings,
)
from tasks.evaluate import Measured
from tasks.label import Completion, TransformersGenerator

TINY = Architecture(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
PRETRAIN = PretrainSettings(TINY, "builtin:addition/corpus?slips=0", 200, 3, 16, 1e-2)
LABEL = LabelSettings(
    teacher=ModelSource(stage="pretrain"), prompts=DataSource("builtin:addition/train"), verify="exact", samples=12,
    max_new_tokens=6, top_k=4,
)  # fmt: skip
TRAIN = TrainSettings(
    student=ModelSource(architecture=TINY), labels="label", method="full", temperature=1.0, steps=1, compare_hard=True,
    compare_seeds=2,
)  # fmt: skip
EVALUATE = EvaluateSettings(
    student="train", teacher=ModelSource(stage="pretrain"), held_out=DataSource("builtin:addition/held_out"),
    verify="exact", max_new_tokens=4, batch_size=8, limit=20,
)  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which everything up to `train` (compared) and `single` (LoRA, not compared) is done."""
    root = tmp_path_factory.mktemp("run")
    run_stage(root, "pretrain", "pretrain", PRETRAIN)
    with pytest.MonkeyPatch.context() as patch:  # a teacher that is right
        patch.setattr(TransformersGenerator, "generate", right_answers)
        run_stage(root, "label", "label", LABEL)
    run_stage(root, "train", "train", TRAIN)
    single = replace(TRAIN, compare_hard=False, method="lora", student=ModelSource(stage="pretrain"), steps=3)
    run_stage(root, "single", "train", replace(single, learning_rate=0.1))
    return root


def right_answers(self: Any, prompts: list[list[int]], *, seed: int) -> list[Completion]:
    tokenizer = models.tiny_tokenizer()
    done = []
    for prompt in prompts:
        a, b = tokenizer.decode(prompt).split("<|user|>")[1].split("<|assistant|>")[0].split("+")
        ids = tokenizer.encode(f"w\n</think>{int(a) + int(b)}", add_special_tokens=False)
        done.append(Completion([*ids, tokenizer.eos_token_id], "stop"))
    return done


def test_every_role_is_measured_over_its_seeds(trained: Path) -> None:
    result = run_stage(trained, "evaluate", "evaluate", EVALUATE)
    assert result is not None
    quality = result["quality"]
    seeds = {role: len(row["accuracy"]["seeds"]) for role, row in quality.items()}
    assert seeds == {"teacher": 1, "student_before": 1, "student_hard": 2, "student": 2, "student_hard_2x": 2}
    for row in quality.values():
        assert row["accuracy"]["n"] == 20
        assert row["tokens_per_s"] > 0 and row["first_token_s"] > 0 and row["peak_gib"] > 0
    assert len(result["samples"]) == 12
    assert set(result["samples"][0]) == {*evaluate.ROLES, "input", "answer", "right"}


def test_a_single_student_leaves_the_compared_roles_empty(trained: Path) -> None:
    result = run_stage(trained, "evaluate", "evaluate", replace(EVALUATE, student="single", teacher=None))
    assert result is not None
    assert [role for role, row in result["quality"].items() if row is None] == [
        "teacher", "student_hard", "student_hard_2x",
    ]  # fmt: skip


def test_answers_find_back_to_their_prompts_whatever_the_batches(
    trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TransformersGenerator, "generate", right_answers)
    result = run_stage(trained, "evaluate", "evaluate", replace(EVALUATE, batch_size=3))
    assert result is not None
    assert {row["accuracy"]["mean"] for row in result["quality"].values()} == {1.0}


def measured(*right: bool) -> Measured:
    return Measured(list(right), ["t"] * len(right), tokens_per_s=10.0, first_token_s=0.5, peak_gib=1.0)


def test_accuracy_over_seeds_is_mean_and_range() -> None:
    quality = evaluate._quality([measured(True, True, False, False), measured(True, False, False, False)])
    assert quality is not None
    assert quality["accuracy"] == {"mean": 0.375, "min": 0.25, "max": 0.5, "n": 4, "seeds": [0.5, 0.25]}
    assert evaluate._quality([]) is None


def test_shown_samples_are_half_wrong_as_far_as_there_are_any() -> None:
    rows = [{"input": str(i), "answer": "a"} for i in range(30)]
    for wrong, shown_wrong in ((0, 0), (3, 3), (15, 6), (28, 10), (30, 12)):
        student = measured(*[i >= wrong for i in range(30)])
        shown = evaluate._samples(rows, {"student": [student], "teacher": []})
        assert len(shown) == 12
        assert sum(not s["right"]["student"] for s in shown) == shown_wrong


def test_a_batch_padded_on_the_left_says_what_each_prompt_alone_says() -> None:
    tokenizer = models.tiny_tokenizer()
    model = models.from_architecture(TINY, tokenizer, seed=3).eval()
    generator = TransformersGenerator(model, tokenizer, 8)
    prompts = [[5, 6, 7, 8, 9, 10], [40], [70, 71, 72]]
    together = generator.generate(prompts, seed=0)
    assert together == [generator.generate([prompt], seed=0)[0] for prompt in prompts]
    assert all(one.finish_reason == ("stop" if one.ids[-1] == tokenizer.eos_token_id else "length") for one in together)


def test_sampling_is_the_same_for_the_same_seed_only() -> None:
    tokenizer = models.tiny_tokenizer()
    generator = TransformersGenerator(
        models.from_architecture(TINY, tokenizer, seed=3).eval(), tokenizer, 8, temperature=1.0
    )
    assert generator.generate([[5]] * 4, seed=1) == generator.generate([[5]] * 4, seed=1)
    assert generator.generate([[5]] * 4, seed=1) != generator.generate([[5]] * 4, seed=2)


@pytest.mark.parametrize(
    ("change", "says"),
    [({"verify": "none"}, "cannot tell right answers"), ({"student": "label"}, "trained no student")],
)
def test_settings_that_cannot_work_are_refused(trained: Path, change: dict[str, Any], says: str) -> None:
    with pytest.raises(TaskError, match=says):
        run_stage(trained, "evaluate", "evaluate", replace(EVALUATE, **change))


@pytest.mark.parametrize("stage", ["train", "single"])
def test_the_exported_folder_loads_as_usual_and_answers_like_the_student(trained: Path, stage: str) -> None:
    result = run_stage(trained, f"export-{stage}", "export", ExportSettings(stage))
    assert result is not None and result["path"] == "hf"
    folder = trained / f"export-{stage}" / "done" / "hf"
    ours = models.load_stage(trained / stage / "done", context(trained, "x", "export", EVALUATE), dtype=torch.float32)
    theirs, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor([models.prompt_ids(tokenizer, "12+34")])
    assert ids.tolist() == [models.prompt_ids(ours.tokenizer, "12+34")]
    torch.testing.assert_close(theirs(ids).logits, ours.model(ids).logits)
    assert theirs.generation_config.eos_token_id == theirs.config.eos_token_id == tokenizer.eos_token_id
    assert not [path for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pkl")]
    assert "optimizer steps" in (folder / "README.md").read_text()
    ctx = context(trained, "x", "export", EVALUATE)
    base = models.load_stage(trained / "pretrain" / "done", ctx, dtype=torch.float32)
    assert not torch.allclose(base.model(ids).logits, theirs(ids).logits, atol=1e-3)


@pytest.mark.parametrize(("name", "says"), [("gguf", "not there yet"), ("onnx", "unknown export format onnx")])
def test_formats_that_are_not_there_are_refused(trained: Path, name: str, says: str) -> None:
    with pytest.raises(TaskError, match=says):
        export.run(context(trained, "export", "export", EVALUATE), ExportSettings("train", formats=("hf", name)))


