"""Are the numbers of the evaluation those of the models, and does the exported folder answer like the student?"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import vllm_stand_in
from ml_support import context, run_stage
from transformers import AutoModelForCausalLM, AutoTokenizer

from tasks import evaluate, export, generate, models
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
from tasks.generate import Completion, TransformersGenerator
from tasks.intervals import pass_interval, wilson

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
        assert 0 <= row["loop_share"] <= 1 and 0 <= row["cut_share"] <= 1
        low, high = row["accuracy"]["interval"]
        assert 0 <= low <= row["accuracy"]["mean"] <= high <= 1
    assert quality["teacher"]["kl_to_teacher"] is None
    assert all(row["kl_to_teacher"] > 0 for role, row in quality.items() if role != "teacher")
    assert len(result["samples"]) == 12
    assert set(result["samples"][0]) == {*evaluate.ROLES, "input", "answer", "right"}


def test_answers_that_are_cut_off_or_go_round_in_circles_are_counted(
    trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of every four answers two loop, one of them until it is cut off."""
    made = [Completion([7] * 30, "length"), Completion([7] * 30, "stop"), *[Completion([1, 2, 3], "stop")] * 2]
    one_by_one = lambda self, prompts, seed: [made[i % 4] for i in range(len(prompts))]  # noqa: E731
    monkeypatch.setattr(TransformersGenerator, "generate", one_by_one)
    settings = replace(EVALUATE, student="single", teacher=None, batch_size=20)
    result = run_stage(trained, "evaluate-loops", "evaluate", settings)
    assert result is not None
    student = result["quality"]["student"]
    assert (student["cut_share"], student["loop_share"]) == (0.25, 0.5)


def test_a_single_student_leaves_the_compared_roles_empty(trained: Path) -> None:
    result = run_stage(trained, "evaluate", "evaluate", replace(EVALUATE, student="single", teacher=None))
    assert result is not None
    assert [role for role, row in result["quality"].items() if row is None] == [
        "teacher", "student_hard", "student_hard_2x",
    ]  # fmt: skip
    assert result["quality"]["student"]["kl_to_teacher"] is None  # without a teacher there is nothing to compare with


def test_seeds_are_sampled_each_in_its_own_way(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Right for even seeds only: a scripted model that sees the seed."""
    seen: set[int] = set()

    def by_seed(self: Any, prompts: list[list[int]], *, seed: int) -> list[Completion]:
        seen.add(seed // 1_000_003)
        done = right_answers(self, prompts, seed=seed)
        return done if seed // 1_000_003 % 2 == 0 else [Completion(one.ids[:1], "length") for one in done]

    monkeypatch.setattr(TransformersGenerator, "generate", by_seed)
    made = replace(EVALUATE, student="single", seeds=3)
    result = run_stage(trained, "evaluate", "evaluate", made)
    assert result is not None and seen == {0, 1, 2}
    accuracy = result["quality"]["student"]["accuracy"]
    assert (accuracy["mean"], accuracy["seeds"]) == (pytest.approx(2 / 3), [1.0, 0.0, 1.0])
    assert (accuracy["n"], accuracy["answers"]) == (20, 3)


def test_every_token_counts_as_progress(trained: Path) -> None:
    ctx = context(trained, "tokens", "evaluate", EVALUATE)
    evaluate.run(ctx, replace(EVALUATE, student="single", teacher=None, seeds=2))
    places = [done for phase, done in ctx.phases if phase == "evaluate"]
    assert len(set(places)) > 2 * 2 * 3 * 2  # two models, two seeds, three batches, a few tokens each
    assert max(places) <= 2


def test_one_seed_is_greedy_and_several_are_sampled(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[float] = []
    real = TransformersGenerator.__init__

    def noting(self: Any, *args: Any, **kwargs: Any) -> None:
        made.append(kwargs.get("temperature", 0.0))
        real(self, *args, **kwargs)

    monkeypatch.setattr(TransformersGenerator, "__init__", noting)
    for seeds, temperatures in ((1, {0.0}), (2, {0.0, 0.6})):  # the first token is timed greedily
        made.clear()
        run_stage(trained, "evaluate", "evaluate", replace(EVALUATE, student="single", teacher=None, seeds=seeds))
        assert set(made) == temperatures


def loaded(seed: int, tokenizer: Any = None) -> models.Loaded:
    tokenizer = tokenizer or models.tiny_tokenizer()
    return models.Loaded(models.from_architecture(TINY, tokenizer, seed=seed).eval(), tokenizer)


def test_the_divergence_is_that_of_whole_distributions_at_the_teachers_own_tokens(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Against both models' logits, answer by answer; in chunks of a few rows; a wider head changes nothing."""
    teacher, student = loaded(1), loaded(2)
    rows = [{"input": "12+34"}, {"input": "5"}]
    answers = [Completion([50, 60, 70, 80], "stop"), Completion([90], "length")]
    reference = evaluate._reference(teacher, rows, answers)
    total = 0.0
    for row, answer in zip(rows, answers, strict=True):
        prompt = models.prompt_ids(teacher.tokenizer, row["input"])
        p, q = (torch.log_softmax(m.model(torch.tensor([prompt + answer.ids])).logits[0, len(prompt) - 1 : -1], 1)
                for m in (teacher, student))  # fmt: skip
        total += (p.exp() * (p - q)).sum().item()
    assert evaluate._kl(student, reference) == pytest.approx(total / 5, rel=1e-4) and total > 0.1
    assert evaluate._kl(teacher, reference) == pytest.approx(0.0, abs=1e-7)
    monkeypatch.setattr(evaluate, "KL_ELEMENTS", 600)
    assert evaluate._kl(student, reference) == pytest.approx(total / 5, rel=1e-4)
    head = torch.cat([reference.head, torch.full((7, 16), 9.0)])  # rows that are no tokens
    assert evaluate._kl(student, replace(reference, head=head)) == pytest.approx(total / 5, rel=1e-4)


def test_without_a_common_vocabulary_there_is_no_divergence() -> None:
    teacher = loaded(1)
    reference = evaluate._reference(teacher, [{"input": "1"}], [Completion([5], "stop")])
    assert evaluate._kl(teacher, replace(reference, vocabulary="another")) is None
    assert evaluate._kl(teacher, replace(reference, real=reference.head.shape[0] + 1)) is None


def test_the_divergence_is_taken_over_a_bounded_number_of_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate, "KL_TOKENS", 5)
    rows = [{"input": str(i)} for i in range(4)]
    made = evaluate._reference(loaded(1), rows, [Completion([5] * n, "stop") for n in (9, 3, 2, 1)])
    assert [len(answer) for _, answer in made.pairs] == [9]  # one at least
    made = evaluate._reference(loaded(1), rows, [Completion([5] * n, "stop") for n in (3, 3, 2, 1)])
    assert [len(answer) for _, answer in made.pairs] == [3, 2]


def test_tasks_of_the_harness_are_run_on_every_model_where_it_is_installed(
    trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    class Wrapped:
        def __init__(self, *, pretrained: Any, tokenizer: Any, batch_size: int) -> None:
            asked.append(pretrained.generation_config.max_new_tokens)

    def simple_evaluate(*, model: Any, tasks: list[str], log_samples: bool) -> dict[str, Any]:
        assert isinstance(model, Wrapped) and not log_samples
        if "nothing" in tasks:
            raise ValueError("no task nothing")
        return {"results": {task: {"acc,none": 0.5, "alias": task} for task in tasks}}

    fake, huggingface = ModuleType("lm_eval"), ModuleType("lm_eval.models.huggingface")
    fake.simple_evaluate, huggingface.HFLM = simple_evaluate, Wrapped  # type: ignore[attr-defined]
    for name, module in (("lm_eval", fake), ("lm_eval.models", ModuleType("m")), (huggingface.__name__, huggingface)):
        monkeypatch.setitem(sys.modules, name, module)
    made = replace(EVALUATE, student="single", lm_eval=("gsm8k", "arc_easy"))
    result = run_stage(trained, "evaluate", "evaluate", made)
    assert result is not None and asked == [None] * 3  # and not the 1 or 4 tokens of what was measured before
    for role in ("teacher", "student_before", "student"):
        assert result["quality"][role]["lm_eval"] == {"gsm8k": {"acc,none": 0.5}, "arc_easy": {"acc,none": 0.5}}
    with pytest.raises(TaskError, match="cannot do nothing: no task nothing"):
        run_stage(trained, "evaluate", "evaluate", replace(made, lm_eval=("nothing",)))


def test_a_harness_that_is_not_installed_is_said_before_anything_is_measured(
    trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setattr(evaluate, "_measure", None)
    with pytest.raises(TaskError, match="not installed here") as raised:
        run_stage(trained, "evaluate", "evaluate", replace(EVALUATE, lm_eval=("gsm8k",)))
    assert "lm-eval" in raised.value.hint


def test_answers_find_back_to_their_prompts_whatever_the_batches(
    trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TransformersGenerator, "generate", right_answers)
    result = run_stage(trained, "evaluate", "evaluate", replace(EVALUATE, batch_size=3))
    assert result is not None
    assert {row["accuracy"]["mean"] for row in result["quality"].values()} == {1.0}


def measured(*right: bool, more: tuple[list[bool], ...] = (), kl: float | None = None) -> Measured:
    return Measured([list(right), *more], ["t"] * len(right), 10.0, first_token_s=0.5, peak_gib=1.0, kl_to_teacher=kl)


def test_accuracy_over_trained_seeds_is_mean_and_range_and_its_interval_is_over_problems() -> None:
    quality = evaluate._quality(
        [measured(True, True, False, False, kl=0.5), measured(True, False, False, False, kl=0.25)]
    )
    assert quality is not None
    accuracy = quality["accuracy"]
    assert accuracy.pop("interval") == list(pass_interval([1.0, 0.5, 0.0, 0.0]))
    assert accuracy == {"mean": 0.375, "min": 0.25, "max": 0.5, "n": 4, "seeds": [0.5, 0.25], "answers": 2}
    assert quality["kl_to_teacher"] == 0.375 and quality["lm_eval"] is None
    assert evaluate._quality([]) is None


def test_pass_at_1_of_one_model_is_the_share_of_right_answers_over_its_seeds() -> None:
    quality = evaluate._quality([measured(True, True, False, more=([False, True, False], [False, True, False]))])
    assert quality is not None
    accuracy = quality["accuracy"]
    assert accuracy["mean"] == pytest.approx(4 / 9) and accuracy["seeds"] == pytest.approx([2 / 3, 1 / 3, 1 / 3])
    assert (accuracy["n"], accuracy["answers"]) == (3, 3)
    assert accuracy["interval"] == list(pass_interval([1 / 3, 1.0, 0.0]))
    assert quality["kl_to_teacher"] is None


def test_with_one_answer_a_problem_the_interval_is_wilsons() -> None:
    """Newcombe, Statistics in Medicine 17 (1998), table I: 81 of 263 gives .2553 to .3662, 0 of 20 gives 0 to .1611."""
    assert wilson(81 / 263, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert pass_interval([1.0] * 81 + [0.0] * 182) == pytest.approx(wilson(81 / 263, 263), rel=1e-12)
    assert wilson(0.0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
    assert pass_interval([0.0] * 20) == pytest.approx(wilson(0.0, 20))
    assert pass_interval([]) == wilson(0.5, 0) == (0.0, 1.0)
    for n in range(1, 1500):  # to the bit, whatever rounding does
        assert wilson(0.0, n)[0] == 0.0 and wilson(1.0, n)[1] == 1.0


def test_more_answers_to_the_same_problems_narrow_it_only_where_they_differ() -> None:
    """Asked again and always answered alike, 100 problems tell what 100 problems tell; coins tell more."""
    alike = pass_interval([1.0] * 50 + [0.0] * 50)
    assert alike == pytest.approx(wilson(0.5, 100))
    halves = pass_interval([0.25] * 50 + [0.75] * 50)  # variance a quarter of that of alike ones: as 400 answers
    assert halves == pytest.approx(wilson(0.5, 400))


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


def test_formats_that_are_not_there_are_refused(trained: Path) -> None:
    with pytest.raises(TaskError, match="unknown export format onnx"):
        export.run(context(trained, "export", "export", EVALUATE), ExportSettings("train", formats=("hf", "onnx")))


def greedy(served: vllm_stand_in.LLM) -> vllm_stand_in.Answer:
    """Answers of the folder's model."""
    model = AutoModelForCausalLM.from_pretrained(served.model, dtype=torch.float32)

    def answer(ids: list[int], params: Any) -> list[int]:
        assert len(ids) + params.max_tokens <= served.room and params.temperature == 0.0
        (end,) = params.stop_token_ids
        asked = torch.tensor([ids])
        told = model.generate(
            asked, max_new_tokens=params.max_tokens, do_sample=False, eos_token_id=end, pad_token_id=end
        )
        return list(told[0, len(ids) :].tolist())

    return answer


@pytest.mark.parametrize("student", ["train", "single"])
def test_vllm_is_asked_the_same_and_each_model_is_its_own(
    trained: Path, monkeypatch: pytest.MonkeyPatch, student: str
) -> None:
    plain = replace(EVALUATE, student=student)
    wanted = run_stage(trained, f"plain-{student}", "evaluate", plain)
    made = vllm_stand_in.install(monkeypatch, greedy).made
    monkeypatch.setattr(generate, "find_spec", lambda name: name)
    found = run_stage(trained, f"served-{student}", "evaluate", replace(plain, engine="vllm"))
    assert wanted is not None and found is not None
    assert (wanted["engine"], found["engine"]) == ("transformers", "vllm")
    assert found["samples"] == wanted["samples"]
    for role, row in wanted["quality"].items():
        got = found["quality"][role]
        assert (row is None) is (got is None)
        if row is not None:
            assert got["accuracy"] == row["accuracy"] and got["kl_to_teacher"] == row["kl_to_teacher"]
            assert got["tokens_per_s"] > 0 and got["first_token_s"] > 0 and got["peak_gib"] > 0
    assert len(made) == {"train": 8, "single": 3}[student]


def test_a_model_that_vllm_cannot_serve_ends_the_stage_in_words(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**kwargs: Any) -> None:
        raise ValueError("Model architectures ['Odd'] are not supported\nfor now")

    vllm_stand_in.install(monkeypatch, greedy)
    monkeypatch.setattr(sys.modules["vllm"], "LLM", refuse)
    monkeypatch.setattr(generate, "find_spec", lambda name: name)
    with pytest.raises(TaskError, match=r"vLLM cannot serve .*Odd.* are not supported$") as raised:
        run_stage(trained, "unserved", "evaluate", replace(EVALUATE, engine="vllm"))
    assert raised.value.hint == "use engine: transformers"
    monkeypatch.setattr(evaluate, "wants_vllm", lambda *args: True)  # engine: auto, on a GPU
    found = run_stage(trained, "unserved-auto", "evaluate", EVALUATE)
    assert found is not None and found["engine"] == "transformers" and found["quality"]["student"] is not None
    assert not list((trained / "unserved-auto" / "work").glob("served-*"))
